"""Inference optimizations for transformers models: one technique = one module, found by discovery.

`optimize(model, "weight_int4", "kv_int8")` is the front door; see `optimizations.contract` for what a
technique promises and `optimizations.registry` for how techniques are found and composed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimizations.session import optimize as optimize

__all__ = ["optimize"]


def __getattr__(name: str) -> Any:
    """Resolve `optimize` on first use, so that importing the package costs no torch import."""
    if name == "optimize":
        from optimizations.session import optimize

        return optimize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
