"""bfloat16 weights in 12 bits: every bit comes back, and products have the bits of those with dense weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizations.native.dense import dense_linear, dense_moe
from optimizations.native.loader import native
from optimizations.native.lossless import (
    Lossless,
    TooManyExponents,
    expand_lossless,
    lossless_linear,
    lossless_moe,
    lossless_shapes,
    most_extras,
    pack_lossless,
    pack_lossless_into,
)

# One panel, one group of panels, its parts; one block of columns, its parts.
SHAPES = [(1, 1), (7, 5), (8, 128), (17, 1), (33, 100), (128, 129), (130, 257), (300, 1030), (1025, 64)]


def normal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Weights of trained size, among them values whose exponents are rare."""
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    rare = torch.randperm(rows * cols, generator=generator)[: rows * -(-cols // 256) // 2]
    scale = 2.0 ** torch.randint(-60, 30, (len(rare),), generator=generator)
    weight.view(-1)[rare] *= scale
    return weight.bfloat16()


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.int16), second.view(torch.int16))


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_every_bit_comes_back(
    isa: str, threads: int, rows: int, cols: int, generator: torch.Generator
) -> None:
    weight = normal(rows, cols, generator)
    packed = pack_lossless(weight)
    assert same_bits(expand_lossless(packed), weight)
    chosen = torch.randint(rows, (3, 5), generator=generator)
    assert same_bits(expand_lossless(packed, chosen), weight[chosen])


@pytest.mark.parametrize("special", [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 3e38])
def test_special_values_come_back(isa: str, special: float, generator: torch.Generator) -> None:
    weight = normal(20, 300, generator)
    weight[3, 7], weight[19, 299], weight[0, 0] = special, special, special
    assert same_bits(expand_lossless(pack_lossless(weight)), weight)


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_rows_of_one_value_fit(isa: str, value: float) -> None:
    weight = torch.full((40, 200), value).bfloat16()
    assert same_bits(expand_lossless(pack_lossless(weight)), weight)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 300),
    exponents=st.lists(st.integers(0, 255), min_size=1, max_size=16, unique=True),
    seed=st.integers(0, 2**31),
)
def test_any_sixteen_exponents_fit(rows: int, cols: int, exponents: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(exponents)[torch.randint(len(exponents), (rows, cols), generator=generator)]
    others = torch.randint(256, (rows, cols), generator=generator)
    bits = (others >> 7 << 15) | (chosen << 7) | (others & 127)
    weight = torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16).view(torch.bfloat16)
    packed = pack_lossless(weight)
    assert same_bits(expand_lossless(packed), weight)
    assert int(packed.index[-4:].sum()) == 0  # nothing is listed


@pytest.mark.parametrize(("rows", "cols"), [*SHAPES, (144, 640)])
@pytest.mark.parametrize("m", [1, 2, 7, 40, 161])
def test_products_have_the_bits_of_dense_ones(
    isa: str, threads: int, rows: int, cols: int, m: int, generator: torch.Generator
) -> None:
    weight, x = normal(rows, cols, generator), torch.randn(m, cols, generator=generator).bfloat16()
    bias = torch.randn(rows, generator=generator).bfloat16()
    packed = pack_lossless(weight)
    assert same_bits(lossless_linear(x, packed), dense_linear(x, weight))
    assert same_bits(lossless_linear(x, packed, bias), dense_linear(x, weight, bias))


