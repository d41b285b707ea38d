"""Starts: how the factors of a low-rank pair begin. One file each; see `lorakit.method.Start`."""
