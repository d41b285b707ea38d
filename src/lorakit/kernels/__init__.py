"""Kernels: base layer and low-rank pair in one autograd function. Each is exact against autograd in float64."""
