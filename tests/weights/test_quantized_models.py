"""What every weight technique promises, on all four families: everything packed, memory gone, exact undo."""

from __future__ import annotations

import errno
import os
import re

import pytest
import torch
from torch import nn

from optimizations.errors import OptimizationError, Refusal
from optimizations.registry import parse
from optimizations.session import apply_all
from optimizations.weights.kept import packed_modules
from optimizations.weights.packed_modules import PackedEmbedding, PackedExperts, PackedLinear
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.memory import weight_bytes

TECHNIQUES = ("weight_int8", "weight_int4", "weight_nf4")
CELLS = [(name, spec) for name in ENTRIES for spec in TECHNIQUES]
TIED = ("qwen3_4b_instruct_2507", "qwen3_vl_2b")
# What a conversion leaves: routers, untied lookup tables, the patch convolution and position table.
KEPT = {
    "glm_4_7_flash": {r"layers\.[123]\.mlp\.gate\.weight": "router", r"embed_tokens\.weight": "lookup"},
    "qwen3_4b_instruct_2507": {},
    "qwen3_coder_30b": {r"layers\.[0123]\.mlp\.gate\.weight": "router", r"embed_tokens\.weight": "lookup"},
    "qwen3_vl_2b": {r"patch_embed\.proj\.weight": "Conv3d", r"pos_embed\.weight": "lookup"},
}
# Logits against the same weights dense, float32: what rounding activations to int8 in groups of 32 costs after four layers
# (nf4: to bf16).
ACTIVATION_BOUND = {"weight_int8": 0.05, "weight_int4": 0.05, "weight_nf4": 0.03}
SIZE = {
    "weight_int8": 0.36,
    "weight_int4": 0.25,
    "weight_nf4": 0.25,
}  # of float32, embeddings and routers included


def prompt(rows: int = 2, length: int = 24) -> torch.Tensor:
    """Random ids of ordinary text tokens, int64 [rows, length]."""
    return torch.randint(20, 1700, (rows, length), generator=torch.Generator().manual_seed(rows))


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize(("name", "spec"), CELLS)
def test_everything_is_packed_but_what_is_listed_with_a_reason(runners, name, spec):
    runner, [part] = runners(name), parse(spec)
    undo = apply_all(runner, [part])
    try:
        assert not [path for path, module in runner.model.named_modules() if type(module) is nn.Linear]
        kinds = {type(module) for _, module in packed_modules(runner.model)}
        assert (PackedExperts in kinds) == ENTRIES[name].mixture_of_experts
        assert (PackedEmbedding in kinds) == (name in TIED)
        assert isinstance(runner.model.get_output_embeddings(), PackedLinear)
        for kept in part.kept(runner.model):
            [reason] = [why for pattern, why in KEPT[name].items() if re.search(f"{pattern}$", kept.name)]
            assert reason in kept.reason and kept.bytes > 0
        assert len(part.kept(runner.model)) == {
            "glm_4_7_flash": 4,
            "qwen3_coder_30b": 5,
            "qwen3_vl_2b": 2,
        }.get(name, 0)
    finally:
        undo()


@pytest.mark.parametrize(("name", "spec"), CELLS)
def test_dense_weights_are_gone_while_applied(runners, name, spec):
    runner = runners(name)
    originals = dict(runner.model.named_parameters())
    before = weight_bytes(runner.model)
    undo = apply_all(runner, parse(spec))
    try:
        inside = {id(parameter) for parameter in runner.model.parameters()}
        outside = [parameter for parameter in originals.values() if id(parameter) not in inside]
        assert len(outside) > 10
        assert sum(parameter.untyped_storage().nbytes() for parameter in outside) == 0
        assert weight_bytes(runner.model) < SIZE[spec] * before
    finally:
        undo()


@pytest.mark.parametrize(("name", "spec"), CELLS)
def test_logits_are_those_of_the_dequantized_weights(runners, dense_twin, name, spec):
    runner = runners(name)
    undo = apply_all(runner, parse(spec))
    try:
        got = runner.forward(input_ids=prompt()).logits
        with torch.inference_mode():
            wanted = dense_twin(name, runner.model)(input_ids=prompt()).logits
    finally:
        undo()
    assert relative_error(got, wanted) < ACTIVATION_BOUND[spec]
    divergence = (wanted.softmax(-1) * (wanted.log_softmax(-1) - got.log_softmax(-1))).sum(-1).mean()
    assert divergence < 0.001  # nats per token


