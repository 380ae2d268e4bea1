"""Weights inside structured subspaces from a few samples, without training."""
