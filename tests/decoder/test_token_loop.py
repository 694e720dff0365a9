"""The loop over tokens: what transformers' own loop over the same native decoder gives, and when that one is taken."""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from optimizations.decoder import generation
from optimizations.decoder.steps import Steps
from optimizations.decoder.token_ids import ROOM, TokenIds
from optimizations.runner import Runner
from optimizations.session import optimize

Tiny = Callable[..., Runner]
Prompts = Callable[..., dict[str, Tensor]]
DENSE, VISION = "qwen3_4b_instruct_2507", "qwen3_vl_2b"
PACKED = ("weight_int4", "native_decoder")  # packed output layers have the same bits in both loops
BATCH = {"rows": 3, "tokens": 11, "padding": 4}


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


class Doubled(LogitsProcessor):
    """Something of a user's own."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.is_contiguous()
        assert scores.dtype == torch.float32
        return 2 * scores + 3 * (torch.arange(scores.shape[1]) == 17)


class Lengths:
    """A stopping criterion that ends one row after the other."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(tuple(input_ids.shape))
        return torch.arange(len(input_ids)) < len(self.seen) - 3


@contextmanager
def transformers_loop(patch: pytest.MonkeyPatch) -> Iterator[None]:
    with patch.context() as inner:
        inner.setattr(generation, "unsuitable", lambda *_: "a test wants transformers' loop")
        yield


@contextmanager
def passes(model: Any) -> Iterator[list[int]]:
    """Tokens of every pass whose inputs transformers prepared; counted in the class, as the loop minds the instance."""
    cls, found = type(model), []
    own = "prepare_inputs_for_generation" in cls.__dict__
    prepare = cls.prepare_inputs_for_generation

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = prepare(self, *args, **kwargs)
        found.append(made["input_ids"].shape[1])
        return made

    cls.prepare_inputs_for_generation = counting
    yield found
    if own:
        cls.prepare_inputs_for_generation = prepare
    else:
        del cls.prepare_inputs_for_generation


def both_loops(
    runner: Runner, patch: pytest.MonkeyPatch, parts: tuple[str, ...], make: Callable[[], dict[str, Any]]
) -> list[Any]:
    """The results of transformers' loop and of ours, in which transformers prepared nothing but the prompt."""
    results = []
    with optimize(runner, *parts):
        for ours in (False, True):
            torch.manual_seed(3)
            with passes(runner.model) as prepared:
                if ours:
                    results.append(runner.generate(**make()))
                    assert len(prepared) == 1
                else:
                    with transformers_loop(patch):
                        results.append(runner.generate(**make()))
                    assert len(prepared) > 1
    return results


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.4, "top_k": 30, "top_p": 0.9},
    "repetition": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "ends": {"do_sample": True, "eos_token_id": list(range(8, 200)), "pad_token_id": 7},
    "least length": {"do_sample": False, "eos_token_id": list(range(8, 900)), "min_new_tokens": 5},
    "least in all": {"do_sample": False, "eos_token_id": list(range(8, 900)), "min_length": 14},
    "own processor": {"do_sample": False, "logits_processor": [Doubled()]},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cache", [(), ("kv_int8",)], ids=["dense", "int8"])
