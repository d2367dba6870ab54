"""Faster ways to compute what the two hooks compute. Each has a plain reference beside it, and tests compare the two."""
