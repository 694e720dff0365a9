"""The int8 cache and its attention on every instruction set, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimizations.native import attention_reference as reference
from optimizations.native.attention import Store, append, attend, new_store

DTYPES = [torch.float32, torch.bfloat16]
# Relative to the largest value: queries and probabilities of 15 bits; bfloat16 rounds the output to 2^-8 besides.
BOUND = {torch.float32: 1e-3, torch.bfloat16: 5e-3}
# batch, kv heads, query heads per kv head, d of keys, d of values, tokens, queries, equalized
CASES = [
    (1, 2, 4, 64, 64, 5, 1, False),
    (2, 2, 3, 64, 64, 77, 1, True),
    (1, 2, 2, 128, 128, 130, 130, True),
    (2, 1, 20, 512, 512, 300, 2, True),
    (1, 4, 9, 36, 20, 1000, 3, False),
    (1, 1, 1, 4, 8, 1, 1, False),
    (3, 2, 5, 64, 64, 64, 7, False),
]


def filled(x: Tensor, channel: Tensor | None = None, extra: int = 20) -> Store:
    """A store holding x [batch, heads, tokens, d], with scales of unused tokens that would show if they were used."""
    batch, heads, tokens, dim = x.shape
    store = new_store(batch, heads, (tokens + extra + 15) // 16 * 16, dim, channel)
    store.codes.random_(0, 256)
    store.scales.fill_(100.0)
    append(store, x, 0)
    return store


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def exact(q: Tensor, keys: Store, values: Store, tokens: int, scaling: float, **options: object) -> Tensor:
    wide = [reference.dequantize(store, tokens, torch.float64) for store in (keys, values)]
    return reference.attend(q.double(), *wide, scaling, **options)  # type: ignore[arg-type]


def assert_near(got: Tensor, wanted: Tensor) -> None:
    scale = max(1.0, wanted.abs().max().item())
    assert torch.isfinite(got).all()
    assert (got.double() - wanted).abs().max().item() <= BOUND[got.dtype] * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [4, 20, 64, 100, 128, 512, 1024])
@pytest.mark.parametrize("equalized", [False, True])
def test_codes_are_within_half_a_step(
    isa: str, dim: int, dtype: torch.dtype, equalized: bool, generator: torch.Generator
) -> None:
    x = normal((2, 3, 21, dim), dtype, generator)
    channel = torch.rand(dim, generator=generator) + 0.1 if equalized else None
    store = filled(x, channel)
    step = store.scales[:, :, :21, None].double() * (1.0 if channel is None else channel.double())
    error = (reference.dequantize(store, 21, torch.float64) - x.double()).abs()
    assert (error <= 0.501 * step).all()
    largest = (x.double() if channel is None else x.double() / channel.double()).abs().amax(-1)
    torch.testing.assert_close(store.scales[:, :, :21].double(), largest / 127, rtol=1e-6, atol=0)


def test_a_token_of_zeros_stays_zero(isa: str) -> None:
    store = filled(torch.zeros(1, 1, 3, 8))
    assert reference.dequantize(store, 3).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_by_token_is_the_same_as_at_once(
    isa: str, threads: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Over block boundaries, from strided memory, and like the plain torch version."""
    x = normal((2, 45, 3, 24), dtype, generator).transpose(1, 2)
    at_once, pieces, plain = filled(x), new_store(2, 3, 64, 24), new_store(2, 3, 64, 24)
    start = 0
    for size in (1, 1, 14, 16, 3, 10):
        append(pieces, x[:, :, start : start + size], start)
        start += size
    reference.append(plain, x, 0)
    assert torch.equal(reference.dequantize(at_once, 45), reference.dequantize(pieces, 45))
    steps = (reference.dequantize(at_once, 45) - reference.dequantize(plain, 45)).abs()
    assert (steps <= 1.001 * plain.scales[:, :, :45, None]).all()
    assert (steps > 1e-6).float().mean() < 1e-3  # ties that round the other way


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_attention_matches_float64_over_the_same_codes(
    isa: str, case: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    batch, kv_heads, group, d_key, d_value, tokens, queries, equalized = case
    channels = [torch.rand(d, generator=generator) + 0.2 if equalized else None for d in (d_key, d_value)]
    keys = filled(normal((batch, kv_heads, tokens, d_key), dtype, generator), channels[0])
    values = filled(normal((batch, kv_heads, tokens, d_value), dtype, generator), channels[1])
    q = normal((batch, kv_heads * group, queries, d_key), dtype, generator) * 3
    scaling = d_key**-0.5
    for causal in (False, True):
        got = attend(q, keys, values, tokens, scaling, causal=causal)
        assert got.shape == (batch, queries, kv_heads * group, d_value)
        assert_near(got, exact(q, keys, values, tokens, scaling, causal=causal))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 4, 90), (1, 1, 4, 90), (2, 6, 4, 90), (1, 6, 1, 90), (2, 1, 4, 95)])
