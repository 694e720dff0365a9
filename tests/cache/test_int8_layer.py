"""The int8 cache layer as transformers uses caches: growth, cropping, beams, masks, messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from optimizations.cache.int8_layer import ROOM, Int8Cache, Int8Layer


def states(batch: int, tokens: int, seed: int, heads: int = 2, dim: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn((batch, heads, tokens, dim), generator=generator),
        torch.randn((batch, heads, tokens, dim), generator=generator),
    )


def filled(batch: int = 2, tokens: int = 50, seed: int = 0) -> Int8Layer:
    layer = Int8Layer()
    layer.update(*states(batch, tokens, seed))
    return layer


def same(a: Int8Layer, b: Int8Layer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.dequantized(), b.dequantized(), strict=True))


def pieces(total: int) -> Iterator[slice]:
    """One by one over the first blocks, then in uneven steps."""
    at = 0
    for size in [1] * 40 + [7, 16, 1, 33, 64, 100] * 10:
        yield slice(at, min(at + size, total))
        at += size
        if at >= total:
            return


def test_growing_token_by_token_is_the_same_as_at_once() -> None:
    keys, values = states(2, 400, 1)
    grown, at_once = Int8Layer(), Int8Layer()
    capacities = set()
    for piece in pieces(400):
        returned = grown.update(keys[:, :, piece], values[:, :, piece])
        assert returned == (grown, grown)
        capacities.add(grown.capacity)
    at_once.update(keys, values)
    assert grown.get_seq_length() == at_once.get_seq_length() == 400
    assert same(grown, at_once)
    assert len(capacities) < 12, "growth must be geometric, not a copy per token"


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 300, 2000])
def test_little_memory_is_unused(tokens: int) -> None:
    layer = Int8Layer()
    keys, values = states(1, 1, 2)
    for _ in range(tokens):
        layer.update(keys, values)
    assert layer.length <= layer.capacity <= max(1.25 * tokens + 16, tokens + ROOM + 16)
    held = sum(t.nbytes for store in layer.stores for t in (store.codes, store.scales))
    assert held == layer.capacity * 2 * 2 * (32 + 4)  # tensors, heads; codes and one float32 scale


def test_cropping_forgets_the_last_tokens_for_good() -> None:
    layer, other = filled(tokens=50), filled(tokens=50)
    layer.crop(-13)
    assert layer.get_seq_length() == 37
    assert layer.get_mask_sizes(3) == (40, 0)
    more = states(2, 30, 9)
    layer.update(*more)
    straight = Int8Layer()
    first = states(2, 50, 0)
    straight.update(*(torch.cat((old[:, :, :37], new), 2) for old, new in zip(first, more, strict=True)))
    assert same(layer, straight)
    other.crop(0)
    assert other.get_seq_length() == 50
    other.crop(-1000)
    assert other.get_seq_length() == 0
    with pytest.raises(ValueError, match="crop takes minus the number of tokens to drop, got 5"):
        layer.crop(5)


def test_rows_are_reordered_selected_and_repeated() -> None:
    layer = filled(batch=3)
    before = layer.dequantized()
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = Int8Cache([filled(batch=3)])
        change(cache)
        after = cache.layers[0].dequantized()
        assert all(torch.equal(x, y[rows]) for x, y in zip(after, before, strict=True))
        new = states(len(rows), 4, 3)
        cache.layers[0].update(*new)
        assert cache.get_seq_length() == 54


def test_an_empty_layer_takes_every_call() -> None:
    layer = Int8Layer()
    layer.crop(-3)
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(3)
    layer.reset()
    assert (layer.get_seq_length(), layer.get_max_length(), layer.capacity) == (0, -1, 0)


def test_reset_starts_afresh_even_with_another_batch() -> None:
    layer = filled(batch=2)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert not layer.stores
    layer.update(*states(5, 7, 4))
    fresh = Int8Layer()
    fresh.update(*states(5, 7, 4))
    assert same(layer, fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_half_a_step(dtype: torch.dtype) -> None:
    keys, values = (t.to(dtype) for t in states(2, 33, 5))
    layer = Int8Layer()
    layer.update(keys, values)
    for original, kept in zip((keys, values), layer.dequantized(torch.float64), strict=True):
        step = original.double().abs().amax(-1, keepdim=True) / 127
        assert ((kept - original.double()).abs() <= 0.501 * step).all()


def test_equalized_channels_take_outliers_out_of_the_step() -> None:
    """A channel 30 times the others ruins the step of all; divided by its size first, it does not."""
    channel = torch.ones(64)
    channel[[3, 35]] = 30.0
    channel = channel / channel.max()
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn((1, 2, 200, 64), generator=generator) * channel
    q = torch.randn((1, 2, 1, 64), generator=generator)
    errors = []
    for scale in (None, channel):
        layer = Int8Layer(key_channel=scale)
        layer.update(keys, keys)
        error = (layer.dequantized(torch.float64)[0] - keys.double()) @ q.double().transpose(-1, -2)
        errors.append(error.pow(2).mean().sqrt().item())
    assert errors[1] < errors[0] / 3


def test_other_readers_are_told_what_this_is() -> None:
    layer = filled()
    with pytest.raises(
        AttributeError, match="an int8 cache layer is not a tensor and has no 'shape'.*kv_int8"
    ):
        _ = layer.shape
    with pytest.raises(TypeError, match="holds codes, not key and value tensors"):
        iter(Int8Cache([layer]))
    with pytest.raises(NotImplementedError, match="lies in host memory already"):
        layer.offload()


def test_attention_reads_what_was_stored(prompts: Callable[..., object]) -> None:
    keys, values = states(2, 70, 6)
    layer = Int8Layer()
    layer.update(keys, values)
    q = torch.randn((2, 6, 1, 32), generator=torch.Generator().manual_seed(2))
    got = layer.attend(q, 0.3, None, False).double()
    k, v = (t.repeat_interleave(3, 1) for t in layer.dequantized(torch.float64))
    wanted = torch.softmax(0.3 * q.double() @ k.transpose(-1, -2), -1) @ v
    torch.testing.assert_close(got, wanted.transpose(1, 2), rtol=1e-3, atol=1e-3)
