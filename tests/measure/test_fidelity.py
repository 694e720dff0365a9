"""Similarity of answers: zero for equal models, known values for known logits, seen in cache and in windows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from optimizations.runner import Runner
from pytest_inferencepio import workloads
from pytest_inferencepio.measure import fidelity
from pytest_inferencepio.measure.budget import budget_for
from pytest_inferencepio.measure.fidelity import Answers, ForcedTokens, Logits

SMALL = dataclasses.replace(
    budget_for("tiny"),
    prompt_tokens=12,
    heldout_tokens=96,
    window=48,
    decoded_tokens=6,
    generations=2,
    generation_tokens=5,
)


@pytest.fixture
def reference(runner: Runner) -> Answers:
    return fidelity.answers(runner, SMALL)


def logits_of(probabilities: list[list[float]], targets: list[int]) -> Logits:
    return Logits(torch.tensor(probabilities).log(), torch.tensor(targets))


def answers_of(windows: Logits, decoded: Logits | None = None) -> Answers:
    return Answers(windows, decoded or windows, torch.zeros(1, 4, dtype=torch.int64))


def test_a_model_is_identical_to_itself(runner: Runner, reference: Answers) -> None:
    again = fidelity.answers(runner, SMALL)
    metrics = fidelity.similarity_metrics(reference, again) | fidelity.perplexity_metrics(reference, again)
    assert metrics["kl_divergence"].value == 0 and metrics["logit_error"].value == 0
    assert metrics["top1_agreement"].value == 1 and metrics["generation_match"].value == 1
    assert metrics["perplexity_ratio"].value == 1
    assert metrics["perplexity_ratio"].n == 2 * 47 + 6


def test_a_perturbed_weight_shows_everywhere(runner: Runner, perturbed: Runner, reference: Answers) -> None:
    after = fidelity.answers(perturbed, SMALL)
    metrics = fidelity.similarity_metrics(reference, after) | fidelity.perplexity_metrics(reference, after)
    assert metrics["kl_divergence"].value > 1e-6 and metrics["logit_error"].value > 1e-3
    assert metrics["perplexity_ratio"].value != 1


def test_decoding_through_the_cache_gives_the_logits_of_one_pass(runner: Runner) -> None:
    """float32 on both sides: the same mathematics in another order."""
    ids = torch.tensor(workloads.token_ids(runner, 20))
    whole = fidelity.window_logits(runner, ids[None])
    prompt = {"input_ids": ids[None, :12], "attention_mask": torch.ones(1, 12)}
    stepwise = fidelity.decoded_logits(runner, prompt, ids[12:])
    assert stepwise.targets.tolist() == whole.targets[11:].tolist()
    torch.testing.assert_close(stepwise.logits, whole.logits[11:], rtol=1e-4, atol=1e-4)


def test_damage_in_the_cache_alone_is_found(
    runner: Runner, reference: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that rounds what it stored: whole windows never read it back."""
    from transformers.cache_utils import DynamicLayer

    update = DynamicLayer.update

    def rounding(self: Any, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if self.is_initialized and self.keys.numel():
            self.keys = (self.keys * 2).round() / 2
        return update(self, keys, values, *rest, **more)

    monkeypatch.setattr(DynamicLayer, "update", rounding)
    after = fidelity.answers(runner, SMALL)
    assert torch.equal(after.windows.logits, reference.windows.logits)
    assert not torch.equal(after.decoded.logits, reference.decoded.logits)
    assert fidelity.similarity_metrics(reference, after)["logit_error"].value > 1e-4


def test_divergence_and_agreement_of_known_distributions() -> None:
    p = logits_of([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], [0, 1])
    q = logits_of([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], [0, 1])
    metrics = fidelity.similarity_metrics(answers_of(p), answers_of(q))
    assert metrics["kl_divergence"].value == pytest.approx(0.25 * math.log(2) / 2)
    assert metrics["top1_agreement"].value == 0.5
    assert metrics["top1_agreement"].n == 4


def test_the_worse_way_is_reported() -> None:
    p = logits_of([[0.5, 0.5]], [0])
    q = logits_of([[0.9, 0.1]], [0])
    for after in (answers_of(p, q), answers_of(q, p)):
        found = fidelity.similarity_metrics(answers_of(p), after)["kl_divergence"]
        assert found.value == pytest.approx(math.log(0.5 / 0.3))


def test_answers_that_are_not_numbers_are_said_to_be_unmeasurable() -> None:
    p = logits_of([[0.5, 0.3, 0.2]], [0])
    broken = Logits(torch.full((1, 3), math.nan), p.targets)
    for after in (answers_of(p, broken), answers_of(broken, p)):
        metrics = fidelity.similarity_metrics(answers_of(p), after)
        metrics |= fidelity.perplexity_metrics(answers_of(p), after)
        for name in ("kl_divergence", "logit_error", "perplexity", "perplexity_ratio"):
            assert metrics[name].value is None
            assert "NaN or infinite" in str(metrics[name].reason)
    certain = logits_of([[0.0, 0.5, 0.5]], [0])
    assert fidelity.perplexity_metrics(None, answers_of(certain))["perplexity"].value is None


def test_a_constant_added_to_all_logits_is_no_error() -> None:
    p = logits_of([[0.5, 0.3, 0.2]], [0])
    shifted = Logits(p.logits + 7.0, p.targets)
    found = fidelity.similarity_metrics(answers_of(p), answers_of(shifted))["logit_error"]
    assert found.value == pytest.approx(0.0, abs=1e-6)


def test_perplexity_of_known_probabilities() -> None:
    p = logits_of([[0.5, 0.5], [0.125, 0.875]], [0, 0])
    metrics = fidelity.perplexity_metrics(None, answers_of(p))
    assert metrics["perplexity"].value == pytest.approx(math.sqrt(2 * 8))
    assert "perplexity_ratio" not in metrics
    q = logits_of([[0.25, 0.75], [0.0625, 0.9375]], [0, 0])
    ratio = fidelity.perplexity_metrics(answers_of(p), answers_of(q))["perplexity_ratio"]
    assert ratio.value == pytest.approx(2.0)
    assert ratio.low == pytest.approx(2.0) and ratio.high == pytest.approx(2.0)  # paired by position


def test_a_generation_matches_up_to_its_first_difference() -> None:
    reference = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    after = torch.tensor([[1, 2, 9, 4], [5, 6, 7, 8]])
    found = fidelity.generation_match(reference, after)
    assert found.value == 6 / 8 and found.n == 8


def test_held_out_windows_do_not_overlap_and_never_change(runner: Runner) -> None:
    windows = fidelity.heldout(runner, SMALL)
    assert windows.shape == (2, 48)
    assert torch.equal(windows, fidelity.heldout(runner, SMALL))
    assert not torch.equal(windows[0], windows[1])


@pytest.mark.parametrize("name", ["", "qwen3_vl_2b"])
def test_a_single_window_leaves_text_to_decode(name: str, runner: Runner) -> None:
    """The decoded tokens follow the first window, however many windows there are."""
    from pytest_inferencepio.catalog.entries import lookup
    from pytest_inferencepio.catalog.loading import load

    chosen = load(lookup(name), "tiny").runner if name else runner
    least = dataclasses.replace(SMALL, heldout_tokens=48, decoded_tokens=2, generations=1)
    several = dataclasses.replace(least, heldout_tokens=96)
    found, longer = (fidelity.answers(chosen, budget) for budget in (least, several))
    assert found.windows.targets.shape == (47,)
    assert found.decoded.targets.tolist() == longer.decoded.targets.tolist()
    assert found.decoded.targets[0] == fidelity.heldout(chosen, several)[1, 0]


def test_forcing_records_several_positions_and_ignores_drafts_past_the_end() -> None:
    forced = ForcedTokens(2, torch.tensor([3, 1]))
    for position in (1, 0, 2):  # a verification may visit positions in any order, and one too many
        scores = torch.full((1, 4), float(position))
        out = forced(torch.zeros(1, 2 + position, dtype=torch.int64), scores)
        assert out.argmax().item() == {0: 3, 1: 1, 2: 0}[position]
    assert forced.logits().tolist() == [[0.0] * 4, [1.0] * 4]


class Blocking:
    name = "blocking"
    differentiable = False


def test_gradients_equal_those_of_the_same_model_and_differ_for_another(
    runner: Runner, perturbed: Runner
) -> None:
    window = fidelity.heldout(runner, SMALL)[0]
    assert fidelity.gradient_error(runner, runner, window).value == 0
    assert 0 < fidelity.gradient_error(runner, perturbed, window).value < 1


def test_gradients_do_not_depend_on_images_seen_before() -> None:
    """A vision model keeps the positions of its last batch with images; here three drawings."""
    from pytest_inferencepio.catalog.entries import lookup
    from pytest_inferencepio.catalog.loading import load

    runner = load(lookup("qwen3_vl_2b"), "tiny").runner
    window = fidelity.heldout(runner, SMALL)[0]
    before = fidelity._input_gradient(runner, window)
    one = workloads.image_prompt(runner, 8, size=64)
    three = {name: torch.cat([value] * 3) for name, value in one.items()}
    runner.generate(**three, max_new_tokens=2, do_sample=False)
    assert torch.equal(fidelity._input_gradient(runner, window), before)


def test_damage_behind_an_image_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_inferencepio.catalog.entries import lookup
    from pytest_inferencepio.catalog.loading import load

    runner = load(lookup("qwen3_vl_2b"), "tiny").runner
    reference = fidelity.answers(runner, SMALL)
    tower = runner.model.model.visual
    forward = tower.patch_embed.forward
    monkeypatch.setattr(tower.patch_embed, "forward", lambda pixels: forward(pixels) * -1.0)
    after = fidelity.answers(runner, SMALL)
    assert torch.equal(after.windows.logits, reference.windows.logits)
    assert fidelity.similarity_metrics(reference, after)["logit_error"].value > 1e-4


def test_a_gradient_that_vanished_is_a_whole_error(
    runner: Runner, perturbed: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = fidelity.heldout(runner, SMALL)[0]
    norm = perturbed.model.model.norm
    monkeypatch.setattr(norm, "forward", lambda hidden: hidden * 0.0)
    assert fidelity.gradient_error(runner, perturbed, window).value == 1.0


def test_techniques_without_gradients_are_not_asked(runner: Runner, perturbed: Runner) -> None:
    perturbed.applied.append(Blocking())  # type: ignore[arg-type]
    found = fidelity.gradient_error(runner, perturbed, fidelity.heldout(runner, SMALL)[0])
    assert found.value is None and found.reason == "blocking: no gradient flows by design"


@pytest.mark.parametrize("name", ["qwen3_vl_2b", "glm_4_7_flash", "qwen3_coder_30b"])
def test_every_family_answers(name: str) -> None:
    from pytest_inferencepio.catalog.entries import lookup
    from pytest_inferencepio.catalog.loading import load

    runner = load(lookup(name), "tiny").runner
    found = fidelity.answers(runner, SMALL)
    assert found.generated.shape == (SMALL.generations + (name == "qwen3_vl_2b"), 5)
    assert torch.isfinite(found.decoded.logits).all()
    assert fidelity.gradient_error(runner, runner, fidelity.heldout(runner, SMALL)[0]).value == 0
