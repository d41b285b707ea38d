"""Looking inside an adapter: what changed, where, and how much of its rank it uses."""

from lorakit.inspect.table import LayerView, View, inspect

__all__ = ["LayerView", "View", "inspect"]
