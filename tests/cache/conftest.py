from __future__ import annotations

from tiny_models import family, prompts, tiny

__all__ = ["family", "prompts", "tiny"]
