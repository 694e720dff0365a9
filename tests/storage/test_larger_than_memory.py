from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("larger_than_memory.py")
ROOT = SCRIPT.parents[2]


def fresh_process(directory: Path, how: str) -> subprocess.CompletedProcess[str]:
    # One malloc arena: each thread's own would reserve 64 MiB of address space that no memory stands behind.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(directory), how]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    done = fresh_process(tmp_path_factory.mktemp("unlimited"), "unlimited")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_larger_than_its_memory_runs_from_disk(tmp_path: Path, resident: dict[str, object]) -> None:
    done = fresh_process(tmp_path, "streamed")
    assert done.returncode == 0, done.stderr
    streamed = json.loads(done.stdout.splitlines()[-1])
    assert streamed["size"] > 250e6
    assert streamed["grown"] < 0.5 * streamed["size"]
    assert streamed["bytes_per_pass"] > 0.95 * streamed["size"]
    assert streamed["passes"] == 4
    assert (streamed["tokens"], streamed["logits"]) == (resident["tokens"], resident["logits"])
    assert not list(tmp_path.iterdir())  # gone with the process


def test_without_streaming_it_does_not_fit(tmp_path: Path, resident: dict[str, object]) -> None:
    assert resident["grown"] > 0.9 * resident["size"]  # type: ignore[operator]
    done = fresh_process(tmp_path, "resident")
    assert done.returncode != 0
    assert "allocate memory" in done.stderr
