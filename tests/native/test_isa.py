"""Choice of the instruction set: found, forced, refused in words."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from optimizations.native.loader import native

REPORT = "import optimizations._native as n; print(n.isa(), ','.join(n.available_isas()))"


def run_with(isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REPORT],
        env={**os.environ, "PIO_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


def test_portable_is_always_there_and_the_best_is_last() -> None:
    assert native().available_isas()[0] == "portable"
    assert run_with("auto").stdout.split()[0] == native().available_isas()[-1]


@pytest.mark.parametrize("name", native().available_isas())
def test_environment_forces_the_set(name: str) -> None:
    assert run_with(name).stdout.split()[0] == name


def test_empty_environment_means_the_best() -> None:
    assert run_with("").stdout.split()[0] == native().available_isas()[-1]


def test_unknown_name_in_the_environment_lists_what_there_is() -> None:
    result = run_with("sse9")
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert "PIO_ISA='sse9' is not an instruction set this machine can run" in result.stderr
    assert ", ".join(native().available_isas()) in result.stderr


def test_set_isa_switches_and_reports(isa: str) -> None:
    assert native().isa() == isa


@pytest.mark.parametrize("name", ["", "AVX2", "neon2"])
def test_set_isa_refuses_unknown_names(name: str) -> None:
    before = native().isa()
    with pytest.raises(
        ValueError, match="set_isa: .* is not an instruction set this machine can run; there is"
    ):
        native().set_isa(name)
    assert native().isa() == before
