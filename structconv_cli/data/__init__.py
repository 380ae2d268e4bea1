"""Datasets: what to load, from where, and how it is asked for."""
