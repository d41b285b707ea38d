"""Methods: what the update of a layer is. One file each; see `lorakit.method.Method`."""
