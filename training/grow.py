"""Starts the other models from the trained dense one.

The vision model takes it as its text tower. GLM takes embeddings, norms and feed-forward layers, and the
dense attention rewritten as latent attention (`latent.py`). The coder takes attention and embeddings and gets experts by
sparse upcycling (Komatsuzaki et al. 2022) with sharded copies (He et al. 2024, "Upcycling LLMs into MoE"):
each group of top-k experts is one copy of the dense layer's most used channels, so that a token routed to one
copy sees the dense layer again (GLM: the shared expert holds the most used channels, and every copy the next).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.latent import convert

NOISE = 0.05
# Router logits then deviate by 1.6 over normalized tokens of norm 16: copies are chosen by token, not by chance.
ROUTER_STD = 0.1


@dataclass(frozen=True)
class Usage:
    """Per layer: channels by importance (mean |activation| times the norm of what it writes), and mean input."""

    order: Tensor
    mean: Tensor


@torch.no_grad()
def channel_usage(dense: nn.Module, ids: Tensor) -> list[Usage]:
    """Measured on `ids` (rows, tokens)."""
    inputs: list[Tensor] = []
    inner: list[Tensor] = []
    hooks = []
    for layer in dense.model.layers:
        hooks.append(
            layer.mlp.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].mean((0, 1))))
        )
        write = layer.mlp.down_proj
        hooks.append(
            write.register_forward_pre_hook(lambda _module, args: inner.append(args[0].abs().mean((0, 1))))
        )
    dense(input_ids=ids)
    for hook in hooks:
        hook.remove()
    norms = [layer.mlp.down_proj.weight.norm(dim=0) for layer in dense.model.layers]
    return [
        Usage((a * norm).argsort(descending=True), mean)
        for a, norm, mean in zip(inner, norms, inputs, strict=True)
    ]


@torch.no_grad()
def grow_vision(model: nn.Module, dense: nn.Module) -> None:
    """Copies the dense decoder into the text tower; the vision tower keeps its initialisation."""
    model.model.language_model.load_state_dict(dense.model.state_dict())
    model.tie_weights()


@torch.no_grad()
def grow_glm(model: nn.Module, dense: nn.Module, ids: Tensor, seed: int) -> None:
    """All of the dense model as far as GLM's shapes hold it; the routed experts' scaling is divided out."""
    generator = torch.Generator().manual_seed(seed)
    mixers = (".mlp.", ".self_attn.")
    kept = {
        key: value for key, value in dense.state_dict().items() if not any(part in key for part in mixers)
    }
    model.load_state_dict(kept, strict=False)
    model.lm_head.weight.copy_(dense.model.embed_tokens.weight)
    model.model.layers[0].mlp.load_state_dict(dense.model.layers[0].mlp.state_dict())
    usages = channel_usage(dense, ids)
    for layer, old, usage in zip(model.model.layers[1:], dense.model.layers[1:], usages[1:], strict=True):
        order = usage.order
        shared = layer.mlp.shared_experts
        width = shared.gate_proj.out_features
        for name in ("gate_proj", "up_proj"):
            getattr(shared, name).weight.copy_(getattr(old.mlp, name).weight[order[:width]])
        shared.down_proj.weight.copy_(old.mlp.down_proj.weight[:, order[:width]])
        scaling = layer.mlp.gate.routed_scaling_factor
        _shard(layer.mlp, old.mlp, Usage(order[width:], usage.mean), generator, scaling)
    convert(model, dense, ids)


@torch.no_grad()
def grow_coder(model: nn.Module, dense: nn.Module, ids: Tensor, seed: int) -> None:
    """Experts from shards of the dense feed-forward layers, perturbed; the head unties from the embedding."""
    generator = torch.Generator().manual_seed(seed)
    kept = {key: value for key, value in dense.state_dict().items() if ".mlp." not in key}
    model.load_state_dict(kept, strict=False)
    model.lm_head.weight.copy_(dense.model.embed_tokens.weight)
    for layer, old, usage in zip(
        model.model.layers, dense.model.layers, channel_usage(dense, ids), strict=True
    ):
        _shard(layer.mlp, old.mlp, usage, generator, 1.0)


def _shard(
    sparse: nn.Module, dense: nn.Module, usage: Usage, generator: torch.Generator, scaling: float
) -> None:
    """Fills the experts from the first channels in order; each shard of a copy weighs scaling / top-k."""
    experts, top_k = sparse.experts, sparse.gate.top_k
    width = experts.intermediate_dim
    order = usage.order[: top_k * width]
    router = (
        torch.randn(experts.num_experts // top_k, sparse.gate.hidden_dim, generator=generator) * ROUTER_STD
    )
    # What all tokens have in common must not choose: it would send them all to one copy.
    direction = nn.functional.normalize(usage.mean, dim=0)
    router -= (router @ direction)[:, None] * direction
    for expert in range(experts.num_experts):
        channels = order[expert % top_k :: top_k]
        gate_up = torch.cat([dense.gate_proj.weight[channels], dense.up_proj.weight[channels]])
        experts.gate_up_proj[expert] = _perturb(gate_up, generator)
        experts.down_proj[expert] = _perturb(dense.down_proj.weight[:, channels] * top_k / scaling, generator)
        sparse.gate.weight[expert] = router[expert // top_k]


def _perturb(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Adds noise of 5 % of the weights' deviation: copies must differ for routing to mean something."""
    return weight + NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
