"""Quantizing while loading through transformers' seam: the same bits, and the unconverted model never exists."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from optimizations.errors import Refusal, UnknownOptimization
from optimizations.registry import parse
from optimizations.session import apply_all
from optimizations.weights.checkpoint_pages import CheckpointPages
from optimizations.weights.hf_quantizer import ConvertWhileLoading
from optimizations.weights.kept import packed_modules
from pytest_inferencepio.catalog.configs import model_class
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.loading import load
from pytest_inferencepio.catalog.memory import weight_bytes

SPECS = ("weight_int8", "weight_int4(group_size=64)", "weight_nf4", "weight_int4(include_lm_head=false)")


def from_directory(name: str, directory, spec: str):
    quantized = ConvertWhileLoading(spec)
    return model_class(ENTRIES[name]).from_pretrained(
        directory, quantization_config=quantized, dtype=torch.bfloat16
    )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ENTRIES)
def test_loading_packs_to_the_same_bits_as_converting_afterwards(name, spec, tmp_path, new_runner):
    runner = new_runner(name, torch.bfloat16)
    runner.model.save_pretrained(tmp_path)
    loaded = from_directory(name, tmp_path, spec)
    apply_all(runner, parse(spec))
    wanted, got = runner.model.state_dict(), loaded.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)
    assert weight_bytes(loaded) == weight_bytes(runner.model)
    ids = torch.tensor([[3, 50, 700]])
    assert torch.equal(loaded(input_ids=ids).logits, runner.model(input_ids=ids).logits)


def test_per_expert_checkpoints_are_fused_and_packed(tmp_path, new_runner):
    """save_pretrained writes one tensor per expert, as the published checkpoints have them."""
    new_runner("qwen3_coder_30b", torch.bfloat16).model.save_pretrained(tmp_path)
    index = CheckpointIndex(tmp_path)
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in index.names
    loaded = from_directory("qwen3_coder_30b", tmp_path, "weight_int4")
    assert any("PackedExperts" in type(module).__name__ for _, module in packed_modules(loaded))


class CheckpointIndex:
    """Names in a one-file checkpoint."""

    def __init__(self, directory) -> None:
        raw = (directory / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        self.names = set(json.loads(raw[8 : 8 + length]))


def test_the_catalog_converts_checkpoints_while_loading_and_apply_is_then_the_identity(tmp_path):
    entry, parts = ENTRIES["qwen3_vl_2b"], parse("weight_int4")
    reference = load(entry, "tiny").runner
    reference.model.save_pretrained(tmp_path)
    reference.processor.save_pretrained(tmp_path)
    runner = load(entry, "full", checkpoint=str(tmp_path), optimizations=parts).runner
    before = {key: id(value) for key, value in runner.model.named_buffers()}
    undo = apply_all(runner, parts)
    assert {key: id(value) for key, value in runner.model.named_buffers()} == before
    undo()
    assert {key: id(value) for key, value in runner.model.named_buffers()} == before
    apply_all(reference, parts)
    ids = torch.tensor([[3, 50, 700]])
    assert torch.equal(runner.forward(input_ids=ids).logits, reference.forward(input_ids=ids).logits)


def test_nothing_of_the_checkpoint_stays_mapped(tmp_path, new_runner):
    new_runner("qwen3_4b_instruct_2507", torch.bfloat16).model.save_pretrained(tmp_path)
    model = from_directory("qwen3_4b_instruct_2507", tmp_path, "weight_int8")
    pages = CheckpointPages()
    assert not any(pages.holds(tensor) for tensor in [*model.parameters(), *model.buffers()])


def test_released_pages_are_read_again(tmp_path):
    values = torch.arange(100_000, dtype=torch.float32)
    save_file({"values": values}, tmp_path / "model.safetensors")
    mapped = torch.from_file(str(tmp_path / "model.safetensors"), size=25_000, dtype=torch.float32)
    pages = CheckpointPages()
    first = mapped.clone()
    assert pages.holds(mapped) and not pages.holds(first)
    pages.release()
    assert torch.equal(mapped, first)
    pages.own([mapped])
    assert not pages.holds(mapped)
    assert torch.equal(mapped, first)


def test_a_quantized_model_refuses_to_be_saved(tmp_path, new_runner):
    new_runner("qwen3_4b_instruct_2507", torch.bfloat16).model.save_pretrained(tmp_path)
    model = from_directory("qwen3_4b_instruct_2507", tmp_path, "weight_int8")
    with pytest.raises(ValueError, match="quantized with pio and is not serializable"):
        model.save_pretrained(tmp_path / "again")


def test_the_configuration_survives_json():
    config = ConvertWhileLoading("weight_int4(group_size=64)")
    assert ConvertWhileLoading(**json.loads(config.to_json_string())).techniques() == config.techniques()


def test_techniques_that_do_not_convert_are_refused():
    with pytest.raises(Refusal, match="prompt_lookup cannot be applied while loading; load the model first"):
        ConvertWhileLoading("prompt_lookup")
    with pytest.raises(
        UnknownOptimization, match="unknown optimization 'weight_int5'; did you mean weight_int"
    ):
        ConvertWhileLoading("weight_int5")


def test_refusals_come_before_any_tensor(tmp_path, new_runner):
    new_runner("qwen3_4b_instruct_2507", torch.bfloat16).model.save_pretrained(tmp_path)
    with pytest.raises(
        Refusal, match="weight_int4 refuses qwen3: it takes activations in bfloat16 or float32"
    ):
        model_class(ENTRIES["qwen3_4b_instruct_2507"]).from_pretrained(
            tmp_path, quantization_config=ConvertWhileLoading("weight_int4"), dtype=torch.float16
        )


PEAK = """
import gc, json, tempfile
from pathlib import Path
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, core_model_loading
from optimizations.weights.hf_quantizer import ConvertWhileLoading
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.loading import random_model
from pytest_inferencepio.catalog.memory import weight_bytes
from pytest_inferencepio.catalog.tiny import tiny_config