@pytest.mark.parametrize("few", [False, True])
def test_both_ways_to_ask_for_memory_give_the_same_bits(
    few: bool, isa: str, generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    before = native().few_ways()
    request.addfinalizer(lambda: native().set_few_ways(before))
    weight, x = normal(300, 1030, generator), torch.randn(1, 1030, generator=generator).bfloat16()
    wanted = dense_linear(x, weight)
    native().set_few_ways(few)
    assert same_bits(lossless_linear(x, pack_lossless(weight)), wanted)
    assert same_bits(dense_linear(x, weight), wanted)


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts", "k"),
    [(1, 96, 48, 8, 2), (7, 130, 97, 6, 6), (90, 33, 20, 3, 2)],
)
def test_mixtures_have_the_bits_of_dense_ones(
    isa: str,
    threads: int,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    k: int,
    generator: torch.Generator,
) -> None:
    gate_up = torch.stack([normal(2 * inner, hidden, generator) for _ in range(experts)])
    down = torch.stack([normal(hidden, inner, generator) for _ in range(experts)])
    packed = []
    for stack in (gate_up, down):
        each = [pack_lossless(weight) for weight in stack]
        packed.append((torch.stack([p.data for p in each]), torch.stack([p.index for p in each])))
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    weights, chosen = torch.rand(tokens, experts, generator=generator).topk(k)
    got = lossless_moe(x, chosen, weights, *packed, inner)
    assert same_bits(got, dense_moe(x, chosen, weights, gate_up, down))


def test_size_is_three_quarters() -> None:
    weight = torch.zeros(2560, 4096, dtype=torch.bfloat16)
    packed = pack_lossless(weight)
    assert packed.nbytes < 0.762 * weight.nbytes
    assert most_extras(2560, 4096) == 2560 * 16


def test_weights_of_other_habits_are_refused_with_their_figures(generator: torch.Generator) -> None:
    bits = torch.randint(-(2**15), 2**15, (64, 512), generator=generator)
    with pytest.raises(
        TooManyExponents,
        match=r"64 x 512 has \d+ values whose exponent is none of the sixteen .* room for 128",
    ):
        pack_lossless(bits.to(torch.int16).view(torch.bfloat16))


def test_equal_weights_are_equal_bytes(generator: torch.Generator) -> None:
    weight = normal(100, 300, generator)
    first = pack_lossless(weight)
    data, index = (torch.full_like(t, 255) for t in (first.data, first.index))
    pack_lossless_into(weight, Lossless(data, index, 100, 300))
    assert torch.equal(first.data, data)
    assert torch.equal(first.index, index)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 140), cols=st.integers(1, 400))
def test_damaged_bytes_are_read_within_their_memory(seed: int, rows: int, cols: int) -> None:
    """Wrong values may come out; under the sanitizers (make sanitize) a read beyond would end the test."""
    generator = torch.Generator().manual_seed(seed)
    shapes = lossless_shapes(rows, cols)
    data, index = (torch.randint(256, shape, dtype=torch.uint8, generator=generator) for shape in shapes)
    damaged = Lossless.wrap(data, index, rows, cols)
    x = torch.ones(1, cols, dtype=torch.bfloat16)
    assert expand_lossless(damaged).shape == (rows, cols)
    assert lossless_linear(x, damaged).shape == (1, rows)
    assert lossless_linear(x.expand(3, -1).contiguous(), damaged).shape == (3, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, p: lossless_linear(x.float(), p), "x must be torch.bfloat16, got torch.float32"),
        (lambda x, p: lossless_linear(x[:, :-1], p), r"x must have shape \(any, 64\), got \(2, 63\)"),
        (lambda x, p: lossless_linear(x, p, x[0]), r"bias must have shape \(16\), got \(64,\)"),
        (lambda x, p: pack_lossless(x.float()), "weight must be torch.bfloat16"),
        (lambda x, p: pack_lossless(x[0]), r"weight must have shape \(any, any\)"),
        (lambda x, p: expand_lossless(p, torch.tensor([16])), "row 16 is outside 0 .. 15"),
        (lambda x, p: expand_lossless(p, torch.tensor([0.5])), "indices must be torch.int64"),
        (lambda x, p: Lossless.wrap(p.data, p.index, 17, 64), "data must have shape"),
        (lambda x, p: Lossless.wrap(p.data, p.index[:-4], 16, 64), "index must have shape"),
        (lambda x, p: lossless_shapes(0, 4), "must have rows and columns, got 0 x 4"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change, message: str, generator: torch.Generator) -> None:
    x, packed = torch.ones(2, 64, dtype=torch.bfloat16), pack_lossless(normal(16, 64, generator))
    with pytest.raises((TypeError, ValueError), match=message):
        change(x, packed)