def test_masks_of_every_kind_are_honoured(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    keys = filled(normal((2, 2, 90, 32), dtype, generator))
    values = filled(normal((2, 2, 90, 32), dtype, generator))
    q = normal((2, 6, 4, 32), dtype, generator)
    seen = torch.rand(shape, generator=generator) > 0.4
    seen[..., 7] = True
    added = torch.where(seen, torch.randn(shape, generator=generator), torch.finfo(torch.bfloat16).min)
    minus = torch.where(seen, 0.0, float("-inf"))
    for mask in (seen, added, added.bfloat16(), minus, seen.transpose(-1, -2).contiguous().transpose(-1, -2)):
        wide = mask.expand(-1, -1, 4, -1)
        wanted = exact(q, keys, values, 90, 0.2, mask=wide)
        assert_near(attend(q, keys, values, 90, 0.2, mask), wanted)


def test_a_query_that_sees_nothing_gives_zeros(isa: str, generator: torch.Generator) -> None:
    store = filled(normal((1, 1, 130, 16), torch.float32, generator))
    q = normal((1, 2, 3, 16), torch.float32, generator)
    mask = torch.ones(1, 1, 3, 130, dtype=torch.bool)
    mask[:, :, 1] = False
    mask[:, :, 2, :100] = False
    out = attend(q, store, store, 130, 0.25, mask)
    assert out[:, 1].eq(0).all()
    assert_near(out, exact(q, store, store, 130, 0.25, mask=mask))


def test_hidden_tokens_do_not_matter(isa: str, generator: torch.Generator) -> None:
    """Padding on the left by any number of tokens leaves the result, up to the rounding of probabilities."""
    x, y = (normal((1, 2, 100, 32), torch.float32, generator) for _ in range(2))
    q = normal((1, 4, 1, 32), torch.float32, generator)
    alone = attend(q, filled(x), filled(y), 100, 0.2)
    for padding in (1, 15, 16, 64, 70):
        noise = normal((1, 2, padding, 32), torch.float32, generator) * 50
        mask = torch.arange(100 + padding).ge(padding)[None, None, None]
        padded = [filled(torch.cat((noise, z), 2)) for z in (x, y)]
        got = attend(q, *padded, 100 + padding, 0.2, mask)
        torch.testing.assert_close(got, alone, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 200, 2000])
