"""Techniques that change the visual tokens and the vision tower."""
