"""Tasks with exactly checkable answers, held-out text, and how a model is scored on them."""
