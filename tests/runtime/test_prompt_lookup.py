"""prompt_lookup gives the model's own tokens, and gives the model back unchanged."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from optimizations.errors import IncompatibleOptimizations, InvalidSpec
from optimizations.registry import parse
from optimizations.repeatable import repeatable
from optimizations.runner import Runner
from optimizations.runtime import prompt_lookup
from optimizations.runtime.draft_length import DraftLength
from optimizations.runtime.prompt_lookup import STATE
from optimizations.session import apply_all, optimize

PROMPT = [5, 9, 11, 200, 17, 5, 9, 11, 201, 33, 5, 9]


@pytest.fixture(autouse=True)
def every_step_takes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft lengths follow the time of a step, so on a busy machine they would differ from run to run."""
    clock = itertools.count()
    monkeypatch.setattr(prompt_lookup, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))


def greedy(runner: Runner, rows: int = 1, **settings: object) -> torch.Tensor:
    ids = torch.tensor([PROMPT] * rows)
    if rows > 1:
        ids[1:] += 3
    arguments = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return runner.generate(input_ids=ids, **{**arguments, **settings})


def test_greedy_tokens_are_the_models_own(runner: Runner) -> None:
    plain = greedy(runner)
    with optimize(runner, "prompt_lookup(min_ngram=1)"):
        assert torch.equal(greedy(runner), plain)
        counts = getattr(runner.model, STATE)
        assert 0 < counts.steps <= 24
        assert counts.drafted > 0


@pytest.mark.parametrize("compared", [True, False])
def test_where_answers_are_compared_the_clock_decides_nothing(
    make_runner: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch, compared: bool
) -> None:
    runner = make_runner("qwen3_4b_instruct_2507")
    observe, drafted = DraftLength.observe, []
    for per_token in (
        0.0,
        10.0,
    ):  # seconds that a drafted token seems to take: nothing, or far more than a step

        def told(
            self: DraftLength, length: int, matched: int, seconds: float | None, each: float = per_token
        ) -> None:
            observe(self, length, matched, None if seconds is None else 1.0 + each * length)

        monkeypatch.setattr(DraftLength, "observe", told)
        with optimize(runner, "prompt_lookup"), repeatable() if compared else contextlib.nullcontext():
            greedy(runner, max_new_tokens=64)
            drafted.append(getattr(runner.model, STATE).drafted)
    assert (drafted[0] == drafted[1]) is compared


def test_looping_text_takes_fewer_steps(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner("qwen3_4b_instruct_2507")
    plain = greedy(runner, max_new_tokens=64)
    assert len(set(plain[0, -24:].tolist())) < 12, "this seed should make the model loop"
    with optimize(runner, "prompt_lookup"):
        assert torch.equal(greedy(runner, max_new_tokens=64), plain)
        assert getattr(runner.model, STATE).tokens_per_step > 1.5


def test_batches_and_samples_run(runner: Runner) -> None:
    plain = greedy(runner, rows=3)
    with optimize(runner, "prompt_lookup"):
        assert torch.equal(greedy(runner, rows=3), plain)
        assert getattr(runner.model, STATE).plain_calls == 1
        torch.manual_seed(1)
        sampled = greedy(runner, do_sample=True, temperature=0.7)
        assert sampled.shape == plain[:1].shape


def test_exactly_as_many_tokens_as_asked(runner: Runner) -> None:
    with optimize(runner, "prompt_lookup(max_draft=16,min_ngram=1)"):
        for wanted in (1, 2, 7):
            assert greedy(runner, max_new_tokens=wanted).shape[1] == len(PROMPT) + wanted


def test_step_moments_count_every_token(runner: Runner) -> None:
    with optimize(runner, "prompt_lookup(min_ngram=1)"):
        ids, moments = runner.timed_generate(12, input_ids=torch.tensor([PROMPT]))
    assert ids.shape[1] - len(PROMPT) == len(moments) == 12
    assert moments == sorted(moments)


def test_undo_is_exact(runner: Runner) -> None:
    before = dict(runner.model.__dict__)
    undo = apply_all(runner, parse("prompt_lookup"))
    assert set(runner.model.__dict__) - set(before) == {"generate", "_get_candidate_generator", STATE}
    undo()
    assert runner.model.__dict__ == before
    assert runner.applied == []


def test_remarks_say_what_was_accepted(runner: Runner) -> None:
    [technique] = parse("prompt_lookup(min_ngram=1)")
    undo = apply_all(runner, [technique])
    greedy(runner)
    counts = getattr(runner.model, STATE)
    [remark] = technique.remarks(runner)
    assert remark.startswith(f"{counts.accepted} of {counts.drafted} drafted tokens accepted")
    undo()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prompt_lookup(max_draft=0)", "max_draft must be 1 to 64 tokens, got 0"),
        ("prompt_lookup(min_ngram=4)", "need 1 <= min_ngram <= max_ngram <= 8, got min_ngram=4, max_ngram=3"),
        ("prompt_lookup(drafts=3)", "has no setting 'drafts'; it has: max_draft, max_ngram, min_ngram"),
    ],
)
def test_settings_are_checked(spec: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message.replace("(", r"\(")):
        parse(spec)


def test_refuses_torch_compile_by_name() -> None:
    with pytest.raises(IncompatibleOptimizations, match="torch_compile and prompt_lookup cannot be combined"):
        parse("prompt_lookup+torch_compile")
