"""generate() over the native decoder: the same tokens, batched, padded, sampled, with beams and with drafts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optimizations.decoder.cache import NativeCache
from optimizations.runner import Runner
from optimizations.session import optimize

Tiny = Callable[..., Runner]
Prompts = Callable[..., dict[str, Tensor]]
DENSE = "qwen3_4b_instruct_2507"


def test_greedy_tokens_are_those_of_transformers(family: str, tiny: Tiny, prompts: Prompts) -> None:
    """Batched and padded."""
    runner, inputs = tiny(family), prompts(3, 19, padding=6)
    wanted = runner.generate(**inputs, max_new_tokens=14, do_sample=False)
    with optimize(runner, "native_decoder"):
        got = runner.generate(**inputs, max_new_tokens=14, do_sample=False, return_dict_in_generate=True)
        assert runner.model.get_decoder().forward.fallbacks == set()
    assert isinstance(got.past_key_values, NativeCache)
    assert torch.equal(got.sequences, wanted)


def test_the_cache_grows_while_generating(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(family), prompts(2, 15, padding=2)
    options = {"max_new_tokens": 24, "do_sample": False}
    with optimize(runner, "native_decoder"):
        wanted = runner.generate(**inputs, **options)
        cache = NativeCache(4, room=0)
        got = runner.generate(**inputs, **options, past_key_values=cache)
    assert torch.equal(got, wanted)
    assert cache.layers[0].version > 1


def test_sampling_draws_what_transformers_draws(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, drawn = tiny(family), []
    for native in (False, True, True):
        torch.manual_seed(11)
        with optimize(runner, *["native_decoder"] * native):
            drawn.append(
                runner.generate(**prompts(2, 12), max_new_tokens=12, do_sample=True, temperature=1.3)
            )
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2])


def test_beams_reorder_the_cache(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(family), prompts(2, 15, padding=4)
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    wanted = runner.generate(**inputs, **options)
    with optimize(runner, "native_decoder"):
        assert torch.equal(runner.generate(**inputs, **options), wanted)
        assert runner.model.get_decoder().forward.fallbacks == set()


@pytest.mark.parametrize("cache", ["", "kv_int8"])
def test_prompt_lookup_gives_the_tokens_of_the_decoder_alone(
    family: str, cache: str, tiny: Tiny, prompts: Prompts
) -> None:
    runner = tiny(family)
    ids = prompts(1, 12)["input_ids"].repeat(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parts = [*[cache] * bool(cache), "native_decoder"]
    with optimize(runner, *parts):
        wanted = runner.generate(**inputs, max_new_tokens=40, do_sample=False)
    with optimize(runner, *parts, "prompt_lookup"):
        got = runner.generate(**inputs, max_new_tokens=40, do_sample=False)
        assert runner.model.get_decoder().forward.fallbacks == set()
    assert torch.equal(got, wanted)


def test_over_an_int8_cache(family: str, tiny: Tiny, prompts: Prompts) -> None:
    """Growth (64 tokens of room) and reordering of an int8 cache under the native decoder, and packed weights."""
    runner, inputs = tiny(family), prompts(2, 5, padding=2)
    with optimize(runner, "weight_int8+kv_int8+native_decoder"):
        greedy = runner.generate(**inputs, max_new_tokens=80, do_sample=False)
        again = runner.generate(**inputs, max_new_tokens=80, do_sample=False)
        beams = runner.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=2)
        assert runner.model.get_decoder().forward.fallbacks == set()
    assert torch.equal(greedy, again)
    assert beams.shape == (2, 11)


def test_continuing_from_a_cache_is_continuing_the_text(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(family), prompts(1, 20)
    with optimize(runner, "native_decoder"):
        first = runner.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        again = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
        options = {"max_new_tokens": 6, "do_sample": False}
        continued = runner.generate(**again, **options, past_key_values=first.past_key_values)
        assert torch.equal(continued, runner.generate(**again, **options))


def test_chunked_prefill(tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(DENSE), prompts(1, 50)
    wanted = runner.generate(**inputs, max_new_tokens=5, do_sample=False)
    with optimize(runner, "native_decoder"):
        got = runner.generate(**inputs, max_new_tokens=5, do_sample=False, prefill_chunk_size=16)
        assert runner.model.get_decoder().forward.fallbacks == set()
    assert torch.equal(got, wanted)


def test_inputs_embeds(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(family), prompts(1, 14)
    embeds = runner.model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = embeds.clone()
    wanted = runner.forward(**inputs).logits
    with optimize(runner, "native_decoder"):
        got = runner.forward(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        assert runner.model.get_decoder().forward.fallbacks == set()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(embeds, given), "the caller's embeddings are read only"
