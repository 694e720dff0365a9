"""The mixture-of-experts kernel against float64 and against its own linears."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from optimizations.native.calls import run_moe
from optimizations.native.experts import PackedExperts, pack_experts
from optimizations.native.linear import linear, moe
from optimizations.native.packing import pack_into
from optimizations.native.reference import exact_moe, quantized_moe


def routed(
    generator: torch.Generator, tokens: int, experts: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(tokens, experts, generator=generator)
    weights, chosen = scores.topk(k)
    return chosen, weights / weights.sum(-1, keepdim=True)


def layer(
    generator: torch.Generator, experts: int, hidden: int, inner: int, bits: int, group_size: int = 32
) -> PackedExperts:
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator) * 0.1
    down = torch.randn(experts, hidden, inner, generator=generator) * 0.1
    return pack_experts(gate_up, down, bits=bits, group_size=group_size)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts", "k", "group_size"),
    [(1, 96, 48, 8, 2, 32), (2, 64, 40, 4, 1, 32), (7, 130, 96, 6, 6, 64), (33, 256, 130, 16, 4, 128)],
)
def test_matches_float64(
    isa: str,
    threads: int,
    bits: int,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    k: int,
    group_size: int,
    generator: torch.Generator,
) -> None:
    packed = layer(generator, experts, hidden, inner, bits, group_size)
    x = torch.randn(tokens, hidden, generator=generator)
    chosen, weights = routed(generator, tokens, experts, k)
    y = moe(x, chosen, weights, packed)
    torch.set_num_threads(1)  # hundreds of small operators follow; the fixture puts it back
    exact, rounded = exact_moe(x, chosen, weights, packed), quantized_moe(x, chosen, weights, packed)
    spread = exact.std()
    # The middle activations are rounded too: two roundings of 0.6 %, not independent of the SwiGLU in between.
    assert (y - exact).square().mean().sqrt() < 0.025 * spread
    # Against the same roundings: float32 order, but where a middle value lies on a rounding boundary one int8 step moves.
    assert (y - rounded).abs().median() < 2e-6 * spread
    assert (y - rounded).abs().max() < 0.02 * spread


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("tokens", "inner"), [(1, 136), (3, 40), (8, 256)])
def test_a_shared_expert_is_added_for_every_token(
    isa: str, threads: int, bits: int, tokens: int, inner: int, generator: torch.Generator
) -> None:
    packed, alone = layer(generator, 6, 160, inner, bits), layer(generator, 1, 160, inner, bits)
    x = torch.randn(tokens, 160, generator=generator)
    chosen, weights = routed(generator, tokens, 6, 2)
    got = run_moe(x, chosen, weights, packed, [alone.gate(0), alone.up(0), alone.down(0)])
    every = torch.zeros(tokens, 1, dtype=torch.int64)
    wanted = moe(x, chosen, weights, packed) + moe(x, every, torch.ones(tokens, 1), alone)
    # The same products; float32 sums in another order.
    assert (got - wanted).abs().max() < 2e-6 * wanted.abs().max()


def test_a_shared_expert_of_other_kinds_is_refused(generator: torch.Generator) -> None:
    packed, alone = layer(generator, 2, 64, 32, 4), layer(generator, 1, 64, 32, 4)
    shared = [alone.gate(0), alone.up(0), alone.down(0)]
    x = torch.randn(9, 64, generator=generator)
    chosen, weights = routed(generator, 9, 2, 1)
    with pytest.raises(ValueError, match="moe: a shared expert is for at most 8 tokens, got 9"):
        run_moe(x, chosen, weights, packed, shared)
    with pytest.raises(ValueError, match="moe: a shared expert is described by 6 addresses"):
        run_moe(x[:1], chosen[:1], weights[:1], packed, shared[:2])


def test_one_expert_is_two_linears(isa: str, generator: torch.Generator) -> None:
    packed = layer(generator, 3, 64, 32, 8)
    x = torch.randn(5, 64, generator=generator)
    chosen = torch.full((5, 1), 1)
    y = moe(x, chosen, torch.ones(5, 1), packed)
    hidden = functional.silu(linear(x, packed.gate(1))) * linear(x, packed.up(1))
    assert (y - linear(hidden, packed.down(1))).abs().max() < 0.02 * y.std()


@pytest.mark.parametrize("bits", [4, 8])
def test_same_bits_twice_for_any_threads_and_any_batch(
    isa: str, bits: int, generator: torch.Generator
) -> None:
    packed = layer(generator, 8, 256, 200, bits)  # 80 KB an expert: threads, but for a token alone
    x = torch.randn(21, 256, generator=generator)
    chosen, weights = routed(generator, 21, 8, 3)
    torch.set_num_threads(1)
    whole = moe(x, chosen, weights, packed)
    torch.set_num_threads(2)
    for _ in range(5):
        assert torch.equal(moe(x, chosen, weights, packed), whole)
    for t in range(0, 21, 5):
        assert torch.equal(moe(x[t : t + 1], chosen[t : t + 1], weights[t : t + 1], packed), whole[t : t + 1])


@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_in_and_out(isa: str, bits: int, generator: torch.Generator) -> None:
    packed = layer(generator, 4, 64, 32, bits)
    x = torch.randn(6, 64, generator=generator).bfloat16()
    chosen, weights = routed(generator, 6, 4, 2)
    weights = weights.bfloat16()
    assert torch.equal(
        moe(x, chosen, weights, packed), moe(x.float(), chosen, weights.float(), packed).bfloat16()
    )


def test_an_expert_chosen_twice_counts_twice(isa: str, generator: torch.Generator) -> None:
    packed = layer(generator, 4, 64, 32, 8)
    x = torch.randn(1, 64, generator=generator)
    twice = moe(x, torch.tensor([[2, 2]]), torch.tensor([[0.25, 0.5]]), packed)
    once = moe(x, torch.tensor([[2]]), torch.tensor([[0.75]]), packed)
    assert (twice - once).abs().max() < 1e-5 * once.std()


def test_no_tokens(generator: torch.Generator) -> None:
    packed = layer(generator, 4, 64, 32, 4)
    out = moe(torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), packed)
    assert out.shape == (0, 64)


def test_packing_expert_by_expert_is_packing_all(generator: torch.Generator) -> None:
    gate_up, down = torch.randn(3, 80, 64, generator=generator), torch.randn(3, 64, 40, generator=generator)
    whole = pack_experts(gate_up, down, bits=4)
    parts = PackedExperts.empty(3, 64, 40, bits=4)
    for e in range(3):
        pack_into(gate_up[e, :40], parts.gate(e))
        pack_into(gate_up[e, 40:], parts.up(e))
        pack_into(down[e], parts.down(e))
    for name in ("gate_up_data", "gate_up_scales", "down_data", "down_scales"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert whole.nbytes == sum(getattr(whole, n).nbytes for n in ("gate_up_data", "gate_up_scales")) + sum(
        getattr(whole, n).nbytes for n in ("down_data", "down_scales")
    )


def test_refusals_in_words(generator: torch.Generator) -> None:
    packed = layer(generator, 4, 64, 32, 4)
    x = torch.randn(2, 64, generator=generator)
    chosen, weights = routed(generator, 2, 4, 2)
    with pytest.raises(ValueError, match=r"moe: expert 4 of token 1 is outside 0 .. 3"):
        moe(x, torch.tensor([[0, 1], [4, 1]]), weights, packed)
    with pytest.raises(ValueError, match="expert -1 of token 0"):
        moe(x, torch.tensor([[-1, 1], [3, 1]]), weights, packed)
    with pytest.raises(TypeError, match="moe: experts must be torch.int64, got torch.int32"):
        moe(x, chosen.int(), weights, packed)
    with pytest.raises(ValueError, match=r"moe: weights must have shape \(2, 2\), got \(2, 1\)"):
        moe(x, chosen, weights[:, :1], packed)
    with pytest.raises(ValueError, match=r"moe: x must have shape \(any, 64\), got \(2, 32\)"):
        moe(x[:, :32], chosen, weights, packed)
    with pytest.raises(ValueError, match="moe: x must be contiguous"):
        moe(torch.randn(64, 2).T, chosen, weights, packed)
    with pytest.raises(TypeError, match="moe: x must be float32 or bfloat16, got torch.float16"):
        moe(x.half(), chosen, weights, packed)
    with pytest.raises(ValueError, match=r"gate_up must have shape \(4, 64, 64\), got \(4, 63, 64\)"):
        pack_experts(torch.randn(4, 63, 64), torch.randn(4, 64, 32), bits=4)
