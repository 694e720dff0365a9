"""Loading a model straight to disk: by the catalog's random weights, and by transformers' own loading."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stream_processes import open_files

from optimizations.errors import Refusal
from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.storage.layer_streaming import LayerStreaming, streaming_report
from optimizations.storage.unnamed_file import StreamError
from pytest_inferencepio.catalog.configs import meta_model
from pytest_inferencepio.catalog.entries import lookup
from pytest_inferencepio.catalog.loading import random_model
from pytest_inferencepio.catalog.memory import config_need
from pytest_inferencepio.catalog.tiny import TINY, tiny_config

DENSE = "qwen3_4b_instruct_2507"


def runner_of(name: str, spec: str | None, directory: Path) -> Runner:
    parts = parse(spec) if spec else []
    converting = [*parts, LayerStreaming(directory=str(directory))] if spec is not None else []
    model = random_model(lookup(name), tiny_config(name), converting=converting)
    return Runner(model, SimpleNamespace(pad_token_id=0, eos_token_id=0))


def logits(runner: Runner) -> torch.Tensor:
    ids = torch.arange(8, 20)[None]
    return runner.forward(input_ids=ids).logits


@pytest.mark.parametrize("name", TINY)
def test_a_model_loaded_to_disk_computes_the_same(name: str, tmp_path: Path) -> None:
    expected = logits(runner_of(name, None, tmp_path))
    runner = runner_of(name, "", tmp_path)
    technique = LayerStreaming(directory=str(tmp_path))
    undo = technique.apply(runner)
    assert torch.equal(logits(runner), expected)
    undo()  # loaded to disk: nothing to go back to
    technique.apply(runner)()  # nothing to do twice either
    assert torch.equal(logits(runner), expected)
    assert streaming_report(runner).passes == 2
    assert not [each for each in runner.model.modules() if "load_weight" in each.__dict__]


def test_packed_layers_go_to_disk_after_packing(tmp_path: Path) -> None:
    packed = random_model(lookup(DENSE), tiny_config(DENSE), converting=parse("weight_int8"))
    expected = logits(Runner(packed, None))
    runner = runner_of(DENSE, "weight_int8", tmp_path)
    undo = LayerStreaming(directory=str(tmp_path)).apply(runner)
    assert torch.equal(logits(runner), expected)
    assert streaming_report(runner).bytes_per_pass > 1e6
    undo()
    assert torch.equal(logits(runner), expected)


def test_the_need_for_memory_is_the_ring_instead_of_the_layers(tmp_path: Path) -> None:
    entry, config = lookup(DENSE), tiny_config(DENSE)
    technique = LayerStreaming(directory=str(tmp_path), buffers=2)
    layers = meta_model(entry, config, torch.bfloat16).model.layers
    saved = config_need(entry, config, "bfloat16") - config_need(entry, config, "bfloat16", [technique])
    assert saved == sum(parameter.nbytes for layer in layers[2:] for parameter in layer.parameters())
    assert not list(tmp_path.iterdir())  # asking costs no file


def test_a_weight_that_never_came_is_an_error(tmp_path: Path) -> None:
    model: Any = meta_model(lookup(DENSE), tiny_config(DENSE), torch.bfloat16)
    technique = LayerStreaming(directory=str(tmp_path))
    technique.convert_meta(model)
    with pytest.raises(Refusal, match="already takes this model's weights"):
        technique.convert_meta(model)
    attention = model.model.layers[0].self_attn
    attention.q_norm.load_weight("weight", torch.ones(64, dtype=torch.bfloat16))
    with pytest.raises(StreamError, match="layer 0's .* was never written"):
        technique.apply(Runner(model, None))
    assert open_files(tmp_path)
    del model, attention
    gc.collect()
    assert not open_files(tmp_path)  # an unfinished file goes with its model
