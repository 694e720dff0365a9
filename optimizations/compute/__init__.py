"""Techniques that change how the same mathematics is computed."""
