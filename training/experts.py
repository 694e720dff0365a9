"""Mixture-of-experts layers for training on a CPU: every expert computed for every token, balanced load.

At 8 or 16 experts of 64 to 128 channels two large matrix products beat many small ones, and compile; the
weights of experts that were not chosen are zero, so value and gradient are those of the routed layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "training_all_experts"
BIAS_STEP = 6e-3
AUXILIARY_WEIGHT = 0.01


def all_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(tokens, hidden) through all experts, summed with the routing weights; adds to `self.load`."""
    tokens, experts = hidden_states.shape[0], self.num_experts
    weights = torch.zeros(tokens, experts, dtype=top_k_weights.dtype).scatter(1, top_k_index, top_k_weights)
    with torch.no_grad():
        self.load += (weights != 0).sum(0)
    gate_up = nn.functional.linear(hidden_states, self.gate_up_proj.flatten(0, 1))
    gate, up = gate_up.view(tokens, experts, 2, self.intermediate_dim).unbind(2)
    inner = self.act_fn(gate) * up * weights[..., None].to(up.dtype)
    down = self.down_proj.transpose(1, 2).flatten(0, 1)
    return (inner.flatten(1) @ down.to(inner.dtype)).to(hidden_states.dtype)


class Balance:
    """Keeps experts in use: bias updates without a loss for GLM (Wang et al. 2024), Switch loss for Qwen3."""

    def __init__(self, model: nn.Module) -> None:
        """Installs `all_experts`; a model without experts is left alone."""
        self.logits: list[Tensor] = []
        self.sparse = [
            module for module in model.modules() if hasattr(module, "experts") and hasattr(module, "gate")
        ]
        if not self.sparse:
            return
        ALL_EXPERTS_FUNCTIONS.register(NAME, all_experts)
        model.config._experts_implementation = NAME
        for module in self.sparse:
            experts = module.experts
            experts.register_buffer("load", torch.zeros(experts.num_experts), persistent=False)
            if not hasattr(module.gate, "e_score_correction_bias"):
                module.gate.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _args: object, output: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # validation passes through the same gates
            self.logits.append(output[0])

    def loss(self) -> Tensor | float:
        """experts * sum(share of tokens * mean probability), averaged over layers; 0 without a softmax router."""
        if not self.logits:
            return 0.0
        losses = []
        for logits, module in zip(self.logits, self.sparse, strict=True):
            probabilities = logits.float().softmax(-1)
            chosen = torch.zeros_like(probabilities).scatter(
                1, probabilities.topk(module.gate.top_k, -1)[1], 1.0
            )
            losses.append(
                probabilities.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum() / module.gate.top_k
            )
        self.logits.clear()
        return AUXILIARY_WEIGHT * torch.stack(losses).mean()

    @torch.no_grad()
    def after_step(self) -> list[float]:
        """Moves biases against the load; returns each layer's busiest expert's load over the mean."""
        ratios = []
        for module in self.sparse:
            load = module.experts.load
            ratios.append(round((load.max() / load.mean().clamp(min=1)).item(), 2))
            if hasattr(module.gate, "e_score_correction_bias"):
                module.gate.e_score_correction_bias += BIAS_STEP * torch.sign(load.mean() - load)
            load.zero_()
        return ratios
