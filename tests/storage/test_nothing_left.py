"""Processes that run no finalizer, as the children that measure memory and killed ones, leave no file behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stream_processes import run_in_child
from transformers import AutoModelForCausalLM

from optimizations.runner import Runner
from optimizations.session import apply_all
from optimizations.storage.layer_streaming import LayerStreaming, streaming_report
from optimizations.storage.stream_file import StreamWriter, plan
from pytest_inferencepio.catalog.tiny import tiny_config

ENDS = {
    "exit": (lambda: os._exit(0), 0),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
}
both_ends = pytest.mark.parametrize(("end", "code"), ENDS.values(), ids=ENDS)


@both_ends
def test_a_process_that_dies_while_streaming(end: Callable[[], object], code: int, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_4b_instruct_2507"))
    runner = Runner(model.bfloat16().eval(), SimpleNamespace(pad_token_id=0, eos_token_id=0))

    def work() -> None:
        apply_all(runner, [LayerStreaming(directory=str(tmp_path))])
        assert streaming_report(runner).file_bytes > 1e6

    assert run_in_child(work, end) == code
    assert not list(tmp_path.iterdir())


@both_ends
def test_a_process_that_dies_while_writing(end: Callable[[], object], code: int, tmp_path: Path) -> None:
    layers = [{"weight": torch.zeros(4096), "bias": torch.zeros(8)}]
    kept = []

    def work() -> None:
        writer = StreamWriter(str(tmp_path), plan(layers))
        writer.write(0, "weight", layers[0]["weight"])
        kept.append(writer)

    assert run_in_child(work, end) == code
    assert not list(tmp_path.iterdir())
