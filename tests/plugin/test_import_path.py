"""The root of the repository stays off the import path: its kernels/ has the name of Hugging Face's package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from transformers.utils import is_kernels_available

from pytest_inferencepio import collection

ROOT = Path(__file__).resolve().parents[2]


def test_the_root_is_not_on_the_path() -> None:
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]


def test_nothing_finds_our_kernels_as_a_package() -> None:
    """Neither Python nor transformers; an installed package of that name may be found."""
    spec = importlib.util.find_spec("kernels")
    places = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin or ""]
    assert not any(Path(place).resolve().is_relative_to(ROOT / "kernels") for place in places)
    assert is_kernels_available() == (spec is not None)


def test_the_kernels_folder_holds_no_python() -> None:
    assert not list((ROOT / "kernels").rglob("*.py"))


def test_modules_of_the_suite_are_imported_under_their_package() -> None:
    for path in collection.SUITE.glob("test_*.py"):
        assert importlib.import_module(f"pytest_inferencepio.suite.{path.stem}").__file__ == str(path)
