"""Attention over a dense cache on every instruction set, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimizations.native import attention_reference as reference
from optimizations.native.dense_attention import attend_dense
from optimizations.native.loader import native

DTYPES = [torch.float32, torch.bfloat16]
# Half a unit in the last place of the output, and what float32 sums and the exponential lose of the largest output.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SUMMING = 4e-6
# batch, kv heads, query heads per kv head, d of keys, d of values, tokens, queries
CASES = [
    (1, 2, 4, 64, 64, 5, 1),
    (2, 2, 3, 64, 64, 77, 1),
    (1, 2, 2, 128, 128, 130, 130),
    (2, 1, 20, 512, 512, 300, 2),
    (1, 4, 9, 35, 21, 1000, 3),
    (1, 1, 1, 1, 1, 1, 1),
    (3, 2, 5, 64, 100, 64, 7),
    (1, 1, 8, 33, 47, 31, 31),
]


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def cached(x: Tensor, extra: int = 9) -> Tensor:
    """x [batch, heads, tokens, d] at the start of a larger cache, whose rest must not be read."""
    batch, heads, tokens, dim = x.shape
    out = torch.full((batch, heads, tokens + extra, dim), torch.nan, dtype=x.dtype)
    out[:, :, :tokens] = x
    return out


def assert_near(got: Tensor, wanted: Tensor) -> None:
    assert torch.isfinite(got).all()
    bound = ROUNDING[got.dtype] * wanted.abs() + SUMMING * max(1.0, wanted.abs().max().item())
    assert ((got.double() - wanted).abs() <= bound).all()


def exact(q: Tensor, keys: Tensor, values: Tensor, scaling: float, **options: object) -> Tensor:
    return reference.attend(q.double(), keys.double(), values.double(), scaling, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(
    isa: str, case: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    batch, kv_heads, group, d_key, d_value, tokens, queries = case
    keys = normal((batch, kv_heads, tokens, d_key), dtype, generator)
    values = normal((batch, kv_heads, tokens, d_value), dtype, generator)
    q = normal((batch, kv_heads * group, queries, d_key), dtype, generator)
    scaling = 2 * d_key**-0.5
    for causal in (False, True):
        got = attend_dense(q, cached(keys), cached(values), tokens, scaling, causal=causal)
        assert got.shape == (batch, queries, kv_heads * group, d_value)
        assert_near(got, exact(q, keys, values, scaling, causal=causal))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 4, 90), (1, 1, 4, 90), (2, 6, 4, 90), (1, 6, 1, 90), (2, 1, 4, 95)])
def test_masks_of_every_kind_are_honoured(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    keys, values = (normal((2, 2, 90, 32), dtype, generator) for _ in range(2))
    q = normal((2, 6, 4, 32), dtype, generator)
    seen = torch.rand(shape, generator=generator) > 0.4
    seen[..., 7] = True
    added = torch.where(seen, torch.randn(shape, generator=generator), torch.finfo(torch.bfloat16).min)
    minus = torch.where(seen, 0.0, float("-inf"))
    for mask in (seen, added, added.bfloat16(), minus, seen.transpose(-1, -2).contiguous().transpose(-1, -2)):
        wanted = exact(q, keys, values, 0.2, mask=mask.expand(-1, -1, 4, -1))
        assert_near(attend_dense(q, keys, values, 90, 0.2, mask), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_left_padding_with_a_causal_prompt(isa: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Rows of a batch with different lengths: a padded row gives what it gives alone."""
    keys, values = (normal((2, 2, 40, 16), dtype, generator) for _ in range(2))
    q = normal((2, 4, 40, 16), dtype, generator)
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1, ..., :13] = False
    got = attend_dense(q, keys, values, 40, 0.3, mask, causal=True)
    assert_near(got[:1], exact(q[:1], keys[:1], values[:1], 0.3, causal=True))
    alone = [t[1:, :, 13:] for t in (q, keys, values)]
    assert_near(got[1:, 13:], exact(*alone, 0.3, causal=True))
    assert got[1:, :13].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "queries"), [(1, 1), (700, 1), (70, 70), (70, 3), (1100, 2)])
