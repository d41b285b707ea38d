"""Tasks: what the model is to learn. Loss, metric, head, and the base model that fits."""
