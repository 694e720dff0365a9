"""Inputs: seeded, natural, of the length that was asked for; arrivals are a Poisson process."""

from __future__ import annotations

import itertools
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_inferencepio import workloads
from pytest_inferencepio.tasks.text import heldout_text


class Words:
    """Every character is a token."""

    pad_token_id = 9
    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def runner_with(tokenizer: Any, vocabulary: int = 50) -> Any:
    return SimpleNamespace(
        tokenizer=tokenizer,
        processor=tokenizer,
        pad_token_id=lambda: tokenizer.pad_token_id,
        text_config=SimpleNamespace(vocab_size=vocabulary),
        model=SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32),
    )


RUNNER = runner_with(Words())


def test_a_prompt_is_held_out_text() -> None:
    ids = workloads.token_ids(RUNNER, 200, seed=3)
    assert len(ids) == 200
    assert "".join(map(chr, ids)) in heldout_text()


def test_the_seed_decides() -> None:
    assert workloads.token_ids(RUNNER, 50, 1) == workloads.token_ids(RUNNER, 50, 1)
    assert workloads.token_ids(RUNNER, 50, 1) != workloads.token_ids(RUNNER, 50, 2)


def test_more_tokens_than_text_repeat_it() -> None:
    length = len(heldout_text()) + 10
    assert len(workloads.token_ids(RUNNER, length)) == length


def test_without_a_tokenizer_ids_are_random_within_the_vocabulary() -> None:
    ids = workloads.token_ids(runner_with(None), 400)
    assert set(ids) <= set(range(50)) and len(set(ids)) > 40


def test_a_batch_is_padded_on_the_left() -> None:
    inputs = workloads.batch(RUNNER, [2, 5])
    assert inputs["input_ids"].shape == (2, 5) and inputs["input_ids"].dtype == torch.int64
    assert inputs["input_ids"][0, :3].tolist() == [9, 9, 9]
    assert inputs["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_prompts_without_tokens_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token each"):
        workloads.token_rows(RUNNER, lengths)


def test_arrivals_are_exponentially_spaced_at_the_rate() -> None:
    """2,000 gaps: their mean is 1/rate within 4 standard errors (9 %), their deviation equals their mean."""
    requests = workloads.poisson_requests(RUNNER, 2001, 5.0, 8, 6, seed=7)
    gaps = [b.arrival - a.arrival for a, b in itertools.pairwise(requests)]
    assert requests[0].arrival == 0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.09)
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.15)


def test_requests_differ_in_length_within_what_was_asked() -> None:
    requests = workloads.poisson_requests(RUNNER, 200, 5.0, 8, 6, seed=7)
    assert {len(request.prompt_ids) for request in requests} == {4, 5, 6, 7, 8}
    assert {request.max_new_tokens for request in requests} == {3, 4, 5, 6}
    assert len({request.request_id for request in requests}) == 200
    assert requests == workloads.poisson_requests(RUNNER, 200, 5.0, 8, 6, seed=7)


@pytest.mark.parametrize(("n", "rate"), [(0, 1.0), (3, 0.0), (3, -1.0)])
def test_a_load_without_requests_or_rate_is_refused(n: int, rate: float) -> None:
    with pytest.raises(ValueError, match="needs a request and a positive rate"):
        workloads.poisson_requests(RUNNER, n, rate, 8, 8)


def test_drawings_are_seeded_and_not_blank() -> None:
    image = workloads.drawing(4, size=64)
    assert image.size == (64, 64) and image.mode == "RGB"
    assert image.tobytes() == workloads.drawing(4, size=64).tobytes()
    assert image.tobytes() != workloads.drawing(5, size=64).tobytes()
    assert len(image.getcolors()) > 1


def test_a_text_model_has_no_image_prompt() -> None:
    with pytest.raises(ValueError, match="has no image processor; it takes text only"):
        workloads.image_prompt(RUNNER, 8)


def test_an_image_prompt_is_what_the_vision_models_processor_makes() -> None:
    from pytest_inferencepio.catalog.entries import lookup
    from pytest_inferencepio.catalog.loading import load

    runner = load(lookup("qwen3_vl_2b"), "tiny").runner
    inputs = workloads.image_prompt(runner, 12, seed=1, size=64)
    visual = (inputs["input_ids"] == runner.model.config.image_token_id).sum().item()
    assert visual == inputs["image_grid_thw"].prod().item() // 4
    assert inputs["pixel_values"].dtype == runner.model.dtype
    ids = runner.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert ids.shape[1] <= inputs["input_ids"].shape[1] + 2
