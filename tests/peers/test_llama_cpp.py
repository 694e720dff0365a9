"""llama.cpp itself on tiny files, where llama-cpp-python and gguf are installed; its session without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import LLAMA_CPP

from pytest_inferencepio.catalog.configs import full_config
from pytest_inferencepio.models import LoadRequest, catalog_models, choose
from pytest_inferencepio.peers.contract import PeerRequest
from pytest_inferencepio.peers.llama_cpp import LlamaCpp
from pytest_inferencepio.peers.support import gguf_file, gguf_plan

REAL = ("qwen3_4b_instruct_2507", "qwen3_coder_30b")


def request_for(name: str, scale: str = "tiny") -> PeerRequest:
    (model,) = choose([name], catalog_models())
    return PeerRequest(model, LoadRequest(scale), threads=1, context=24)


@pytest.mark.parametrize("name", REAL)
def test_llama_cpp_runs_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = LlamaCpp()
    if reason := peer.missing():
        pytest.skip(reason)
    monkeypatch.setenv("PIO_CACHE_DIR", str(tmp_path))
    session = peer.open(request_for(name))
    try:
        found = session.generate(list(range(20)), 4)
    finally:
        session.close()
    assert found.prompt_tokens == 20 and len(found.gaps) == 3 and min(found.gaps) > 0
    assert session.notes[0].startswith("llama_cpp: llama-cpp-python ")


def test_a_session_times_in_the_worker_and_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gguf_file, "file_of", lambda plan: tmp_path / "a.gguf")
    monkeypatch.setattr(LlamaCpp, "version", lambda self: "llama-cpp-python 0.0")
    session = LlamaCpp().open(request_for("qwen3_coder_30b"))
    found = session.generate([1, 2], 3)
    assert found.prompt_tokens == 2 and len(found.gaps) == 2
    assert found.total == pytest.approx(found.time_to_first_token + sum(found.gaps))
    (note,) = session.notes
    assert note.startswith("llama_cpp: llama-cpp-python 0.0, qwen3moe, Q4_0 of ") and note.endswith(
        "CPU : FAKE = 1 |"
    )
    session.close()
    session.close()


def test_memory_is_the_file_and_room_to_work() -> None:
    planned = gguf_plan.plan(full_config("qwen3_coder_30b")).nbytes
    assert planned < LlamaCpp().memory(request_for("qwen3_coder_30b", "full")) < planned + 2**30


def test_a_file_that_cannot_be_loaded_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_inferencepio.errors import MeasurementFailed
    from pytest_inferencepio.peers.support import worker

    closed: list[Any] = []
    monkeypatch.setattr(
        worker.Worker, "close", lambda self, close=worker.Worker.close: (closed.append(self), close(self))
    )
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gguf_file, "file_of", lambda plan: tmp_path / "broken.gguf")
    monkeypatch.setattr(LlamaCpp, "version", lambda self: "llama-cpp-python 0.0")
    with pytest.raises(MeasurementFailed, match="cannot load"):
        LlamaCpp().open(request_for("qwen3_coder_30b"))
    assert len(closed) == 1
