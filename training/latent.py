"""Dense grouped-query attention rewritten as latent attention, as near as its ranks allow.

Per layer: the keys' fast rotary pairs become the shared rotary key (of group 0), the slow pairs, which barely turn
within the context, become position-free keys, and both they and the values are read from one latent, by a
low-rank factorization weighted with the layer's own inputs (as in MHA2MLA, Ji et al. 2025, and activation-aware SVD).
QK-norm has no counterpart in MLA: its scale is replaced by its mean over tokens. So that the latents' RMSNorm scales
every token alike, one latent dimension carries a large near-constant. What is lost is trained back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FAST = 16  # rotary pairs shared by both models: theta 1e6 over 32 pairs, 1e3 over 16
STEADY = 2.0  # the near-constant's root mean square over that of all other latents together


@torch.no_grad()
def attention_inputs(dense: nn.Module, ids: Tensor) -> list[Tensor]:
    """What each layer's attention sees, (tokens, hidden)."""
    seen: list[Tensor] = []
    hooks = [
        layer.input_layernorm.register_forward_hook(
            lambda _module, _args, output: seen.append(output.flatten(0, 1))
        )
        for layer in dense.model.layers
    ]
    dense(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


def _normalized(weight: Tensor, gain: Tensor, inputs: Tensor, dim: int) -> Tensor:
    """Head weights (heads, dim, hidden) with the head norm's mean scale and gain folded in."""
    heads = weight.view(-1, dim, weight.shape[1])
    raw = torch.einsum("nc,hdc->nhd", inputs, heads)
    scale = raw.square().mean(-1).add(1e-6).rsqrt().mean(0)
    return heads * scale[:, None, None] * gain[:, None]


def _split(heads: Tensor) -> tuple[Tensor, Tensor]:
    """(slow, fast): slow pairs as position-free rows, fast pairs interleaved; both (heads, 32, hidden)."""
    half = heads.shape[1] // 2
    first, second = heads[:, :half], heads[:, half:]
    slow = torch.cat([first[:, FAST:], second[:, FAST:]], 1)
    fast = torch.stack([first[:, :FAST], second[:, :FAST]], 2).flatten(1, 2)
    return slow, fast


def _factor(rows: Tensor, importance: Tensor, inputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """rows (m, hidden) ≈ up (m, rank) @ norm(down (rank, hidden) x); the last latent is the near-constant."""
    covariance = inputs.T @ inputs / len(inputs)
    values, vectors = torch.linalg.eigh(covariance.double())
    root = (vectors * values.clamp(min=1e-6).sqrt()) @ vectors.T
    inverse = (vectors / values.clamp(min=1e-6).sqrt()) @ vectors.T
    u, s, v = torch.linalg.svd((rows * importance[:, None]).double() @ root, full_matrices=False)
    keep = rank - 1
    down = (v[:keep] @ inverse).float()
    up = ((u[:, :keep] * s[:keep]) / importance[:, None]).float()
    mean = inputs.mean(0)
    steady = mean / mean.square().sum() * math.sqrt(keep) * STEADY
    down = torch.cat([down, steady[None]])
    scale = (inputs @ down.T).square().mean(-1).sqrt().mean()
    return torch.cat([up * scale, torch.zeros(len(up), 1)], 1), down


@torch.no_grad()
def convert_attention(latent: nn.Module, dense: nn.Module, inputs: Tensor) -> None:
    """Fills one latent attention from one dense one (4 heads, 2 key-value heads of 64)."""
    dim, nope = dense.head_dim, latent.qk_nope_head_dim
    queries = _normalized(dense.q_proj.weight, dense.q_norm.weight, inputs, dim)
    queries = queries * math.sqrt(latent.qk_head_dim / dim)
    keys = _normalized(dense.k_proj.weight, dense.k_norm.weight, inputs, dim)
    (slow_q, fast_q), (slow_k, fast_k) = _split(queries), _split(keys)
    values = dense.v_proj.weight.view(2, dim, -1)
    slow = slow_k.shape[1]
    rows = torch.cat([slow_k.flatten(0, 1), values.flatten(0, 1)])
    strength = dense.o_proj.weight.square().sum(0).view(4, dim).sum(0).sqrt().mean()
    importance = torch.cat([torch.full((2 * slow,), 1.0), torch.full((2 * dim,), 1.0)]) * strength.clamp(
        min=1e-3
    )
    up, down = _factor(rows, importance, inputs, latent.kv_lora_rank)
    latent.kv_a_layernorm.weight.fill_(1)
    latent.kv_a_proj_with_mqa.weight.copy_(torch.cat([down, fast_k[0]]))
    expand = latent.kv_b_proj.weight.view(4, nope + latent.v_head_dim, -1)
    expand.zero_()
    shared = similarity(fast_k, inputs)
    query_rows = torch.zeros(4, nope + latent.qk_rope_head_dim, dense.q_proj.weight.shape[1])
    for head in range(4):
        group = head // 2
        expand[head, :slow] = up[group * slow : (group + 1) * slow]
        expand[head, nope:] = up[2 * slow + group * dim : 2 * slow + (group + 1) * dim]
        query_rows[head, :slow] = slow_q[head]
        query_rows[head, nope:] = fast_q[head] * (1.0 if group == 0 else shared)
    flat = query_rows.flatten(0, 1)
    up, down = _factor(flat, torch.ones(len(flat)), inputs, latent.q_lora_rank)
    latent.q_a_layernorm.weight.fill_(1)
    latent.q_a_proj.weight.copy_(down)
    latent.q_b_proj.weight.copy_(up)
    latent.o_proj.weight.copy_(dense.o_proj.weight)


def similarity(keys: Tensor, inputs: Tensor) -> float:
    """How much group 1's fast keys are group 0's, 0 to 1: its heads use the shared rotary key by that much."""
    one, two = (inputs @ key.T for key in keys)
    return max(0.0, nn.functional.cosine_similarity(one, two, dim=-1).mean().item())


@torch.no_grad()
def convert(model: nn.Module, dense: nn.Module, ids: Tensor) -> None:
    """Every layer's attention."""
    for layer, old, inputs in zip(
        model.model.layers, dense.model.layers, attention_inputs(dense, ids), strict=True
    ):
        convert_attention(layer.self_attn, old.self_attn, inputs)
