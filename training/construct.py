"""Structured initialisation: the model can look back from its first step on.

Learning to retrieve from scratch takes longer than two cores give (induction heads form late and suddenly,
Olsson et al. 2022). So attention starts from a construction in the spirit of mimetic initialisation
(Trockman & Kolter 2023): in layer 0 heads attend to fixed offsets (1, 2, 3 and 5 tokens back) and copy a
projection of what they see into subspaces of their own; in layer 1 two heads match the current
token against those subspaces and copy the matching position's token to the output. Everything else starts
random, branch outputs start at zero, and all of it is trained: nothing is frozen, masked or added to the
architecture. The residual stream starts out divided as in `Layout`; training is free to mix it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LAYOUT:
    """Which of the 256 residual dimensions start out with which meaning."""

    token = slice(0, 128)
    constant = slice(128, 132)
    previous = slice(132, 196)
    before_previous = slice(196, 228)
    fifth = slice(228, 256)


# |token part| is 0.7 at width 256; the constant part weighs half of that in each embedding.
CONSTANT_NORM = 0.35
PREVIOUS_GAIN, COPY_GAIN = 0.05, 0.18
SHARP_GAIN = 3.0  # QK-norm caps logits at sqrt(head_dim) * gain^2: 8 * 9 with heads of 64


def _random(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)


def fill_embedding(weight: Tensor, generator: torch.Generator) -> None:
    """Random token parts, one constant direction shared by all tokens, nothing elsewhere."""
    weight.zero_()
    width = weight.shape[1]
    token = weight[:, LAYOUT.token]
    # Equal norms: where keys are not normalized (MLA), 10 % of norm outweighs one position of distance.
    parts = nn.functional.normalize(torch.randn(token.shape, generator=generator), dim=1)
    token.copy_(parts * math.sqrt(token.shape[1] / width))
    constants = LAYOUT.constant.stop - LAYOUT.constant.start
    weight[:, LAYOUT.constant] = CONSTANT_NORM / math.sqrt(constants)


def fill_branches(model: nn.Module) -> None:
    """Zeroes what every attention and feed-forward branch adds to the residual stream."""
    for name, parameter in model.named_parameters():
        if "visual" not in name and name.split(".")[-2 if name.endswith("weight") else -1] in (
            "o_proj",
            "down_proj",
        ):
            parameter.zero_()


def offset_phases(inverse_frequencies: Tensor, pairs: int, offset: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines that make a constant query meet a constant key best `offset` tokens back."""
    angles = inverse_frequencies[:pairs] * offset
    return angles.cos(), angles.sin()


def _write_rotary(weight: Tensor, phases: tuple[Tensor, Tensor], half: int) -> None:
    """Rows of one head: the constant direction to the fastest rotary pairs (halves layout), rest zero."""
    weight.zero_()
    pairs = len(phases[0])
    weight[:pairs, LAYOUT.constant] = phases[0][:, None]
    weight[half : half + pairs, LAYOUT.constant] = phases[1][:, None]


def construct_gqa(layers: nn.ModuleList, inverse_frequencies: Tensor, generator: torch.Generator) -> None:
    """Previous-token heads in layer 0 and induction heads in layer 1 of a QK-norm GQA decoder."""
    first, second = layers[0].self_attn, layers[1].self_attn
    dim = first.head_dim
    half, pairs = dim // 2, 8
    reader = _previous_heads_gqa(first, inverse_frequencies, half, pairs, generator)
    construct_further_heads_gqa(first, inverse_frequencies, generator)
    slow = [*range(18, half), *range(half + 18, dim)]  # below 0.5 radians at 1,024 tokens for theta 1e6
    second.q_norm.weight[slow] = SHARP_GAIN
    second.k_norm.weight[slow] = SHARP_GAIN
    for group in range(2):
        match = _random(len(slow), dim, generator)
        query = second.q_proj.weight[2 * group * dim : (2 * group + 1) * dim]
        key = second.k_proj.weight[group * dim : (group + 1) * dim]
        query.zero_()
        key.zero_()
        query[slow, LAYOUT.token] = match @ reader
        key[slow, LAYOUT.previous] = match * PREVIOUS_GAIN**-0.5
        value = second.v_proj.weight[group * dim : (group + 1) * dim]
        value.zero_()
        start = LAYOUT.token.start + group * dim
        value[:, start : start + dim] = torch.eye(dim)
        output = second.o_proj.weight[start : start + dim, 2 * group * dim : (2 * group + 1) * dim]
        output.copy_(torch.eye(dim) * COPY_GAIN)