def test_tokens_and_scores_are_those_of_transformers_loop(
    family: str,
    name: str,
    cache: tuple[str, ...],
    tiny: Tiny,
    prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make() -> dict[str, Any]:
        recorded = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        return {**prompts(**BATCH), **OPTIONS[name], **recorded, "max_new_tokens": 12}

    runner = tiny(family)
    wanted, got = both_loops(runner, monkeypatch, (*cache, *PACKED), make)
    assert type(got) is type(wanted)
    assert torch.equal(got.sequences, wanted.sequences)
    for kind in ("scores", "logits"):
        assert len(got[kind]) == len(wanted[kind]) > 1
        assert all(torch.equal(a, b) for a, b in zip(got[kind], wanted[kind], strict=True))
    assert type(got.past_key_values) is type(wanted.past_key_values)
    assert got.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length()


@pytest.mark.parametrize("name", ["greedy", "ends", "least length"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_records_the_tokens_are_the_same(
    family: str,
    name: str,
    dtype: torch.dtype,
    tiny: Tiny,
    prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores are not kept, so that greedy ones are searched where the output layer wrote them."""
    runner = tiny(family, dtype)

    def make() -> dict[str, Any]:
        return {**prompts(**BATCH), **OPTIONS[name], "max_new_tokens": 12}

    wanted, got = both_loops(runner, monkeypatch, PACKED, make)
    assert torch.equal(got, wanted)


def test_dense_output_layers_agree_within_rounding(
    family: str, tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours multiplies in another order than torch's."""

    def make() -> dict[str, Any]:
        return {
            **prompts(**BATCH),
            "max_new_tokens": 12,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }

    wanted, got = both_loops(tiny(family), monkeypatch, ("native_decoder",), make)
    assert torch.equal(got.sequences, wanted.sequences)
    for a, b in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def test_images_go_on_at_their_positions(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(8, 1792, (12,), generator=generator).tolist()
    ids = torch.tensor([[*words[:5], 3, *[5] * 16, 4, *words[5:]]])

    def make() -> dict[str, Any]:
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(64, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(4)),
            "image_grid_thw": torch.tensor([[1, 8, 8]]),
            "mm_token_type_ids": (ids == 5).int(),
            "max_new_tokens": 9,
            "do_sample": False,
        }

    wanted, got = both_loops(tiny(VISION), monkeypatch, PACKED, make)
    assert torch.equal(got, wanted)


def test_streamers_and_criteria_are_called_as_by_transformers(
    tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Collected, Lengths]] = []

    def make() -> dict[str, Any]:
        made.append((Collected(), Lengths()))
        return {
            **prompts(1, 9),
            "max_new_tokens": 12,
            "do_sample": False,
            "streamer": made[-1][0],
            "stopping_criteria": [made[-1][1]],
        }

    wanted, got = both_loops(tiny(DENSE), monkeypatch, PACKED, make)
    assert torch.equal(got, wanted)
    (first, lengths), (second, others) = made
    assert second.got == first.got
    assert second.ended == first.ended == 1
    assert lengths.seen == others.seen == [(1, 10 + i) for i in range(4)]


def test_rows_that_a_criterion_ended_stay_ended(
    tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> dict[str, Any]:
        ends = {"eos_token_id": 8, "pad_token_id": 7, "stopping_criteria": [Lengths()]}
        return {**prompts(3, 9), "max_new_tokens": 12, "do_sample": False, **ends}

    wanted, got = both_loops(tiny(DENSE), monkeypatch, PACKED, make)
    assert torch.equal(got, wanted)
    assert got[0, -1] == 7


def test_a_cache_goes_on_where_an_earlier_generation_left_it(
    family: str, tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, options = tiny(family), {"do_sample": False, "return_dict_in_generate": True}

    def make() -> dict[str, Any]:
        begun = runner.generate(**prompts(2, 9), max_new_tokens=4, **options)
        ids = torch.cat((begun.sequences, prompts(2, 5)["input_ids"]), dim=1)
        cache = begun.past_key_values
        return {"input_ids": ids, "past_key_values": cache, "max_new_tokens": 7, "do_sample": False}

    with optimize(runner, *PACKED):
        got = runner.generate(**make())
        with transformers_loop(monkeypatch):
            wanted = runner.generate(**make())
    assert torch.equal(got, wanted)


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


def test_a_generation_longer_than_the_room_of_its_ids(tiny: Tiny, prompts: Prompts) -> None:
    runner, options = tiny(DENSE), {"max_new_tokens": ROOM + 40, "do_sample": False}
    wanted = runner.generate(**prompts(2, 8, padding=3), **options)
    with optimize(runner, "native_decoder"):
        assert torch.equal(runner.generate(**prompts(2, 8, padding=3), **options), wanted)


def test_prompts_may_be_int32(tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    for sampled in (False, True):

        def make(sampled: bool = sampled) -> dict[str, Any]:
            inputs = prompts(2, 9)
            ids = inputs["input_ids"].int()
            return {**inputs, "input_ids": ids, "max_new_tokens": 6, "do_sample": sampled}

        wanted, got = both_loops(tiny(DENSE), monkeypatch, PACKED, make)
        assert got.dtype == wanted.dtype == torch.int64
        assert torch.equal(got, wanted)


def test_assistant_models_draft_in_this_loop(family: str, tiny: Tiny, prompts: Prompts) -> None:
    """transformers ends their drafts with a criterion that gives a bool."""
    runner, options = tiny(family), {"max_new_tokens": 20, "do_sample": False}
    with optimize(runner, "native_decoder"):
        wanted = runner.generate(**prompts(1, 12), **options)
        got = runner.generate(**prompts(1, 12), **options, assistant_model=runner.model)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "verdict", [lambda done: done, lambda done: torch.tensor([[done]]), lambda done: torch.tensor(done)]
)
def test_a_verdict_may_be_a_bool_or_any_tensor(
    verdict: Callable[[bool], Any], tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> dict[str, Any]:
        criterion = lambda ids, scores, **_: verdict(ids.shape[1] >= 13)
        return {**prompts(1, 9), "max_new_tokens": 8, "do_sample": False, "stopping_criteria": [criterion]}

    wanted, got = both_loops(tiny(DENSE), monkeypatch, PACKED, make)
    assert torch.equal(got, wanted)
    assert got.shape[1] == 13


@pytest.mark.parametrize(
    "change", [lambda x: x.double(), lambda x: x[:1].expand_as(x), lambda x: x.T.contiguous().T]
)
def test_processors_may_give_any_scores(
    change: Callable[[Tensor], Tensor], tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> dict[str, Any]:
        processor = lambda input_ids, scores: change(scores)
        return {**prompts(3, 9), "max_new_tokens": 5, "do_sample": False, "logits_processor": [processor]}

    wanted, got = both_loops(tiny(DENSE), monkeypatch, PACKED, make)
    assert torch.equal(got, wanted)


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


def test_negative_ends_forbid_nothing(tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> dict[str, Any]:
        ends = {"eos_token_id": -1, "pad_token_id": 0, "min_new_tokens": 4}
        return {**prompts(2, 9), "max_new_tokens": 6, "do_sample": False, **ends}

    wanted, got = both_loops(tiny(DENSE), monkeypatch, PACKED, make)
    assert torch.equal(got, wanted)


def test_what_a_streamer_does_to_its_tokens_is_its_own_affair(tiny: Tiny, prompts: Prompts) -> None:
    class Rude(Collected):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.got) > 1:  # the first is the prompt itself
                value.fill_(9)

    runner, options = tiny(DENSE), {"max_new_tokens": 6, "do_sample": False}
    with optimize(runner, *PACKED):
        wanted = runner.generate(**prompts(1, 9), **options)
        assert torch.equal(runner.generate(**prompts(1, 9), **options, streamer=Rude()), wanted)


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
