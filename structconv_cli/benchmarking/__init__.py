"""Benchmarks as users see them: which models, under which settings, how fast and how good."""