def test_keys_of_two_parts_are_one_long_key(
    isa: str, threads: int, tokens: int, queries: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Absorbed MLA: one KV head, values are the latents; the rotary part lies in memory of its own."""
    latent, rotary = (normal((2, 1, tokens, d), dtype, generator) for d in (80, 24))
    q, q_rotary = (normal((2, 5, queries, d), dtype, generator) for d in (80, 24))
    store = cached(latent)
    got = attend_dense(
        q, store, store, tokens, 0.1, causal=True, q_second=q_rotary, second=cached(rotary, 30)
    )
    whole = torch.cat((latent, rotary), -1)
    assert_near(got, exact(torch.cat((q, q_rotary), -1), whole, latent, 0.1, causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [63, 127, 128, 200, 260, 600])
def test_a_short_history_of_wide_heads_is_shared_by_threads(
    isa: str, threads: int, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Twenty heads over one latent are work enough for a unit per 64 tokens, and its last may have one token alone."""
    latent, rotary = (normal((1, 1, tokens, d), dtype, generator) for d in (256, 32))
    q, q_rotary = (normal((1, 20, 1, d), dtype, generator) for d in (256, 32))
    store = cached(latent)
    got = attend_dense(q, store, store, tokens, 0.1, causal=True, q_second=q_rotary, second=cached(rotary))
    whole = torch.cat((latent, rotary), -1)
    assert_near(got, exact(torch.cat((q, q_rotary), -1), whole, latent, 0.1, causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_heads_and_a_shared_second_part(
    isa: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Materialized MLA: keys and values of a head lie side by side as kv_b_proj leaves them, the rotary part is shared."""
    both = normal((1, 50, 3, 24 + 40), dtype, generator).transpose(1, 2)
    keys, values = both[..., :24], both[..., 24:]
    rotary = normal((1, 1, 50, 8), dtype, generator)
    q, q_rotary = (normal((1, 9, 3, d), dtype, generator).transpose(1, 2) for d in (24, 8))
    got = attend_dense(q, keys, values, 50, 0.2, causal=True, q_second=q_rotary, second=rotary)
    whole = torch.cat((keys, rotary.expand(-1, 3, -1, -1)), -1)
    assert_near(got, exact(torch.cat((q, q_rotary), -1), whole, values, 0.2, causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "queries", "tokens"), [(1, 1, 4000), (3, 50, 50), (2, 2, 600), (1, 40, 900), (1, 8, 200)]
)
def test_same_bits_twice_and_for_any_threads(
    isa: str, heads: int, queries: int, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    before = torch.get_num_threads()
    keys, values = (normal((1, heads, tokens, 64), dtype, generator) for _ in range(2))
    q = normal((1, heads * 4, queries, 64), dtype, generator)
    torch.set_num_threads(1)
    alone = attend_dense(q, keys, values, tokens, 0.125, causal=True)
    torch.set_num_threads(2)
    again = [attend_dense(q, keys, values, tokens, 0.125, causal=True) for _ in range(3)]
    torch.set_num_threads(before)
    assert all(torch.equal(alone, other) for other in again)
    assert_near(alone, exact(q, keys, values, 0.125, causal=True))


def test_a_query_that_sees_nothing_gives_zeros(isa: str, generator: torch.Generator) -> None:
    keys = torch.randn((1, 1, 600, 16), generator=generator)
    q = torch.randn((1, 2, 3, 16), generator=generator)
    mask = torch.ones(1, 1, 3, 600, dtype=torch.bool)
    mask[:, :, 1] = False
    got = attend_dense(q, keys, keys, 600, 0.3, mask)
    assert got[:, 1].eq(0).all()
    assert_near(got, exact(q, keys, keys, 0.3, mask=mask))
    assert attend_dense(q, keys, keys, 0, 0.3).eq(0).all()


def test_scores_far_apart_stay_finite(isa: str, generator: torch.Generator) -> None:
    """The largest score comes last and is thousands above the others: everything gathered before shrinks to nothing."""
    keys = torch.randn((1, 1, 300, 32), generator=generator)
    keys[:, :, 299] = 100.0
    q = torch.full((1, 1, 1, 32), 5.0)
    assert_near(attend_dense(q, keys, keys, 300, 1.0), exact(q, keys, keys, 1.0))


@pytest.mark.parametrize(("queries", "group"), [(1, 4), (1, 12), (6, 5), (40, 4)])
def test_probabilities_keep_sixteen_bits(
    isa: str, queries: int, group: int, generator: torch.Generator
) -> None:
    """Where tiles multiply, a probability is the sum of two bf16, within 2^-17 of itself. One bf16 would lose 2^-9.

    Every value comes with its opposite, so the output is a small difference of large sums and its own rounding hides
    nothing; what float32 adds is within 2^-20 of the sum of magnitudes here.
    """
    keys = normal((1, 1, 300, 32), torch.bfloat16, generator)
    half = normal((1, 1, 150, 64), torch.bfloat16, generator)
    values = torch.stack((half, -half), 3).flatten(2, 3)
    q = normal((1, group, queries, 32), torch.bfloat16, generator) * 0.3
    got = attend_dense(q, keys, values, 300, 0.2).double()
    wanted = exact(q, keys, values, 0.2)
    magnitudes = exact(q, keys, values.abs(), 0.2)
    assert ((got - wanted).abs() <= 2.0**-8 * wanted.abs() + (2.0**-17 + 2.0**-20) * magnitudes).all()


def test_wrong_tensors_are_named() -> None:
    keys, q = torch.zeros(1, 2, 20, 8), torch.zeros(1, 4, 3, 8)
    with pytest.raises(TypeError, match="q must be float32 or bfloat16, got torch.float64"):
        attend_dense(q.double(), keys, keys, 20, 1.0)
    with pytest.raises(TypeError, match="kv_attention: keys must be torch.float32, got torch.bfloat16"):
        attend_dense(q, keys.bfloat16(), keys, 20, 1.0)
    with pytest.raises(
        ValueError, match=r"q must have shape \(1, a multiple of 2, any, 8\), got \(1, 3, 3, 8\)"
    ):
        attend_dense(torch.zeros(1, 3, 3, 8), keys, keys, 20, 1.0)
    with pytest.raises(
        ValueError, match=r"values must have shape \(1, 2, at least 21, any\), got \(1, 2, 20, 8\)"
    ):
        attend_dense(q, torch.zeros(1, 2, 21, 8), keys, 21, 1.0)
    with pytest.raises(ValueError, match="values of a head of keys must be dense"):
        attend_dense(q, torch.zeros(1, 2, 8, 20).transpose(2, 3), keys, 20, 1.0)
    with pytest.raises(ValueError, match="values of a head of q must be dense"):
        attend_dense(torch.zeros(1, 4, 8, 3).transpose(2, 3), keys, keys, 20, 1.0)
    with pytest.raises(ValueError, match="causal attention needs the queries' own tokens cached"):
        attend_dense(q, keys, keys, 2, 1.0, causal=True)
    with pytest.raises(TypeError, match="kv_attention: mask must be bool or floating point, got torch.int64"):
        attend_dense(q, keys, keys, 20, 1.0, torch.ones(1, 1, 3, 20, dtype=torch.int64))
    with pytest.raises(ValueError, match="q must be on the CPU, it is on meta"):
        attend_dense(q.to("meta"), keys, keys, 20, 1.0)


def test_bare_numbers_are_refused_in_words() -> None:
    call, memory = native().kv_attention, torch.zeros(64)
    at = memory.data_ptr()
    part, values = [at, 0, 0, 0, at, 0, 0, 4, 4], [at, 0, 0, 4, 4]
    numbers = (1, 1, 1, 1, 1, 1.0, False)
    with pytest.raises(ValueError, match="a key part is described by 9 numbers"):
        call(part[:-1], [], values, [], *numbers, at, 0, 1)
    with pytest.raises(ValueError, match="values are described by 5 numbers"):
        call(part, [], values[:-1], [], *numbers, at, 0, 1)
    with pytest.raises(ValueError, match="a mask is described by 5 numbers"):
        call(part, [], values, [at], *numbers, at, 0, 1)
    with pytest.raises(ValueError, match="a head must have 1 to 4096 values, got 0"):
        call([*part[:-1], 0], [], values, [], *numbers, at, 0, 1)
    with pytest.raises(ValueError, match="keys has no memory"):
        call([*part[:4], 0, *part[5:]], [], values, [], *numbers, at, 0, 1)
    with pytest.raises(ValueError, match="out must start at a multiple of 4 bytes"):
        call(part, [], values, [], *numbers, at + 2, 0, 1)
    with pytest.raises(ValueError, match="counts must be positive"):
        call(part, [], values, [], 1, 0, 1, 1, 1, 1.0, False, at, 0, 1)
