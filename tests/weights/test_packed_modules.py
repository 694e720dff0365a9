"""The packed modules inside real models: experts, vision tower, state dicts, compilation, what cannot be packed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.session import apply_all
from optimizations.weights.kept import packed_modules
from optimizations.weights.packed_modules import PackedExperts, PackedLinear
from pytest_inferencepio.catalog.entries import ENTRIES

TECHNIQUES = ("weight_int8", "weight_int4", "weight_nf4")
CELLS = [(name, spec) for name in ENTRIES for spec in TECHNIQUES]


def prompt(rows: int = 2, length: int = 24) -> torch.Tensor:
    """Random ids of ordinary text tokens, int64 [rows, length]."""
    return torch.randint(20, 1700, (rows, length), generator=torch.Generator().manual_seed(rows))


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("spec", TECHNIQUES)
def test_experts_are_the_weighted_sum_over_the_chosen_ones(runners, spec):
    runner = runners("glm_4_7_flash")
    undo = apply_all(runner, parse(spec))
    try:
        experts = next(
            module for _, module in packed_modules(runner.model) if isinstance(module, PackedExperts)
        )
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(9, 256, generator=generator)
        index = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(9)])
        weights = torch.rand(9, 2, generator=generator)
        dense = experts.dequantize()
        wanted = torch.zeros_like(x)
        for token in range(9):
            for choice in range(2):
                expert = index[token, choice]
                gate, up = (dense["gate_up_proj"][expert] @ x[token]).chunk(2)
                y = dense["down_proj"][expert] @ (nn.functional.silu(gate) * up)
                wanted[token] += weights[token, choice] * y
        assert relative_error(experts(x, index, weights), wanted) < 0.02
    finally:
        undo()


@pytest.mark.parametrize("spec", TECHNIQUES)
def test_the_vision_tower_is_packed_and_sees(runners, spec):
    runner = runners("qwen3_vl_2b")
    pixels = torch.randn(256, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, 16, 16]])
    with torch.inference_mode():
        wanted = runner.model.model.visual(pixels, grid_thw=grid).pooler_output
        undo = apply_all(runner, parse(spec))
        try:
            assert isinstance(runner.model.model.visual.blocks[0].attn.qkv, PackedLinear)
            got = runner.model.model.visual(pixels, grid_thw=grid).pooler_output
        finally:
            undo()
    assert relative_error(got, wanted) < {"weight_int8": 0.03}.get(spec, 0.35)


@pytest.mark.parametrize(("name", "spec"), CELLS)
def test_state_dicts_carry_everything_that_is_packed(new_runner, name, spec):
    first, second = new_runner(name), new_runner(name)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.mul_(1.5)
    for runner in (first, second):
        apply_all(runner, parse(spec))
    assert not torch.equal(
        first.forward(input_ids=prompt()).logits, second.forward(input_ids=prompt()).logits
    )
    second.model.load_state_dict(first.model.state_dict())
    assert torch.equal(first.forward(input_ids=prompt()).logits, second.forward(input_ids=prompt()).logits)


@pytest.mark.parametrize(("name", "spec"), CELLS)
def test_packed_models_compile_into_one_graph(runners, name, spec):
    runner = runners(name)
    undo = apply_all(runner, parse(spec))
    try:
        layers = [module for _, module in packed_modules(runner.model)]
        embedding = runner.model.get_input_embeddings()
        experts = [layer for layer in layers if isinstance(layer, PackedExperts)][:1]
        routing = (torch.tensor([[0, 1], [1, 2], [0, 3]]), torch.rand(3, 2))
        calls = [(embedding, (prompt(),)), (runner.model.get_output_embeddings(), (torch.randn(3, 256),))]
        calls += [(layer, (torch.randn(3, 256), *routing)) for layer in experts]
        for module, arguments in calls:
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
            with torch.inference_mode():
                assert torch.equal(compiled(*arguments), module(*arguments))
    finally:
        torch.compiler.reset()
        undo()


class OddExperts(nn.Module):
    """Fused experts that gate with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 128, 64))
        self.down_proj = nn.Parameter(torch.randn(2, 64, 64))
        self.act_fn = nn.GELU()


class OddLinear(nn.Linear):
    """A linear layer that does something else as well."""


@pytest.mark.parametrize("spec", TECHNIQUES)
def test_what_cannot_be_packed_is_kept_and_reported(new_runner, spec):
    runner = new_runner("qwen3_4b_instruct_2507")
    layer = runner.model.model.layers[0]
    layer.experts, layer.odd = OddExperts(), OddLinear(64, 64)
    [part] = parse(spec)
    apply_all(runner, [part])
    reasons = {kept.name: kept.reason for kept in part.kept(runner.model)}
    assert reasons == {
        "model.layers.0.experts.gate_up_proj": "experts with activation GELU are not packed, only SiLU",
        "model.layers.0.experts.down_proj": "experts with activation GELU are not packed, only SiLU",
        "model.layers.0.odd.weight": "OddLinear is not a plain nn.Linear, its forward may do more than multiply",
    }


def test_dtype_bfloat16_runs_too(new_runner):
    runner: Runner = new_runner("glm_4_7_flash", torch.bfloat16)
    for spec in TECHNIQUES:
        undo = apply_all(runner, parse(spec))
        logits = runner.forward(input_ids=prompt()).logits
        undo()
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()
