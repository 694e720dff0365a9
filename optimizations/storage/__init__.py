"""Techniques that change where the weights live."""
