"""Finding classes of a kind in the modules of a package and in installed entry points."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any


def classes_in(package: str, base: type) -> Iterator[type[Any]]:
    """Concrete subclasses of `base` that the modules of `package` define; imports every module, no subpackage."""
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__, f"{package}."):
        if info.ispkg:
            continue
        module = importlib.import_module(info.name)
        for _, member in inspect.getmembers(module, inspect.isclass):
            defined_here = member.__module__ == module.__name__
            if defined_here and issubclass(member, base) and not inspect.isabstract(member):
                yield member


def installed(group: str) -> Iterator[Any]:
    """What the entry points of `group` name, loaded."""
    for entry in importlib.metadata.entry_points(group=group):
        yield entry.load()
