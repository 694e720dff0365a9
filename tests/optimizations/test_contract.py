"""Every technique on every model: it applies or refuses in words, generates, and undoes itself exactly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from optimizations.contract import Fidelity, Kind, Optimization, Target
from optimizations.errors import Refusal
from optimizations.registry import parse, techniques
from optimizations.runner import Runner
from optimizations.session import apply_all
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.tiny import tiny_config
from pytest_inferencepio.tasks.text import heldout_tokens

SHIPPED = {
    "weight_int8",
    "weight_int4",
    "weight_nf4",
    "weight_lossless",
    "kv_int8",
    "fused_ops",
    "native_decoder",
    "torch_compile",
    "layer_streaming",
    "visual_token_pruning",
    "prompt_lookup",
    "continuous_batching",
}
PAIRS = [(model, name) for model in ENTRIES for name in sorted(SHIPPED)]


def technique(name: str) -> Optimization:
    [part] = parse(name)
    return part


def test_the_shipped_techniques_are_discovered() -> None:
    assert set(techniques()) >= SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_technique_documents_itself(name: str) -> None:
    part = technique(name)
    assert isinstance(part.kind, Kind)
    assert isinstance(part.fidelity, Fidelity)
    assert len(part.summary) > 20
    assert len(part.source) > 5
    assert "Source" in (type(part).__doc__ or ""), f"{name}: the class docstring names its source"
    assert part.budget.min_top1_agreement <= 1.0


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_settings_survive_json(name: str) -> None:
    part = technique(name)
    stored = json.loads(part.to_json())
    assert type(part).from_settings(stored["config"]) == part
    assert parse(part.spec()) == [part]
    for field, values in part.search_space().items():
        for value in values:
            assert getattr(dataclasses.replace(part, **{field: value}), field) == value


def applied_or_refused(runner: Runner, part: Optimization) -> Callable[[], None] | None:
    try:
        return apply_all(runner, [part])
    except Refusal as refusal:
        assert part.name in str(refusal)
        assert len(str(refusal)) > 40, "a refusal is a sentence"
        return None


def prompts(rows: int) -> dict[str, torch.Tensor]:
    """Random prompts, the last row padded on the left by three."""
    ids = torch.randint(2, 400, (rows, 11), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[-1, :3], mask[-1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_applies_generates_and_undoes_itself(
    model: str,
    name: str,
    trained_runner: Callable[[str], Runner],
    snapshot: Callable[[Runner], dict[str, Any]],
) -> None:
    runner = trained_runner(model)  # shared with the test below, which then compiles nothing again
    before = snapshot(runner)
    undo = applied_or_refused(runner, technique(name))
    if undo is not None:
        try:
            for rows in (1, 3):
                greedy = runner.generate(**prompts(rows), max_new_tokens=5, do_sample=False)
                assert greedy.shape == (rows, 16)
            torch.manual_seed(0)
            sampled = runner.generate(
                **prompts(3), max_new_tokens=5, do_sample=True, temperature=0.9, top_k=20
            )
            assert sampled.shape == (3, 16)
            logits = runner.forward(**prompts(3), use_cache=False).logits
            assert torch.isfinite(logits.float()).all()
        finally:
            undo()
    after = snapshot(runner)
    assert {key: after.get(key) for key in before} == before
    assert set(after) == set(before)


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_divergence_stays_within_the_declared_budget(
    model: str, name: str, trained_runner: Callable[[str], Runner]
) -> None:
    """Mean KL divergence from the unoptimized model on held-out text, by the trained reference."""
    runner, part = trained_runner(model), technique(name)
    ids = torch.tensor(heldout_tokens(runner.tokenizer, 512)).view(4, 128)
    reference = runner.forward(input_ids=ids).logits.float().log_softmax(-1)
    undo = applied_or_refused(runner, part)
    if undo is None:
        return
    try:
        changed = runner.forward(input_ids=ids).logits.float().log_softmax(-1)
    finally:
        undo()
    divergence = (reference.exp() * (reference - changed)).sum(-1).mean().item()
    assert abs(divergence) <= part.budget.max_kl_divergence
    if part.fidelity is Fidelity.BITWISE:
        assert torch.equal(changed, reference)


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_refusals_need_no_weights(model: str, name: str) -> None:
    """`refusal` answers from the configuration alone, so that a listing costs nothing."""
    reason = technique(name).refusal(Target(tiny_config(model)))
    assert reason is None or len(reason) > 20