core_model_loading.GLOBAL_WORKERS = 4  # as from four cores on, whatever this machine has

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def quantized(config, directory):
    random_model(ENTRIES["qwen3_coder_30b"], config).save_pretrained(directory)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = Qwen3MoeForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=ConvertWhileLoading("weight_int4"))
    return {"grown": status("VmHWM") - before, "kept": status("VmRSS") - before, "packed": weight_bytes(model)}

config = Qwen3MoeConfig(vocab_size=16000, hidden_size=1024, num_hidden_layers=5, moe_intermediate_size=512,
                        num_experts=16, num_experts_per_tok=2, num_attention_heads=16, num_key_value_heads=4,
                        head_dim=64)
with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
    quantized(tiny_config("qwen3_coder_30b"), first)
    print(json.dumps(quantized(config, second)))
"""
CHECKPOINT = 344e6  # bytes of that model in bf16
LARGEST = 16 * 2 * 512 * 1024 * 2  # its gate_up_proj of one layer


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="resets the resident peak in /proc"
)
def test_peak_of_loading_is_the_packed_model_and_one_tensor_being_fused():
    # The same on every machine: torch threads have scratch memory, and malloc makes arenas by the number of cores.
    few = {**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run([sys.executable, "-c", PEAK], env=few, capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout.splitlines()[-1])
    assert peak["packed"] < 0.36 * CHECKPOINT
    # Resident peak, file pages included; transformers holds a fused tensor three times: single experts, stack, result.
    assert peak["grown"] < peak["packed"] + 3 * LARGEST + 32e6
    assert peak["grown"] < 0.8 * CHECKPOINT
    assert peak["kept"] < peak["packed"] + LARGEST + 32e6  # what the allocator has not returned
