"""Techniques that change how the model is driven."""
