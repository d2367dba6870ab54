"""Faster ways to compute what the two hooks compute. Tests compare each with its plain reference."""
