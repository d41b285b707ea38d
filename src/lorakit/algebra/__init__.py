"""Algebra on adapters, without any model."""