def _previous_heads_gqa(
    attention: nn.Module, inverse_frequencies: Tensor, half: int, pairs: int, generator: torch.Generator
) -> Tensor:
    """Heads 0 and 1 look one and two tokens back and share the values of group 0; returns their reader."""
    dim = 2 * half
    fast = [*range(pairs), *range(half, half + pairs)]
    attention.q_norm.weight[fast] = SHARP_GAIN
    attention.k_norm.weight[fast] = SHARP_GAIN
    _write_rotary(attention.k_proj.weight[:dim], offset_phases(inverse_frequencies, pairs, 1), half)
    for head, offset in enumerate((0, -1)):
        phases = offset_phases(inverse_frequencies, pairs, offset)
        _write_rotary(attention.q_proj.weight[head * dim : (head + 1) * dim], phases, half)
    width = LAYOUT.token.stop - LAYOUT.token.start
    reader = torch.linalg.qr(torch.randn(width, dim, generator=generator))[0].T
    attention.v_proj.weight[:dim].zero_()
    attention.v_proj.weight[:dim, LAYOUT.token] = reader
    attention.o_proj.weight[LAYOUT.previous, :dim] = torch.eye(dim) * PREVIOUS_GAIN
    narrow = LAYOUT.before_previous.stop - LAYOUT.before_previous.start
    attention.o_proj.weight[LAYOUT.before_previous, dim : dim + narrow] = torch.eye(narrow) * PREVIOUS_GAIN
    return reader


