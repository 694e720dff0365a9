"""Muon for matrices and AdamW for the rest.

Muon (Jordan et al. 2024): momentum orthogonalized by a Newton-Schulz iteration; scaled by
0.2 * sqrt(larger side) so that its step has AdamW's root mean square (Liu et al. 2025, "Muon is Scalable").
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """(batch, m, n) to nearly orthogonal matrices, in bfloat16 products; singular values land in 0.7..1.2."""
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if transposed else matrices).bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if transposed else x).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; three-dimensional parameters are batches of matrices (experts)."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        """`lr` is in AdamW's units; weight decay is decoupled."""
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, float]) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        gradient = parameter.grad.lerp(state["momentum"], group["momentum"])
        matrices = gradient if gradient.ndim == 3 else gradient[None]
        scale = 0.2 * max(matrices.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalize(matrices).view_as(parameter), alpha=-group["lr"] * scale)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, the rest for AdamW): embeddings, heads, routers, norms, biases go to AdamW."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        plain = any(part in name for part in ("embed", "lm_head", "gate.weight")) or parameter.ndim not in (
            2,
            3,
        )
        (rest if plain else matrices).append(parameter)
    return matrices, rest


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW at one learning rate."""
    matrices, rest = split_parameters(model)
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]
