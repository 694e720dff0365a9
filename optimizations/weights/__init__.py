"""Techniques that change the weights."""
