"""The fingerprint, and the ceilings that no figure may exceed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pytest_inferencepio import machine
from pytest_inferencepio.errors import ImpossibleFigure
from pytest_inferencepio.machine import Fingerprint, Rate, Work
from pytest_inferencepio.record import metric, not_measured

MIB = 1 << 20


@pytest.fixture
def known() -> Fingerprint:
    """100 GB/s up to 1 MiB, 50 at 16 MiB, 10 at 256 MiB; 1 TOP/s."""
    bandwidth = {MIB: Rate(100e9, 5), 16 * MIB: Rate(50e9, 5), 256 * MIB: Rate(10e9, 5)}
    bare = machine.fingerprint(measure=False)
    return dataclasses.replace(
        bare, read_bandwidth=bandwidth, arithmetic={"float32": Rate(5e11, 3), "int8": Rate(1e12, 3)}
    )


def test_the_fingerprint_says_what_this_machine_is() -> None:
    found = machine.fingerprint(measure=False)
    assert found.cpu and found.isa and found.cores >= 1 and found.threads >= 1
    assert found.memory > 1 << 28
    assert set(found.versions) == {"torch", "transformers", "pytest-inferencepio"}
    assert found.read_bandwidth == {} and found.arithmetic == {}


def test_the_mapping_is_json_and_keeps_every_field(known: Fingerprint) -> None:
    plain = json.loads(json.dumps(known.to_mapping()))
    assert plain.keys() == {field.name for field in dataclasses.fields(known)} | {"machine_class"}
    assert plain["read_bandwidth"][str(MIB)] == {"value": 100e9, "n": 5}
    assert plain["machine_class"] == machine.machine_class(known.to_mapping())


def test_the_class_ignores_memory_and_patch_releases_but_not_processor_isa_or_threads(
    known: Fingerprint,
) -> None:
    known = dataclasses.replace(known, versions={"torch": "2.13.0+cpu"})

    def class_with(**changes: object) -> str:
        return machine.machine_class(dataclasses.replace(known, **changes).to_mapping())  # type: ignore[arg-type]

    same = machine.machine_class(known.to_mapping())
    assert class_with(memory=1, commit="other", versions={"torch": "2.13.1"}) == same
    for change in (
        {"cpu": "x"},
        {"isa": "x"},
        {"threads": known.threads + 1},
        {"device": "x"},
        {"versions": {"torch": "2.14"}},
    ):
        assert class_with(**change) != same


def test_measured_once_and_remembered_with_the_higher_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_inferencepio.measure import rates

    readings = iter([3e9, 2e9, 5e9])
    monkeypatch.setattr(rates, "read_bandwidth", lambda device: {MIB: Rate(next(readings), 1)})
    monkeypatch.setattr(rates, "arithmetic", lambda device: {"float32": Rate(1e9, 1)})
    monkeypatch.setattr(machine, "_known", {})
    assert machine.fingerprint() is machine.fingerprint()
    assert machine.remeasured().read_bandwidth[MIB].value == 3e9
    assert machine.remeasured().read_bandwidth[MIB].value == 5e9
    assert machine.fingerprint().read_bandwidth[MIB].value == 5e9


def test_memory_is_read_again_at_the_largest_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_inferencepio.measure import rates

    sizes: list[tuple[int, ...] | None] = []
    readings = iter([3e9, 5e9, 4e9])

    def read(device: str, wanted: tuple[int, ...] | None = None) -> dict[int, Rate]:
        sizes.append(wanted)
        value = next(readings)
        return {size: Rate(value, 1) for size in wanted or (MIB, 4 * MIB)}

    monkeypatch.setattr(rates, "read_bandwidth", read)
    monkeypatch.setattr(rates, "arithmetic", lambda device: {"float32": Rate(1e9, 1)})
    monkeypatch.setattr(machine, "_known", {})
    for ceiling in (5e9, 5e9):
        machine.reread()
        assert machine.fingerprint().read_bandwidth[4 * MIB].value == ceiling
    assert machine.fingerprint().read_bandwidth[MIB].value == 3e9
    assert sizes == [None, (4 * MIB,), (4 * MIB,)]


@pytest.mark.parametrize(
    ("working_set", "bandwidth"),
    [(1, 100e9), (MIB, 100e9), (15 * MIB, 100e9), (16 * MIB, 50e9), (1 << 40, 10e9)],
)
def test_the_bandwidth_ceiling_is_that_of_the_next_smaller_size(
    known: Fingerprint, working_set: int, bandwidth: float
) -> None:
    assert known.bandwidth_at(working_set) == bandwidth


WORK = Work(bytes_per_step=256 * MIB, flops_per_token=1e9, tokens_per_step=1.0)


def test_figures_below_the_ceilings_pass(known: Fingerprint) -> None:
    metrics = {
        "memory_bandwidth": metric("memory_bandwidth", 9.9e9),
        "decode_tokens_per_second": metric("decode_tokens_per_second", 36.0),
        "prefill_tokens_per_second": metric("prefill_tokens_per_second", 999.0),
        "output_tokens_per_second": not_measured("output_tokens_per_second", "no load"),
    }
    assert machine.ceiling_violations(metrics, WORK, known) == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("memory_bandwidth", 1.01e10, "memory_bandwidth of 1.01e+10 B/s exceeds 1e+10"),
        ("decode_tokens_per_second", 38.0, "exceeds 37.25, what reading and computing the weights allow"),
        ("output_tokens_per_second", 38.0, "exceeds 37.25, what reading and computing the weights allow"),
        ("prefill_tokens_per_second", 1001.0, "exceeds 1000, what the measured arithmetic allows"),
    ],
)
def test_figures_above_the_ceilings_are_named(known: Fingerprint, name: str, value: float, said: str) -> None:
    (violation,) = machine.ceiling_violations({name: metric(name, value)}, WORK, known)
    assert said in violation


def test_a_batch_reads_its_weights_once_but_computes_every_row(known: Fingerprint) -> None:
    batch = dataclasses.replace(WORK, tokens_per_step=8.0)
    rate = {"output_tokens_per_second": metric("output_tokens_per_second", 290.0)}
    assert machine.ceiling_violations(rate, batch, known) == []
    assert machine.ceiling_violations(rate, dataclasses.replace(batch, flops_per_token=4e9), known)


def test_impossible_figures_are_refused_after_measuring_the_ceiling_again(
    known: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster = dataclasses.replace(known, read_bandwidth={MIB: Rate(12e9, 5)})
    monkeypatch.setattr(machine, "fingerprint", lambda device: known)
    monkeypatch.setattr(machine, "remeasured", lambda device: faster)
    machine.require_possible({"memory_bandwidth": metric("memory_bandwidth", 11e9)}, WORK)
    with pytest.raises(ImpossibleFigure, match=r"exceeds 1.2e\+10, .* its bytes are counted wrongly"):
        machine.require_possible({"memory_bandwidth": metric("memory_bandwidth", 13e9)}, WORK)


def test_processors_are_told_apart_by_family_model_and_stepping(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("cpu family : 25\nmodel : 17\nmodel name : AMD EPYC\nstepping : 1\nflags : avx2 fma\n\n")
    assert machine.read_cpu(path) == ("AMD EPYC (25/17/1)", {"avx2", "fma"})


def test_processors_without_a_description_have_the_platforms_name(tmp_path: Path) -> None:
    name, flags = machine.read_cpu(tmp_path / "missing")
    assert name and flags == set()


@pytest.fixture
def own_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git that sees neither this user's settings nor a repository around the temporary directory or this process."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # of a hook, which runs the tests
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


@pytest.mark.usefixtures("own_git")
def test_the_commit_and_whether_files_differ(tmp_path: Path) -> None:
    assert machine.read_commit(tmp_path) == (None, None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    commit, dirty = machine.read_commit(tmp_path)
    assert commit is not None and len(commit) == 40 and dirty is False
    (tmp_path / "file").write_text("two")
    assert machine.read_commit(tmp_path) == (commit, True)
