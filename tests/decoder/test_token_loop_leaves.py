"""When a generation, or the ends of the model, are left to transformers' own code."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from two_loops import PACKED, passes

from optimizations.runner import Runner
from optimizations.session import optimize

Tiny = Callable[..., Runner]
Prompts = Callable[..., dict[str, Tensor]]
DENSE = "qwen3_4b_instruct_2507"


def watched(name: str, runner: Runner) -> tuple[dict[str, Any], Callable[[], None]]:
    """Options of a generation that transformers' loop has to run, and how to take back what they need."""
    model = runner.model
    nothing = lambda: None
    if name == "foreign cache":
        return {"past_key_values": DynamicCache(config=runner.text_config)}, nothing
    if name == "no cache":
        return {"use_cache": False}, nothing
    if name == "hidden states":
        return {"output_hidden_states": True, "return_dict_in_generate": True}, nothing
    if name == "replaced forward":
        model.__dict__["forward"] = model.forward
        return {}, lambda: model.__dict__.pop("forward")
    if name == "global hook":
        return {}, nn.modules.module.register_module_forward_hook(lambda *_: None).remove
    if name == "replaced preparation":
        model.__dict__["prepare_inputs_for_generation"] = model.prepare_inputs_for_generation
        return {}, lambda: model.__dict__.pop("prepare_inputs_for_generation")
    if name == "wrapped decoder":
        decoder = model.get_decoder()
        inner = decoder.__dict__["forward"]
        decoder.__dict__["forward"] = lambda *args, **kwargs: inner(*args, **kwargs)
        return {}, lambda: decoder.__dict__.update(forward=inner)
    if name == "autocast":
        scope = torch.autocast("cpu", torch.bfloat16)
        scope.__enter__()
        return {}, lambda: scope.__exit__(None, None, None)
    module = {"hook before the decoder": model.get_decoder(), "hook before the model": model}[name]
    return {}, module.register_forward_pre_hook(lambda *_: None).remove


REASONS = {
    "foreign cache": "a DynamicCache was passed as past_key_values",
    "no cache": "there is no cache",
    "hidden states": "attention maps or hidden states are wanted",
    "replaced forward": "the forward of the model was replaced",
    "wrapped decoder": "the forward of the model was replaced",
    "replaced preparation": "the preparation of its inputs was replaced",
    "autocast": "autocast chooses dtypes",
    "global hook": "a hook waits for passes through the model",
    "hook before the decoder": "a hook waits for passes through the model",
    "hook before the model": "a hook waits for passes through the model",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_needs_whole_passes_is_left_to_transformers_loop(
    name: str, tiny: Tiny, prompts: Prompts, caplog: pytest.LogCaptureFixture
) -> None:
    runner = tiny(DENSE)
    with optimize(runner, *PACKED), caplog.at_level(logging.INFO):
        wanted = runner.generate(**prompts(1, 8), max_new_tokens=5, do_sample=False)
        with passes(runner.model) as prepared:
            options, undo = watched(name, runner)
            try:
                got = runner.generate(**prompts(1, 8), max_new_tokens=5, do_sample=False, **options)
            finally:
                undo()
    assert len(prepared) == 5
    assert torch.equal(getattr(got, "sequences", got), wanted) or name == "autocast"
    [said] = [one.getMessage() for one in caplog.records if "leaves the loop" in one.getMessage()]
    assert REASONS[name] in said


@pytest.mark.parametrize("which", ["get_input_embeddings", "get_output_embeddings"])
def test_hooks_of_table_and_output_layer_see_every_token(which: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, seen = tiny(DENSE), []
    with optimize(runner, *PACKED):
        wanted = runner.generate(**prompts(2, 8), max_new_tokens=6, do_sample=False)
        hook = getattr(runner.model, which)().register_forward_hook(
            lambda module, args, out: seen.append(out.shape[1])
        )
        try:
            got = runner.generate(**prompts(2, 8), max_new_tokens=6, do_sample=False)
        finally:
            hook.remove()
    assert torch.equal(got, wanted)
    assert seen[1:] == [1] * 5


def test_the_class_keeps_its_name_and_comes_back(tiny: Tiny) -> None:
    model = tiny(DENSE).model
    before = type(model)
    with optimize(tiny(DENSE), "native_decoder"):
        during = type(model)
        assert during is not before
        assert isinstance(model, before)
        assert repr(during) == repr(before)
    assert type(model) is before


def test_an_output_layer_that_was_replaced_is_called(tiny: Tiny, prompts: Prompts) -> None:
    runner, options = tiny(DENSE), {"max_new_tokens": 6, "do_sample": False}
    model = runner.model
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    other = nn.Linear(head.in_features, head.out_features, bias=False)
    fresh = nn.Embedding(table.num_embeddings, table.embedding_dim)
    for change, back in (
        (lambda: model.set_output_embeddings(other), lambda: model.set_output_embeddings(head)),
        (lambda: model.set_input_embeddings(fresh), lambda: model.set_input_embeddings(table)),
    ):
        try:
            with optimize(runner, "native_decoder"):
                change()
                got = runner.generate(**prompts(2, 9), **options)
            wanted = runner.generate(**prompts(2, 9), **options)
        finally:
            back()
        assert torch.equal(got, wanted)
