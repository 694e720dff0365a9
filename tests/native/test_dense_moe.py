"""The mixture-of-experts kernel over dense experts, against float64 and against transformers' order of roundings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from optimizations.native.dense import dense_moe
from optimizations.native.loader import native

DTYPES = [torch.float32, torch.bfloat16]
# Of the spread of the output: float32 sums; in bfloat16 five roundings of 2^-9 each along the way and at the end.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 0.02}
SHAPES = [(1, 96, 48, 8, 2), (2, 64, 40, 4, 1), (7, 130, 97, 6, 6), (33, 65, 31, 16, 4), (90, 33, 20, 3, 2)]


def routed(generator: torch.Generator, tokens: int, experts: int, k: int) -> tuple[Tensor, Tensor]:
    weights, chosen = torch.rand(tokens, experts, generator=generator).topk(k)
    return chosen, weights / weights.sum(-1, keepdim=True)


def layer(
    generator: torch.Generator, experts: int, hidden: int, inner: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5
    return gate_up.to(dtype), down.to(dtype)


def stepwise(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Token by token in the dtype of x, summed in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=wide)
    for t in range(x.shape[0]):
        for e, weight in zip(chosen[t].tolist(), weights[t], strict=True):
            gate, up = functional.linear(x[t], gate_up[e]).chunk(2)
            y = functional.linear((functional.silu(gate) * up).to(wide), down[e].to(wide))
            out[t] += weight.to(wide) * y
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "inner", "experts", "k"), SHAPES)
def test_matches_float64(
    isa: str,
    threads: int,
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    k: int,
    generator: torch.Generator,
) -> None:
    gate_up, down = layer(generator, experts, hidden, inner, dtype)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    chosen, weights = routed(generator, tokens, experts, k)
    y = dense_moe(x, chosen, weights, gate_up, down)
    torch.set_num_threads(1)  # hundreds of small operators follow; the fixture puts it back
    exact = stepwise(x.double(), chosen, weights, gate_up.double(), down.double())
    assert y.dtype == dtype
    assert (y - exact).abs().max() < BOUND[dtype] * max(1.0, exact.abs().max().item())


def test_rounds_where_transformers_rounds(isa: str, generator: torch.Generator) -> None:
    """All but a few outputs have the very bits of the modules one after the other; the rest are one unit away."""
    gate_up, down = layer(generator, 4, 64, 48, torch.bfloat16)
    x = torch.randn(40, 64, generator=generator).bfloat16()
    chosen, weights = routed(generator, 40, 4, 2)
    y = dense_moe(x, chosen, weights, gate_up, down)
    wanted = stepwise(x, chosen, weights, gate_up, down)
    assert (y == wanted.bfloat16()).float().mean() > 0.9
    assert ((y.float() - wanted).abs() <= 2.0**-7 * wanted.abs() + 2e-3).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice_for_any_threads_and_any_batch(
    isa: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    before = torch.get_num_threads()
    gate_up, down = layer(generator, 8, 256, 200, dtype)
    x = torch.randn(45, 256, generator=generator).to(dtype)
    chosen, weights = routed(generator, 45, 8, 3)
    torch.set_num_threads(1)
    whole = dense_moe(x, chosen, weights, gate_up, down)
    torch.set_num_threads(2)
    repeats = [dense_moe(x, chosen, weights, gate_up, down) for _ in range(3)]
    alone = torch.cat(
        [dense_moe(x[t : t + 1], chosen[t : t + 1], weights[t : t + 1], gate_up, down) for t in range(45)]
    )
    torch.set_num_threads(before)
    assert torch.equal(alone, whole)
    assert all(torch.equal(again, whole) for again in repeats)


def test_an_expert_chosen_twice_counts_twice(isa: str, generator: torch.Generator) -> None:
    gate_up, down = layer(generator, 4, 64, 32, torch.float32)
    x = torch.randn(1, 64, generator=generator)
    twice = dense_moe(x, torch.tensor([[2, 2]]), torch.tensor([[0.25, 0.5]]), gate_up, down)
    once = dense_moe(x, torch.tensor([[2]]), torch.tensor([[0.75]]), gate_up, down)
    assert (twice - once).abs().max() < 1e-5 * once.std()


def test_no_tokens(generator: torch.Generator) -> None:
    gate_up, down = layer(generator, 4, 64, 32, torch.float32)
    empty = torch.empty(0, 2)
    assert dense_moe(torch.empty(0, 64), empty.long(), empty, gate_up, down).shape == (0, 64)


def test_refusals_in_words(generator: torch.Generator) -> None:
    gate_up, down = layer(generator, 4, 64, 32, torch.float32)
    x = torch.randn(2, 64, generator=generator)
    chosen, weights = routed(generator, 2, 4, 2)
    with pytest.raises(ValueError, match=r"dense_moe: expert 4 of token 1 is outside 0 .. 3"):
        dense_moe(x, torch.tensor([[0, 1], [4, 1]]), weights, gate_up, down)
    with pytest.raises(TypeError, match="dense_moe: experts must be torch.int64, got torch.int32"):
        dense_moe(x, chosen.int(), weights, gate_up, down)
    with pytest.raises(ValueError, match=r"dense_moe: x must have shape \(any, 64\), got \(2, 32\)"):
        dense_moe(x[:, :32].contiguous(), chosen, weights, gate_up, down)
    with pytest.raises(ValueError, match=r"gate_up must have shape \(4, 64, 64\), got \(4, 65, 64\)"):
        dense_moe(x, chosen, weights, torch.zeros(4, 65, 64), down)
    with pytest.raises(TypeError, match="gate_up must be torch.float32, got torch.bfloat16"):
        dense_moe(x, chosen, weights, gate_up.bfloat16(), down)
    with pytest.raises(ValueError, match="down has no memory"):
        native().dense_moe(
            x.data_ptr(),
            1,
            64,
            32,
            0,
            chosen.data_ptr(),
            weights.data_ptr(),
            2,
            4,
            gate_up.data_ptr(),
            0,
            0,
            1,
        )
