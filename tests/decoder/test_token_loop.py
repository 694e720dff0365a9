"""The loop over tokens gives what transformers' own loop over the same native decoder gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor
from two_loops import PACKED, Collected, both_loops, transformers_loop

from optimizations.decoder.token_ids import ROOM
from optimizations.runner import Runner
from optimizations.session import optimize

Tiny = Callable[..., Runner]
Prompts = Callable[..., dict[str, Tensor]]
DENSE, VISION = "qwen3_4b_instruct_2507", "qwen3_vl_2b"
BATCH = {"rows": 3, "tokens": 11, "padding": 4}


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
