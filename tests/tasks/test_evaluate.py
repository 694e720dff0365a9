"""Scoring: right answers count, one wrong token does not, batches never mix lengths."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from pytest_inferencepio.tasks.evaluate import batches, evaluate_exact, score
from pytest_inferencepio.tasks.examples import Copy, Example, Retrieval


class Oracle:
    """Generates the known answers; wrong in the last token of every example in `wrong`."""

    def __init__(self, examples: list[Example], wrong: set[int] = frozenset()) -> None:
        self.answers = {
            example.prompt_ids: (i in wrong, example.answer_ids) for i, example in enumerate(examples)
        }
        self.sizes: list[int] = []

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int, do_sample: bool
    ) -> torch.Tensor:
        assert not do_sample
        assert attention_mask.all()
        self.sizes.append(len(input_ids))
        rows = []
        for prompt in input_ids.tolist():
            wrong, answer = self.answers[tuple(prompt)]
            answer = [*answer[:-1], answer[-1] + wrong]
            rows.append([*prompt, *answer, *[0] * (max_new_tokens - len(answer))])
        return torch.tensor(rows)


def test_every_token_of_an_answer_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = Copy(6).examples(tokenizer, 10, seed=0)
    found = score(Oracle(examples, wrong={2, 7}), examples, batch_size=4)
    assert [i for i, outcome in enumerate(found.outcomes) if not outcome] == [2, 7]
    assert (found.correct, found.exact_match, found.task) == (8, 0.8, "copy")


def test_distances_are_counted_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    task = Retrieval((32, 96))
    examples = task.examples(tokenizer, 8, seed=3)
    far = {i for i, example in enumerate(examples) if example.distance == 96}
    scores = evaluate_exact(Oracle(examples, wrong=far), tokenizer, [task], n=8, seed=3)
    assert scores["retrieval"].by_distance() == {32: (4, 4), 96: (0, 4)}


def test_batches_hold_equal_lengths_and_every_index_once(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = Retrieval((16, 48)).examples(tokenizer, 11, seed=1)
    found = list(batches(examples, 4))
    assert sorted(index for group in found for index in group) == list(range(11))
    for group in found:
        assert len(group) <= 4
        assert len({len(examples[index].prompt_ids) for index in group}) == 1


def test_an_answer_cut_short_is_wrong(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = Copy(6).examples(tokenizer, 2, seed=0)
    found = score(lambda input_ids, **_: input_ids, examples)
    assert found.correct == 0