def construct_further_heads_gqa(
    attention: nn.Module, inverse_frequencies: Tensor, generator: torch.Generator
) -> None:
    """Heads 2 and 3 look five and three tokens back (digits of additions, longer n-grams); group 1's values."""
    dim, pairs = attention.head_dim, 8
    _write_rotary(
        attention.k_proj.weight[dim : 2 * dim], offset_phases(inverse_frequencies, pairs, 1), dim // 2
    )
    for head, offset in ((2, -4), (3, -2)):
        phases = offset_phases(inverse_frequencies, pairs, offset)
        _write_rotary(attention.q_proj.weight[head * dim : (head + 1) * dim], phases, dim // 2)
    width, narrow = LAYOUT.token.stop - LAYOUT.token.start, LAYOUT.fifth.stop - LAYOUT.fifth.start
    values = attention.v_proj.weight[dim : 2 * dim]
    values.zero_()
    values[:, LAYOUT.token] = torch.linalg.qr(torch.randn(width, dim, generator=generator))[0].T
    attention.o_proj.weight[:, 2 * dim : 4 * dim] = 0
    attention.o_proj.weight[LAYOUT.fifth, 2 * dim : 2 * dim + narrow] = torch.eye(narrow) * PREVIOUS_GAIN


def construct_mla(layers: nn.ModuleList, inverse_frequencies: Tensor, generator: torch.Generator) -> None:
    """The same circuits through the latents of MLA: position in the rotary key, content in the latent.

    Latent key-value dimensions 0..31 carry what identifies a token (layer 1: the previous token), 32..127
    the first 96 token dimensions, which is all the two copying heads need to name the token.
    """
    first, second = layers[0].self_attn, layers[1].self_attn
    rope, nope, value_dim = first.qk_rope_head_dim, first.qk_nope_head_dim, first.v_head_dim
    head, joint, pairs = nope + rope, nope + value_dim, 4
    # layer 0: constant -> query latent 0 -> rotary part of heads 0 and 1
    # The same draw as in construct_gqa, so that the dense model's feed-forward layers find what they know.
    width = LAYOUT.token.stop - LAYOUT.token.start
    reader = torch.linalg.qr(torch.randn(width, value_dim, generator=generator))[0].T
    for attention in (first, second):
        attention.q_a_proj.weight.copy_(_random(*attention.q_a_proj.weight.shape, generator))
    first.q_a_proj.weight[0].zero_()
    first.q_a_proj.weight[0, LAYOUT.constant] = 4.0
    keys = first.kv_a_proj_with_mqa.weight[first.kv_lora_rank :]
    keys.zero_()
    _write_interleaved(keys, LAYOUT.constant, offset_phases(inverse_frequencies, pairs, 1), 1.0)
    for index, offset in enumerate((0, -1, -4)):
        rows = first.q_b_proj.weight[index * head : (index + 1) * head]
        rows.zero_()
        _write_interleaved(rows[nope:], slice(0, 1), offset_phases(inverse_frequencies, pairs, offset), 0.6)
    _latent_values(first, 0, reader)
    first.o_proj.weight[LAYOUT.previous, :value_dim] = torch.eye(value_dim) * PREVIOUS_GAIN
    narrow = LAYOUT.before_previous.stop - LAYOUT.before_previous.start
    first.o_proj.weight[LAYOUT.before_previous, value_dim : value_dim + narrow] = (
        torch.eye(narrow) * PREVIOUS_GAIN
    )
    first.kv_b_proj.weight[joint + nope : 2 * joint] = first.kv_b_proj.weight[nope:joint]
    _fifth_values_mla(first, generator)
    _induction_mla(second, reader, generator)


def _fifth_values_mla(attention: nn.Module, generator: torch.Generator) -> None:
    """Head 2 reads another projection of the token five back, through the latent dimensions left over."""
    nope, value_dim = attention.qk_nope_head_dim, attention.v_head_dim
    joint, narrow, start = nope + value_dim, LAYOUT.fifth.stop - LAYOUT.fifth.start, 32 + value_dim
    width = LAYOUT.token.stop - LAYOUT.token.start
    latent = attention.kv_a_proj_with_mqa.weight[start : start + narrow]
    latent.zero_()
    latent[:, LAYOUT.token] = torch.linalg.qr(torch.randn(width, narrow, generator=generator))[0].T
    rows = attention.kv_b_proj.weight[2 * joint + nope : 3 * joint]
    rows.zero_()
    rows[:narrow, start : start + narrow] = torch.eye(narrow)
    output = attention.o_proj.weight[LAYOUT.fifth, 2 * value_dim : 2 * value_dim + narrow]
    output.copy_(torch.eye(narrow) * PREVIOUS_GAIN)


def _latent_values(attention: nn.Module, index: int, reader: Tensor) -> None:
    """Latent dimensions 32.. hold `reader` of the token part; the head's values are those."""
    nope, value_dim = attention.qk_nope_head_dim, attention.v_head_dim
    joint = nope + value_dim
    latent = attention.kv_a_proj_with_mqa.weight[32 : 32 + value_dim]
    latent.zero_()
    latent[:, LAYOUT.token] = reader
    rows = attention.kv_b_proj.weight[index * joint + nope : (index + 1) * joint]
    rows.zero_()
    rows[:, 32 : 32 + value_dim] = torch.eye(value_dim)


def _write_interleaved(weight: Tensor, columns: slice, phases: tuple[Tensor, Tensor], gain: float) -> None:
    pairs = len(phases[0])
    weight[0 : 2 * pairs : 2, columns] = gain * phases[0][:, None]
    weight[1 : 2 * pairs : 2, columns] = gain * phases[1][:, None]


def _induction_mla(attention: nn.Module, reader: Tensor, generator: torch.Generator) -> None:
    nope, rope, value_dim = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim
    head, joint, latent = nope + rope, nope + value_dim, attention.kv_a_proj_with_mqa.weight
    identity = _random(32, reader.shape[0], generator) * math.sqrt(2)
    latent[: attention.kv_lora_rank].zero_()
    latent[:32, LAYOUT.previous] = identity
    latent[32:128, LAYOUT.token.start : LAYOUT.token.start + 96] = torch.eye(96) * 1.5
    attention.q_a_proj.weight[:32].zero_()
    attention.q_a_proj.weight[:32, LAYOUT.token] = identity @ reader
    for index, (start, width) in enumerate(((0, 48), (48, 48))):
        query = attention.q_b_proj.weight[index * head : (index + 1) * head]
        query.zero_()
        query[:32, :32] = torch.eye(32) * SHARP_GAIN
        keys = attention.kv_b_proj.weight[index * joint : index * joint + nope]
        keys.zero_()
        keys[:32, :32] = torch.eye(32) * SHARP_GAIN
        values = attention.kv_b_proj.weight[index * joint + nope : (index + 1) * joint]
        values.zero_()
        values[:width, 32 + start : 32 + start + width] = torch.eye(width)
        output = attention.o_proj.weight[start : start + width, index * value_dim : index * value_dim + width]
        output.copy_(torch.eye(width) * COPY_GAIN)


@torch.no_grad()
def construct(model: nn.Module, seed: int) -> None:
    """Applies the construction to a freshly made tiny model of any of the four classes, in float32."""
    generator = torch.Generator().manual_seed(seed)
    body = getattr(model.model, "language_model", model.model)
    fill_branches(model)
    fill_embedding(body.embed_tokens.weight, generator)
    head = model.get_output_embeddings()
    if head.weight is not body.embed_tokens.weight:
        head.weight.copy_(body.embed_tokens.weight)
    frequencies = body.rotary_emb.inv_freq
    if hasattr(body.layers[0].self_attn, "kv_lora_rank"):
        construct_mla(body.layers, frequencies, generator)
    else:
        construct_gqa(body.layers, frequencies, generator)
