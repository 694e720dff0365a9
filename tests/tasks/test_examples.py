"""Text tasks: the same for a seed, right by independent recomputation, never answerable by accident."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pytest_inferencepio.catalog.tiny import reference_directory
from pytest_inferencepio.tasks.examples import (
    TEXT_TASKS,
    Arithmetic,
    Copy,
    Retrieval,
    Task,
    is_heldout_sum,
    sum_text,
    symbol_ids,
)
from pytest_inferencepio.tasks.text import heldout_text, heldout_tokens


@pytest.mark.parametrize("task", TEXT_TASKS, ids=lambda task: task.name)
def test_a_seed_fixes_the_examples_and_another_changes_them(
    task: Task, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = task.examples(tokenizer, 8, seed=3)
    assert first == task.examples(tokenizer, 8, seed=3)
    assert first != task.examples(tokenizer, 8, seed=4)
    assert first[:5] == task.examples(tokenizer, 5, seed=3)


def test_retrieval_answer_follows_its_key_once_and_from_far_enough(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    symbols = set(symbol_ids(tokenizer))
    for example in Retrieval((64, 1024)).examples(tokenizer, 12, seed=5):
        prompt, key = list(example.prompt_ids), example.prompt_ids[-1]
        places = [place for place, token in enumerate(prompt[:-1]) if token == key]
        assert len(places) == 1
        assert tuple(prompt[places[0] + 1 : places[0] + 3]) == example.answer_ids
        assert example.distance is not None
        assert len(prompt) - 2 - (places[0] + 3) >= example.distance
        assert sum(token in symbols for token in prompt) == 3 * 16 + 1


def test_retrieval_prompts_of_a_distance_have_one_length(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = Retrieval((256,)).examples(tokenizer, 6, seed=0)
    assert {len(example.prompt_ids) for example in examples} == {1 + 48 + 256 + 2}


def test_copy_repeats_distinct_symbols(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in Copy(20).examples(tokenizer, 5, seed=1):
        assert example.prompt_ids[1:-1] == example.answer_ids
        assert example.prompt_ids[0] == example.prompt_ids[-1]
        assert len(set(example.answer_ids)) == 20


def test_arithmetic_is_right_and_held_out(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in Arithmetic().examples(tokenizer, 40, seed=2):
        question = tokenizer.decode(example.prompt_ids).removeprefix("<|calculate|>")
        left, right = (int(number[::-1]) for number in question.removesuffix("=").split("+"))
        assert int(tokenizer.decode(example.answer_ids)[::-1]) == left + right
        assert is_heldout_sum(left, right)


@given(st.integers(0, 99), st.integers(0, 99))
def test_sum_text_has_fixed_width(left: int, right: int) -> None:
    question, answer = sum_text(left, right)
    assert (len(question), len(answer)) == (6, 3)
    assert int(answer[::-1]) == left + right
    assert question[::-1] == f"={right:02d}+{left:02d}"


def test_about_a_sixteenth_of_the_sums_is_held_out() -> None:
    n = sum(is_heldout_sum(a, b) for a in range(100) for b in range(100))
    assert 500 < n < 750


def test_a_tokenizer_without_symbols_is_refused_in_words() -> None:
    class Bare:
        unk_token_id = 7

        def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
            return [7] * len(tokens)

    with pytest.raises(ValueError, match="lacks the task symbols <sym000>.*Use perplexity"):
        symbol_ids(Bare())


def test_heldout_tokens_are_fixed_and_bounded(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = heldout_tokens(tokenizer, 500)
    assert len(tokens) == 500
    assert tokens == heldout_tokens(tokenizer, 600)[:500]
    with pytest.raises(ValueError, match="excerpt has .* tokens, 10000000 were asked for; ask for fewer"):
        heldout_tokens(tokenizer, 10_000_000)


def test_a_text_longer_than_the_context_is_read_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers warns once per tokenizer; nobody feeds the whole text to a model."""
    told: list[str] = []
    logger = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(logger, "warning", lambda message, *_: told.append(message))
    directory = reference_directory("qwen3_4b_instruct_2507")
    fresh = AutoTokenizer.from_pretrained(directory, model_max_length=100)
    heldout_tokens(fresh, 500)
    assert told == []
    fresh(heldout_text())
    assert "longer than the specified maximum sequence length" in "".join(told)