@pytest.mark.parametrize(("name", "spec"), CELLS)
def test_undo_restores_objects_values_and_answers(runners, name, spec):
    runner = runners(name)
    model = runner.model
    logits = runner.forward(input_ids=prompt()).logits
    modules = [(path, id(module), sorted(module.__dict__)) for path, module in model.named_modules()]
    parameters = {
        path: (id(p), p.clone(), p.stride()) for path, p in model.named_parameters(remove_duplicate=False)
    }
    ties = dict(model.all_tied_weights_keys)
    for _ in range(2):
        undo = apply_all(runner, parse(spec))
        assert not torch.equal(runner.forward(input_ids=prompt()).logits, logits)
        undo()
        assert [
            (path, id(module), sorted(module.__dict__)) for path, module in model.named_modules()
        ] == modules
        for path, parameter in model.named_parameters(remove_duplicate=False):
            identity, value, stride = parameters[path]
            assert (id(parameter), parameter.stride()) == (identity, stride)
            assert torch.equal(parameter, value)
        assert model.all_tied_weights_keys == ties
        assert torch.equal(runner.forward(input_ids=prompt()).logits, logits)


@pytest.mark.parametrize(("name", "spec"), CELLS)
def test_generation_batched_padded_and_sampled(runners, name, spec):
    runner = runners(name)
    undo = apply_all(runner, parse(spec))
    try:
        inputs = runner.pad_left([prompt(1, 9)[0].tolist(), prompt(1, 5)[0].tolist()])
        greedy = runner.generate(**inputs, max_new_tokens=4, do_sample=False)
        torch.manual_seed(0)
        sampled = runner.generate(**inputs, max_new_tokens=4, do_sample=True, temperature=2.0)
        assert greedy.shape == sampled.shape == (2, 13)
        alone = runner.forward(input_ids=prompt(1, 5)).logits[:, -1]
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        padded = runner.forward(**inputs, position_ids=positions).logits[1:, -1]
        assert (
            relative_error(padded, alone) < 0.05
        )  # the mask takes another attention path, tokens may re-route
    finally:
        undo()


@pytest.mark.parametrize("spec", TECHNIQUES)
@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_shares_the_table_of_the_head(runners, name, spec):
    runner = runners(name)
    undo = apply_all(runner, parse(spec))
    try:
        head, embedding = runner.model.get_output_embeddings(), runner.model.get_input_embeddings()
        assert embedding.table is head
        ids = prompt(2, 5)
        assert torch.equal(embedding(ids), head.dequantize()["weight"][ids])
        runner.model.tie_weights()  # must not look for the weights that are gone
        assert embedding.table is runner.model.get_output_embeddings()
    finally:
        undo()


@pytest.mark.parametrize("spec", TECHNIQUES)
@pytest.mark.parametrize("name", ENTRIES)
def test_the_head_can_stay_and_is_then_reported(runners, name, spec):
    runner, [part] = runners(name), parse(f"{spec}(include_lm_head=false)")
    head = runner.model.get_output_embeddings()
    undo = apply_all(runner, [part])
    try:
        assert runner.model.get_output_embeddings() is head
        assert (head.weight is runner.model.get_input_embeddings().weight) == (name in TIED)
        reasons = {kept.name.rpartition(".")[0]: kept.reason for kept in part.kept(runner.model)}
        tied_name = next(
            path
            for path, module in runner.model.named_modules()
            if module is runner.model.get_input_embeddings()
        )
        assert reasons.get("lm_head", reasons.get(tied_name)) is not None
        assert runner.forward(input_ids=prompt()).logits.isfinite().all()
    finally:
        undo()


@pytest.mark.parametrize("spec", TECHNIQUES)
def test_an_untied_embedding_is_packed_on_request(runners, spec):
    runner, [part] = runners("qwen3_coder_30b"), parse(f"{spec}(quantize_embedding=true)")
    undo = apply_all(runner, [part])
    try:
        embedding = runner.model.get_input_embeddings()
        assert embedding.table is not runner.model.get_output_embeddings()
        assert all("router" in kept.reason for kept in part.kept(runner.model))
        assert embedding(prompt()).shape == (2, 24, 256)
    finally:
        undo()


@pytest.mark.parametrize("spec", TECHNIQUES)
def test_dense_weights_are_asked_for_where_they_are_packed_already(runners, spec):
    runner = runners("qwen3_4b_instruct_2507")
    undo = apply_all(runner, parse(spec))
    try:
        again = parse(spec)[0].apply(runner)  # the same technique: already done, nothing to undo
        again()
        assert isinstance(runner.model.get_output_embeddings(), PackedLinear)
        other = next(name for name in TECHNIQUES if name != spec)
        with pytest.raises(
            Refusal, match=f"{other} needs dense weights; the model's are packed already, as "
        ):
            parse(other)[0].apply(runner)
    finally:
        undo()


@pytest.mark.parametrize("spec", TECHNIQUES)
def test_a_full_disk_leaves_the_model_as_it_was(runners, spec, monkeypatch):
    runner = runners("qwen3_4b_instruct_2507")
    logits = runner.forward(input_ids=prompt()).logits
    write, room = os.pwrite, [1_000_000]

    def nearly_full(descriptor, data, offset):
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", nearly_full)
    with pytest.raises(
        OptimizationError, match=r"cannot set .* MiB of original weights aside in .*No space left.*TMPDIR"
    ):
        apply_all(runner, parse(spec))
    assert torch.equal(runner.forward(input_ids=prompt()).logits, logits)
    assert not list(packed_modules(runner.model))
