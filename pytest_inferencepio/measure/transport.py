"""Carrying techniques that a conftest or another package adds into fresh processes, which import none of it."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterable

from optimizations.contract import Optimization
from optimizations.registry import register, techniques
from pytest_inferencepio.errors import NotMeasurable

HOME = "optimizations."


def foreign_techniques(parts: Iterable[Optimization]) -> list[list[str]]:
    """Module name, file and class of every part that discovery does not find by itself; plain JSON.

    Raises:
        NotMeasurable: a class defined inside a function, which no other process can reach.
    """
    found = []
    for part in parts:
        technique = type(part)
        if technique.__module__.startswith(HOME):
            continue
        if "<locals>" in technique.__qualname__:
            raise NotMeasurable(
                f"{part.name} is defined inside a function, so a fresh process cannot load it; "
                "define it at the top of a module"
            )
        found.append([technique.__module__, inspect.getfile(technique), technique.__qualname__])
    return found


def register_foreign(listing: Iterable[Iterable[str]]) -> None:
    """Load each file of `foreign_techniques` under its module's name and register its class."""
    for module_name, file, qualname in listing:
        if module_name not in sys.modules:
            spec = importlib.util.spec_from_file_location(module_name, file)
            if spec is None or spec.loader is None:
                raise NotMeasurable(f"{file} is no Python source that a fresh process can load")
            sys.modules[module_name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module_name])
        technique = getattr(sys.modules[module_name], qualname)
        if technique.name not in techniques():
            register(technique)
