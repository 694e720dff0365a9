"""llama.cpp's worker with a stand-in for its library: what it is asked, what it measures, how failures are told."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import LLAMA_CPP

from pytest_inferencepio.errors import MeasurementFailed
from pytest_inferencepio.peers.llama_cpp import WORKER
from pytest_inferencepio.peers.support import llama_worker
from pytest_inferencepio.peers.support.llama_worker import Engine
from pytest_inferencepio.peers.support.worker import Worker


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, in this process."""
    (tmp_path / "stand_in.py").write_text(LLAMA_CPP)
    spec = importlib.util.spec_from_file_location("llama_cpp", tmp_path / "stand_in.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return module


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """The real worker process, which finds the stand-in first."""
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    monkeypatch.syspath_prepend(tmp_path)
    found = Worker(WORKER, "llama.cpp", "rebuild it")
    yield found
    found.close()


def test_the_file_is_loaded_for_the_cpu_with_the_threads_asked_for(library: Any) -> None:
    engine = Engine("a.gguf", threads=3, context=300)
    assert library.calls == ["backend", ("load", b"a.gguf", 0), ("context", 300, 300, 3, 3)]
    assert engine.info() == "CPU : FAKE = 1 |"


def test_generation_is_greedy_from_an_empty_cache(library: Any) -> None:
    engine = Engine("a.gguf", threads=1, context=8)
    passed: list[list[int]] = []
    decode = library.llama_decode
    library.llama_decode = lambda context, tokens: passed.append(tokens) or decode(context, tokens)
    for _ in range(2):  # the second time as the first: the cache was cleared
        passed.clear()
        engine.generate([1, 2], new_tokens=3)
        assert passed == [[1, 2], [3], [6]]


def test_times_are_those_between_tokens(library: Any) -> None:
    engine = Engine("a.gguf", threads=1, context=8)
    ticks = iter([10.0, 12.0, 12.5, 13.5])
    found = engine.generate([1, 2], new_tokens=3, clock=lambda: next(ticks))
    assert found == {"first": 2.0, "gaps": [0.5, 1.0], "total": 3.5}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": "broken.gguf", "threads": 1, "context": 8}, "llama.cpp cannot load broken.gguf"),
        ({"path": "a.gguf", "threads": 1, "context": 200_000}, "cannot make a context of 200000 tokens"),
    ],
)
def test_what_cannot_be_loaded_is_said(library: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        Engine(**arguments)


def test_requests_are_answered_line_by_line_and_failures_end_nothing(library: Any) -> None:
    requests = [
        {"path": "a.gguf", "threads": 1, "context": 8},
        {"prompt": [1] * 400, "new_tokens": 2},
        {"prompt": [1, 2], "new_tokens": 2},
    ]
    replies = io.StringIO()
    llama_worker.serve(io.StringIO("\n".join(map(json.dumps, requests))), replies)
    loaded, failed, generated = map(json.loads, replies.getvalue().splitlines())
    assert loaded == {"info": "CPU : FAKE = 1 |"}
    assert failed == {"error": "RuntimeError: llama_decode of 400 tokens returned 1"}
    assert len(generated["gaps"]) == 1


def test_a_process_answers_with_times_of_its_own(worker: Worker) -> None:
    assert worker.ask({"path": "a.gguf", "threads": 1, "context": 8}) == {"info": "CPU : FAKE = 1 |"}
    found = worker.ask({"prompt": [1, 2], "new_tokens": 3})
    assert len(found["gaps"]) == 2 and min(found["first"], *found["gaps"]) > 0
    assert found["total"] == pytest.approx(found["first"] + sum(found["gaps"]))


def test_an_error_of_the_library_is_told_and_the_process_goes_on(worker: Worker) -> None:
    with pytest.raises(
        MeasurementFailed, match=r"llama.cpp failed: RuntimeError: llama.cpp cannot load broken"
    ):
        worker.ask({"path": "broken.gguf", "threads": 1, "context": 8})
    assert "info" in worker.ask({"path": "a.gguf", "threads": 1, "context": 8})


def test_an_abort_ends_the_worker_not_the_run(worker: Worker) -> None:
    worker.ask({"path": "a.gguf", "threads": 1, "context": 8})
    with pytest.raises(MeasurementFailed, match=r"llama.cpp ended \(signal SIGABRT; rebuild it\)"):
        worker.ask({"prompt": [12], "new_tokens": 2})
    with pytest.raises(MeasurementFailed, match="ended"):
        worker.ask({"prompt": [1], "new_tokens": 2})


def test_silence_is_no_answer(worker: Worker) -> None:
    with pytest.raises(MeasurementFailed, match="llama.cpp did not answer within 0 s"):
        worker.ask({"path": "a.gguf", "threads": 1, "context": 8}, timeout=0.0)


def test_what_a_module_prints_before_it_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends_at_once.py").write_text("import sys\nsys.exit('no luck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    worker = Worker("ends_at_once", "somebody")
    with pytest.raises(MeasurementFailed, match=r"somebody ended \(status 1\)\nno luck"):
        worker.ask({})
    worker.close()
    worker.close()