def test_keys_of_two_parts_and_latents_as_values(
    isa: str, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    channel = torch.rand(128, generator=generator) + 0.2
    latents = filled(normal((2, 1, tokens, 128), dtype, generator), channel)
    turned = filled(normal((2, 1, tokens, 32), dtype, generator) * 4)
    q, q_turned = (normal((2, 5, 3, d), dtype, generator) for d in (128, 32))
    got = attend(q, latents, latents, tokens, 0.1, None, True, q_turned, turned)
    wide = [reference.dequantize(store, tokens, torch.float64) for store in (latents, turned)]
    both = torch.cat((q, q_turned), -1).double()
    assert_near(got, reference.attend(both, torch.cat(wide, -1), wide[0], 0.1, causal=True))


@pytest.mark.parametrize("tokens", [63, 127, 128, 200, 260, 600])
def test_a_short_history_of_wide_heads_is_shared_by_threads(
    isa: str, tokens: int, generator: torch.Generator
) -> None:
    """Twenty heads over one latent are work enough for a unit per 64 tokens, and its last may have one token alone."""
    latents = filled(normal((1, 1, tokens, 256), torch.bfloat16, generator))
    turned = filled(normal((1, 1, tokens, 32), torch.bfloat16, generator))
    q, q_turned = (normal((1, 20, 1, d), torch.bfloat16, generator) for d in (256, 32))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(attend(q, latents, latents, tokens, 0.1, None, True, q_turned, turned))
    torch.set_num_threads(before)
    assert torch.equal(*results)
    wide = [reference.dequantize(store, tokens, torch.float64) for store in (latents, turned)]
    both = torch.cat((q, q_turned), -1).double()
    assert_near(results[0], reference.attend(both, torch.cat(wide, -1), wide[0], 0.1, causal=True))


def test_threads_and_repeats_do_not_change_a_bit(isa: str, generator: torch.Generator) -> None:
    """One token over a long history (split) and a prompt (many rows)."""
    keys = filled(normal((1, 2, 1500, 64), torch.bfloat16, generator))
    values = filled(normal((1, 2, 1500, 64), torch.bfloat16, generator))
    before = torch.get_num_threads()
    for queries in (1, 40):
        q = normal((1, 6, queries, 64), torch.bfloat16, generator)
        results = []
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            results.append(attend(q, keys, values, 1500, 0.125, causal=True))
        torch.set_num_threads(before)
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_one_query_of_a_prompt_is_as_alone(isa: str, generator: torch.Generator) -> None:
    """Decoding a token gives what the prompt's last row gives: the cache is all there is."""
    keys = filled(normal((1, 2, 90, 64), torch.float32, generator))
    q = normal((1, 4, 90, 64), torch.float32, generator)
    prompt = attend(q, keys, keys, 90, 0.125, causal=True)
    for at in (0, 40, 89):
        one = attend(q[:, :, at : at + 1], keys, keys, at + 1, 0.125)
        torch.testing.assert_close(prompt[:, at : at + 1], one, rtol=1e-5, atol=1e-5)


def test_wrong_stores_and_tokens_are_named() -> None:
    with pytest.raises(ValueError, match="heads of a multiple of 4 values, at most 1024, got 6"):
        new_store(1, 1, 16, 6)
    with pytest.raises(
        ValueError, match="capacity of an int8 cache must be a positive multiple of 16, got 20"
    ):
        new_store(1, 1, 20, 8)
    store = new_store(1, 2, 32, 8)
    with pytest.raises(ValueError, match=r"x must have shape \(1, 2, any, 8\), got \(1, 3, 4, 8\)"):
        append(store, torch.zeros(1, 3, 4, 8), 0)
    with pytest.raises(TypeError, match="x must be float32 or bfloat16, got torch.float16"):
        append(store, torch.zeros(1, 2, 4, 8, dtype=torch.float16), 0)
    with pytest.raises(ValueError, match="4 tokens at 30 do not fit into a capacity of 32"):
        append(store, torch.zeros(1, 2, 4, 8), 30)
    with pytest.raises(ValueError, match="values of a head must be dense"):
        append(store, torch.zeros(1, 2, 8, 4).transpose(2, 3), 0)


def test_wrong_queries_and_masks_are_named() -> None:
    store = filled(torch.zeros(1, 2, 20, 8))
    q = torch.zeros(1, 4, 3, 8)
    with pytest.raises(TypeError, match="q must be float32 or bfloat16, got torch.float64"):
        attend(q.double(), store, store, 20, 1.0)
    with pytest.raises(
        ValueError, match=r"q must have shape \(1, a multiple of 2, any, 8\), got \(1, 3, 3, 8\)"
    ):
        attend(torch.zeros(1, 3, 3, 8), store, store, 20, 1.0)
    with pytest.raises(ValueError, match="length must be within the capacity"):
        attend(q, store, store, 200, 1.0)
    with pytest.raises(ValueError, match="causal attention needs the queries' own tokens cached"):
        attend(q, store, store, 2, 1.0, causal=True)
    with pytest.raises(
        ValueError, match=r"mask must have shape \(1 or 1, 1 or 4, 3, at least 20\), got \(1, 1, 3, 19\)"
    ):
        attend(q, store, store, 20, 1.0, torch.ones(1, 1, 3, 19, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool or floating point, got torch.int64"):
        attend(q, store, store, 20, 1.0, torch.ones(1, 1, 3, 20, dtype=torch.int64))


def test_torch_sees_correct_operators(generator: torch.Generator) -> None:
    store = filled(normal((1, 1, 20, 8), torch.float32, generator))
    q = normal((1, 2, 3, 8), torch.float32, generator)
    none = (None, None, None, None)
    arguments = (q, *store, *none, *store, None, 20, 0.3, True)
    torch.library.opcheck(torch.ops.pio.int8_kv_attention.default, arguments)
    append_arguments = (q.transpose(1, 2)[:, :1], store.codes, store.scales, None, 20)
    torch.library.opcheck(torch.ops.pio.int8_kv_append.default, append_arguments)


def test_a_gradient_is_refused_in_words(generator: torch.Generator) -> None:
    store = filled(normal((1, 1, 20, 8), torch.float32, generator))
    q = normal((1, 2, 3, 8), torch.float32, generator).requires_grad_()
    out = attend(q, store, store, 20, 0.3)
    with pytest.raises(RuntimeError, match="kv_int8 has no gradient.*use_cache=False"):
        out.sum().backward()
