"""Replaces the `forward` of a model's modules by class and gives it back; what such forwards share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optimizations.contract import Undo
from optimizations.errors import Refusal

# Set on a forward hook that does nothing where a cache is given: whoever gives one may pass it by.
IDLE_WITH_CACHE = "idle_with_cache"


def replace_forwards(
    model: nn.Module, replacements: Mapping[str, Callable[..., Any]], technique: str
) -> Undo:
    """Every module whose class name is a key computes `replacements[name](module, ...)`; returns the exact undo.

    With gradients enabled a module takes its own forward, whose gradients are transformers'.

    Raises:
        Refusal: something else has replaced one of these forwards; the model is as it was.
    """
    changed: list[nn.Module] = []

    def undo() -> None:
        while changed:
            del changed.pop().__dict__["forward"]

    for name, module in model.named_modules():
        replacement = replacements.get(type(module).__name__)
        if replacement is None:
            continue
        if "forward" in module.__dict__:
            undo()
            raise Refusal(
                f"the forward of {name} has already been replaced by something else; apply {technique} first"
            )
        module.__dict__["forward"] = _bound(module, replacement, module.forward)
        changed.append(module)
    return undo


def _bound(module: nn.Module, replacement: Callable[..., Any], original: Callable[..., Any]) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return original(*args, **kwargs)
        return replacement(module, *args, **kwargs)

    return forward


def attention_interface(attention: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the model's configuration names, as its own modules find it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(attention).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
