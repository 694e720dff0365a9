"""Which weights a conversion left alone, and why: nothing is skipped in silence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from optimizations.weights.formats import WeightFormat
from optimizations.weights.packed_modules import PackedModule


@dataclasses.dataclass(frozen=True)
class Kept:
    """A matrix that stays as it is: its name, its bytes, the reason."""

    name: str
    bytes: int
    reason: str


def kept_weights(model: nn.Module, reason_for: Callable[[str, nn.Module], str]) -> list[Kept]:
    """Every parameter of two or more dimensions that is not packed, each tied one once.

    `reason_for` is given the name and the module that holds it. Norms and biases (one dimension) are not weights
    to quantize; together they are below 0.01 % of any of the models.
    """
    found = []
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dim() >= 2 and name.rpartition(".")[2] not in getattr(module, "pending", ()):
                size = parameter.numel() * parameter.element_size()
                found.append(Kept(name, size, reason_for(name, module)))
    return found


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """The packed modules of `model` by name, shared ones once."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield name, module


def why_not_linear(module: nn.Module, fmt: WeightFormat) -> str | None:
    """The reason why `module`, a linear layer, cannot be packed; None when it can."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not a plain nn.Linear, its forward may do more than multiply"
    return fmt.unfit(module.out_features, module.in_features)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` holds the stacked expert weights of transformers' mixture layers."""
    tensors = (module._parameters.get("gate_up_proj"), module._parameters.get("down_proj"))
    return all(tensor is not None and tensor.dim() == 3 for tensor in tensors)


def why_not_experts(module: Any, fmt: WeightFormat) -> str | None:
    """The reason why fused experts cannot be packed; None when they are plain SwiGLU experts."""
    count, hidden, inner = module.down_proj.shape
    if tuple(module.gate_up_proj.shape) != (count, 2 * inner, hidden):
        return f"gate_up_proj of shape {tuple(module.gate_up_proj.shape)} is not [experts, 2 * inner, hidden]"
    if getattr(module, "has_bias", False) or not getattr(module, "is_concatenated", True):
        return "experts with biases or interleaved gate and up rows are not packed"
    activation = type(getattr(module, "act_fn", None)).__name__
    if activation not in {"SiLU", "SiLUActivation"}:
        return f"experts with activation {activation} are not packed, only SiLU"
    gate = type(module).__dict__.get("_apply_gate")
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return f"{type(module).__name__} gates its experts in its own way"
    return fmt.unfit(2 * inner, hidden) or fmt.unfit(hidden, inner)
