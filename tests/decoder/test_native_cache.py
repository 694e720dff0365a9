"""The native cache as transformers' caches behave: growth, crop, reordering, reset, copies, and errors in words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from optimizations.decoder.cache import NativeCache, NativeLayer
from optimizations.runner import Runner
from optimizations.session import optimize

Tiny = Callable[..., Runner]
Prompts = Callable[..., dict[str, Tensor]]
DENSE, LATENT = "qwen3_4b_instruct_2507", "glm_4_7_flash"


def random(rows: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 2, tokens)
    return torch.randn((*shape, 8), generator=generator), torch.randn((*shape, 4), generator=generator)


def both(pieces: list[int], rows: int = 2) -> tuple[NativeLayer, Any]:
    """The native layer and transformers' own after the same updates."""
    native, stock = NativeCache(1), DynamicCache()
    for seed, tokens in enumerate(pieces):
        states = random(rows, tokens, seed)
        native.update(*states, 0)
        stock.update(*states, 0)
    return native.layers[0], stock.layers[0]


def same(native: NativeLayer, stock: Any) -> bool:
    keys, values = native.keys[:, :, : native.length], native.values[:, :, : native.length]
    return torch.equal(keys, stock.keys) and torch.equal(values, stock.values)


def test_growth_keeps_what_was_there_and_is_by_a_quarter() -> None:
    native, stock = both([5] + [1] * 200)
    assert same(native, stock)
    assert native.get_seq_length() == stock.get_seq_length() == 205
    assert native.get_mask_sizes(3) == stock.get_mask_sizes(3)
    assert native.capacity % 16 == 0
    assert 205 <= native.capacity <= 1.25 * 205 + 16
    assert native.version == 1 + 4, "80, 112, 144, 192, 240 tokens: moved four times after it was made"


def operations() -> list[tuple[str, Callable[[Any], None]]]:
    return [
        ("crop", lambda layer: layer.crop(-3)),
        ("crop to nothing", lambda layer: layer.crop(-7)),
        ("reorder", lambda layer: layer.reorder_cache(torch.tensor([1, 0]))),
        ("repeat", lambda layer: layer.batch_repeat_interleave(3)),
        ("select", lambda layer: layer.batch_select_indices(torch.tensor([1]))),
        ("select by mask", lambda layer: layer.batch_select_indices(torch.tensor([False, True]))),
    ]


@pytest.mark.parametrize(("name", "change"), operations(), ids=[name for name, _ in operations()])
def test_changes_are_those_of_transformers(name: str, change: Callable[[Any], None]) -> None:
    native, stock = both([4, 3])
    change(native)
    change(stock)
    assert native.get_seq_length() == stock.get_seq_length()
    assert stock.get_seq_length() == 0 or same(native, stock)
    rows = stock.keys.shape[0]
    states = random(rows, 2, 9)
    native.update(*states)
    stock.update(*states)
    assert same(native, stock)


def test_reset_gives_the_memory_back() -> None:
    native, _ = both([4])
    native.reset()
    assert (native.length, native.capacity, native.batch, native.keys) == (0, 0, 0, None)
    native.update(*random(3, 2))
    assert native.batch == 3


def test_changes_of_an_empty_layer_do_nothing() -> None:
    layer = NativeLayer()
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.crop(-1)
    layer.offload()
    assert layer.get_seq_length() == 0
    assert layer.get_max_length() == -1


def test_crop_wants_a_negative_number() -> None:
    with pytest.raises(ValueError, match="minus the number of tokens to drop, got 3"):
        NativeLayer().crop(3)


def test_memory_made_in_inference_mode_can_be_written_outside() -> None:
    cache = NativeCache(1)
    with torch.inference_mode():
        cache.update(*random(1, 3), 0)
    with torch.no_grad():
        keys, _ = cache.update(*random(1, 2, 1), 0)
    assert torch.equal(keys, torch.cat([random(1, 3)[0], random(1, 2, 1)[0]], 2))


@pytest.mark.parametrize("spec", ["native_decoder", "kv_int8+native_decoder"])
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(
    family: str, spec: str, tiny: Tiny, prompts: Prompts
) -> None:
    runner, inputs = tiny(family), prompts(2, 20)
    ids = inputs["input_ids"]
    with optimize(runner, spec):
        cache = runner.forward(input_ids=ids[:, :15], use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        runner.forward(input_ids=ids[:, :4], past_key_values=cache)
        cache.crop(-4)
        got = runner.forward(input_ids=ids[:, 15:], past_key_values=cache).logits
        wanted = runner.forward(input_ids=ids[:, 15:], past_key_values=other).logits
        assert runner.model.get_decoder().forward.fallbacks == set()
    assert cache.get_seq_length() == other.get_seq_length() == 20
    assert torch.equal(got, wanted)


def test_reordered_rows_go_on_with_their_history(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, ids = tiny(family), prompts(3, 20)["input_ids"]
    order = torch.tensor([2, 0, 0])
    with optimize(runner, "native_decoder"):
        cache = runner.forward(input_ids=ids[:, :15], use_cache=True).past_key_values
        cache.reorder_cache(order)
        got = runner.forward(input_ids=ids[order, 15:], past_key_values=cache).logits
        wanted = runner.forward(input_ids=ids[order]).logits[:, 15:]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_a_cache_of_another_batch_or_model_is_refused_in_words(tiny: Tiny, prompts: Prompts) -> None:
    runner = tiny(DENSE)
    with optimize(tiny(LATENT), "native_decoder"):
        latents = tiny(LATENT).forward(**prompts(1, 5), use_cache=True).past_key_values
    with optimize(runner, "native_decoder"):
        cache = runner.forward(**prompts(2, 5), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="the cache holds 2 rows, the input has 3"):
            runner.forward(input_ids=prompts(3, 5)["input_ids"], past_key_values=cache)
        with pytest.raises(ValueError, match=r"the cache holds 1 heads of 128 values.*the model has 2 of 64"):
            runner.forward(input_ids=prompts(1, 5)["input_ids"], past_key_values=latents)
        assert cache.get_seq_length() == 5


def test_an_attention_mask_of_the_wrong_length_is_refused_in_words(tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(DENSE), prompts(1, 5)
    with optimize(runner, "native_decoder"):
        cache = runner.forward(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 10\).*it has \(1, 5\)"):
            runner.forward(**inputs, past_key_values=cache)
        wrong = torch.ones(1, 1, 4, 10)
        with pytest.raises(ValueError, match=r"\(1, 10\) or \(1, 1, 5, 10\), got \(1, 1, 4, 10\)"):
            runner.forward(input_ids=inputs["input_ids"], attention_mask=wrong, past_key_values=cache)
