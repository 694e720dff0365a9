"""Techniques that change the cache."""
