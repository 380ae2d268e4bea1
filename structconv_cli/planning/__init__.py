"""Choosing each layer's structure: what is possible, what it takes, what it costs, what is best."""
