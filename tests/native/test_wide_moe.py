"""Experts with many bf16 rows (test_wide_linear.py), beside experts with few; all of it against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from wide_forms import LEAST, Wide

from optimizations.native.experts import PackedExperts, pack_experts
from optimizations.native.linear import moe
from optimizations.native.reference import exact_moe
from optimizations.native.reference_wide import byte_weights

# Root of the mean squared error by the outputs' standard deviation. Where every expert is wide and int8: weights rounded to bf16
# twice, the middle and the output once (0.004 measured); otherwise two roundings of activations to int8, as for few tokens.
WIDE, MIXED = 0.007, 0.025
# Between the kernel and what it is meant to compute: rounding of the output, and of a middle that is a rounding error away.
MEANT = 0.004

Route = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]


def layer(
    generator: torch.Generator, experts: int, hidden: int, inner: int, bits: int, group_size: int = 32
) -> PackedExperts:
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator) * 0.1
    down = torch.randn(experts, hidden, inner, generator=generator) * 0.1
    return pack_experts(gate_up, down, bits=bits, group_size=group_size)


def even(tokens: int, experts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two experts a token, each expert as often as the others."""
    first = torch.arange(tokens) % experts
    chosen = torch.stack((first, (first + 1) % experts), 1)
    return chosen, torch.rand(tokens, 2, generator=generator)


def uneven(tokens: int, experts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the tokens on expert 1, the rest anywhere: wide and other experts in one call."""
    chosen = torch.rand(tokens, experts, generator=generator).topk(2).indices
    chosen[: tokens // 2, 0] = 1
    return chosen, torch.rand(tokens, 2, generator=generator)


def spread_of_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt() / exact.std())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts", "group_size"),
    [(64, 96, 48, 3, 32), (130, 130, 40, 4, 64), (700, 200, 130, 2, 128), (160, 64, 560, 4, 32)],
)
def test_wide_experts_are_near_float64(
    isa: str,
    threads: int,
    bits: int,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    group_size: int,
    generator: torch.Generator,
) -> None:
    packed = layer(generator, experts, hidden, inner, bits, group_size)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    chosen, weights = even(tokens, experts, generator)
    error = spread_of_error(moe(x, chosen, weights, packed), exact_moe(x, chosen, weights, packed))
    assert error < (WIDE if (isa, bits) == ("amx", 8) else MIXED)


def test_wide_int4_experts_multiply_bytes(wide: Wide, threads: int, generator: torch.Generator) -> None:
    """Activations and the middle of an expert with a step per 512 columns, outliers among them."""
    if wide.bits != 4:
        pytest.skip("int8 experts hold their own bytes")
    packed = layer(generator, 3, 700, 560, 4)
    x = torch.randn(180, 700, generator=generator).bfloat16()
    x[::3, 9] = 80.0
    chosen, weights = even(180, 3, generator)
    exact = torch.zeros(180, 700, dtype=torch.float64)
    for e in range(3):
        token, choice = (chosen == e).nonzero(as_tuple=True)
        rows = wide.rows(x[token])
        gate, up = rows @ byte_weights(packed.gate(e)).T, rows @ byte_weights(packed.up(e)).T
        middle = wide.rows((torch.nn.functional.silu(gate) * up).bfloat16())
        exact.index_add_(
            0, token, middle @ byte_weights(packed.down(e)).T * weights[token, choice].double()[:, None]
        )
    assert spread_of_error(moe(x, chosen, weights, packed), exact) < MEANT


@pytest.mark.parametrize("bits", [4, 8])
def test_wide_and_other_experts_in_one_call(
    isa: str, threads: int, bits: int, generator: torch.Generator
) -> None:
    packed = layer(generator, 9, 160, 72, bits)
    x = torch.randn(75, 160, generator=generator).bfloat16()
    chosen, weights = uneven(75, 9, generator)
    assert spread_of_error(moe(x, chosen, weights, packed), exact_moe(x, chosen, weights, packed)) < MIXED


@pytest.mark.parametrize("route", [even, uneven])
def test_same_bits_twice_and_for_any_threads(wide: Wide, route: Route, generator: torch.Generator) -> None:
    packed = layer(generator, 7, 256, 200, wide.bits)
    x = torch.randn(230, 256, generator=generator).bfloat16()
    chosen, weights = route(230, 7, generator)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = moe(x, chosen, weights, packed)
    torch.set_num_threads(2)
    repeats = [moe(x, chosen, weights, packed) for _ in range(5)]
    torch.set_num_threads(before)
    assert all(torch.equal(again, whole) for again in repeats)


def test_few_tokens_and_experts_with_few_keep_their_bits(wide: Wide, generator: torch.Generator) -> None:
    """One token less on one expert, and more tokens of which no expert has as many, are what each token is alone."""
    packed = layer(generator, 4, 96, 48, wide.bits)
    few, many = LEAST - 1, LEAST + 8
    x = torch.randn(many, 96, generator=generator).bfloat16()
    for tokens, chosen in ((few, torch.full((few, 1), 2)), (many, torch.arange(many).view(many, 1) % 4)):
        weights = torch.ones(tokens, 1)
        alone = [moe(x[t : t + 1], chosen[t : t + 1], weights[:1], packed) for t in range(tokens)]
        assert torch.equal(moe(x[:tokens], chosen, weights, packed), torch.cat(alone))


def test_not_finite_poisons_its_token_only(wide: Wide, generator: torch.Generator) -> None:
    packed = layer(generator, 2, 64, 40, wide.bits)
    x = torch.randn(LEAST, 64, generator=generator).bfloat16()
    chosen, weights = even(LEAST, 2, generator)
    clean = moe(x, chosen, weights, packed)
    x[5, 3] = torch.nan
    y = moe(x, chosen, weights, packed)
    assert not y[5].isfinite().any()
    assert torch.equal(torch.cat((y[:5], y[6:])), torch.cat((clean[:5], clean[6:])))
