"""Random weights: seeded, complete, and never more memory than the model and one tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.session import apply_all
from optimizations.weights.packed_modules import PackedExperts, PackedLinear
from pytest_inferencepio.catalog import random_weights
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.loading import random_model
from pytest_inferencepio.catalog.random_weights import BLOCK, PIECE_BYTES, RandomTensors
from pytest_inferencepio.catalog.tiny import tiny_config


@pytest.mark.parametrize("name", ENTRIES)
def test_random_models_run_and_have_the_buffers_of_a_built_one(name):
    model = random_model(ENTRIES[name], tiny_config(name))
    built = type(model)(tiny_config(name))
    mine = dict(model.named_buffers())
    for buffer_name, buffer in built.named_buffers():
        assert torch.equal(mine[buffer_name], buffer), buffer_name
    logits = model(input_ids=torch.tensor([[1, 2, 3, 40]])).logits
    assert logits.isfinite().all()
    assert logits.float().std() > 0


def test_ties_are_kept():
    model = random_model(ENTRIES["qwen3_vl_2b"], tiny_config("qwen3_vl_2b"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_seeds_decide_the_values():
    entry, config = ENTRIES["qwen3_4b_instruct_2507"], tiny_config("qwen3_4b_instruct_2507")
    first, again, other = (random_model(entry, config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_matrices_are_normal_norms_one_biases_zero_and_rows_differ():
    source = RandomTensors(seed=0, dtype=torch.float32)
    matrix = source.like("a.weight", torch.empty(3000, 1024, device="meta"), "cpu")
    assert matrix.numel() > 2 * BLOCK
    assert abs(matrix.std().item() - 0.02) < 1e-4
    assert matrix.unique(dim=0).shape[0] == 3000
    assert torch.equal(source.like("n.weight", torch.empty(8, device="meta"), "cpu"), torch.ones(8))
    assert torch.equal(source.like("n.bias", torch.empty(8, device="meta"), "cpu"), torch.zeros(8))


PEAK = """
import gc, json, sys
from pathlib import Path
from transformers import Qwen3Config
from optimizations.registry import parse
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.loading import random_model
from pytest_inferencepio.catalog.memory import weight_bytes
from pytest_inferencepio.catalog.tiny import tiny_config

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def measure(spec):
    converting = parse(spec) if spec != "none" else []
    random_model(entry, tiny_config(entry.name), converting=converting)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = random_model(entry, config, converting=converting)
    return {"grown": status("VmHWM") - before, "weights": weight_bytes(model), "largest": 64000 * 1024 * 2}

entry = ENTRIES["qwen3_4b_instruct_2507"]
config = Qwen3Config(vocab_size=64000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6,
                     num_attention_heads=16, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)
print(json.dumps({spec: measure(spec) for spec in sys.argv[1:]}))
"""


@pytest.fixture(scope="module")
def peaks() -> dict[str, dict[str, int]]:
    """Growth of a fresh process's resident peak while it makes a 0.34 GB model, in bytes, per specification."""
    command = [sys.executable, "-c", PEAK, "none", "weight_int4", "weight_int8"]
    # The same on every machine: torch threads have scratch memory, and malloc makes arenas by the number of cores.
    few = {**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, env=few, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


LINUX = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="resets the resident peak in /proc"
)


@LINUX
def test_peak_is_the_model_and_one_tensor(peaks):
    peak = peaks["none"]
    assert peak["weights"] > 250e6
    assert peak["grown"] < peak["weights"] + peak["largest"] + 32e6  # 32 MB: allocator and Python


@LINUX
@pytest.mark.parametrize("spec", ["weight_int4", "weight_int8"])
def test_a_model_converted_while_loading_never_exists_unconverted(peaks, spec):
    peak = peaks[spec]
    assert peak["weights"] < 0.55 * peaks["none"]["weights"]
    assert peak["largest"] > 1.9 * PIECE_BYTES
    assert peak["grown"] < peak["weights"] + PIECE_BYTES + 32e6
    assert peak["grown"] < 0.9 * peaks["none"]["weights"]


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize(
    "spec", ["weight_int4", "weight_int8(quantize_embedding=true)", "weight_nf4", "none"]
)
def test_pieces_give_the_same_bits_as_whole_tensors(monkeypatch, name, spec):
    entry, config, parts = ENTRIES[name], tiny_config(name), [] if spec == "none" else parse(spec)
    whole = random_model(entry, config, converting=parts).state_dict()
    loaded = []
    monkeypatch.setattr(random_weights, "PIECE_BYTES", 20_000)
    for kind in (PackedLinear, PackedExperts):
        original = kind.load_piece
        monkeypatch.setattr(
            kind,
            "load_piece",
            lambda module, *args, original=original: (loaded.append(args[1]), original(module, *args))[1],
        )
    in_pieces = random_model(entry, config, converting=parts).state_dict()
    assert (max(loaded, default=0) > 0) == (spec != "none")
    assert whole.keys() == in_pieces.keys()
    assert all(torch.equal(value, in_pieces[key]) for key, value in whole.items())


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("spec", ["weight_int4", "weight_int8(quantize_embedding=true)"])
def test_random_models_convert_while_they_are_made_to_the_same_bits(name, spec):
    entry, config, parts = ENTRIES[name], tiny_config(name), parse(spec)
    while_made = random_model(entry, config, converting=parts)
    runner = Runner(random_model(entry, config), None)
    apply_all(runner, parts)
    afterwards = runner.model.state_dict()
    assert afterwards.keys() == while_made.state_dict().keys()
    assert all(torch.equal(value, afterwards[key]) for key, value in while_made.state_dict().items())
