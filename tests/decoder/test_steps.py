"""Single steps of decoding: what they refuse, what they hold, and several threads on one model."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from two_loops import PACKED

from optimizations.decoder.steps import Steps
from optimizations.decoder.token_ids import TokenIds
from optimizations.runner import Runner
from optimizations.session import optimize

Tiny = Callable[..., Runner]
Prompts = Callable[..., dict[str, Tensor]]
DENSE = "qwen3_4b_instruct_2507"


def begun(runner: Runner, inputs: dict[str, Tensor]) -> Steps:
    """The steps after a prompt that was read, and whose cache they keep."""
    cache = runner.generate(
        **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    forward = runner.model.get_decoder().forward
    return Steps(runner.model, forward, {"past_key_values": cache})


@pytest.mark.parametrize("weights", [(), ("weight_int4",)], ids=["dense", "int4"])
def test_tokens_outside_the_vocabulary_are_refused_before_memory_is_read(
    weights: tuple[str, ...], tiny: Tiny, prompts: Prompts
) -> None:
    runner = tiny(DENSE)
    with optimize(runner, *weights, "native_decoder"), torch.inference_mode():
        steps = begun(runner, prompts(1, 6))
        for token in (-1, runner.text_config.vocab_size):
            text = TokenIds(torch.tensor([[token]]))
            for call in (lambda text=text: steps.greedy(text, []), lambda token=token: steps.logits([token])):
                with pytest.raises(ValueError, match=rf"{token} is outside 0 \.\. "):
                    call()
            assert text.length == 1
        assert steps.cache.get_seq_length() == 6


def test_a_step_needs_the_rows_that_the_cache_has(tiny: Tiny, prompts: Prompts) -> None:
    runner = tiny(DENSE)
    with optimize(runner, "native_decoder"), torch.inference_mode():
        steps = begun(runner, prompts(2, 6))
        with pytest.raises(ValueError, match="the cache holds 2 rows, the input has 3"):
            steps.logits([8, 9, 10])


def test_embeddings_of_another_dtype_are_refused(tiny: Tiny, prompts: Prompts) -> None:
    """A hook may give anything; the native call would read memory that is not there."""
    runner = tiny(DENSE)
    with optimize(runner, "native_decoder"), torch.inference_mode():
        cache = begun(runner, prompts(1, 6)).cache
        hook = runner.model.get_input_embeddings().register_forward_hook(
            lambda module, args, out: out.double()
        )
        try:
            steps = Steps(runner.model, runner.model.get_decoder().forward, {"past_key_values": cache})
            with pytest.raises(ValueError, match=r"inputs of shape .* in torch\.float64 on cpu"):
                steps.logits([9])
        finally:
            hook.remove()


def test_undo_lets_go_of_the_cache_at_once(tiny: Tiny, prompts: Prompts) -> None:
    """Without waiting for the collection of cycles: peaks of memory would depend on it."""
    gc.collect()
    gc.disable()
    try:
        with optimize(tiny(DENSE), *PACKED):
            output = tiny(DENSE).generate(
                **prompts(1, 9), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
            )
            layer = weakref.ref(output.past_key_values.layers[0])
            del output
        assert layer() is None
    finally:
        gc.enable()


def test_threads_may_generate_on_one_model(tiny: Tiny, prompts: Prompts) -> None:
    runner, options = tiny(DENSE), {"max_new_tokens": 12, "do_sample": False}
    inputs = [prompts(rows, tokens) for rows, tokens in ((1, 7), (2, 9), (1, 12), (2, 5))]
    before = sys.getswitchinterval()
    with optimize(runner, *PACKED):
        wanted = [runner.generate(**one, **options) for one in inputs]
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                got = list(pool.map(lambda one: runner.generate(**one, **options), inputs * 5))
        finally:
            sys.setswitchinterval(before)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted * 5, strict=True))
