"""Finds `optimizations._native`, the compiled kernels."""

from __future__ import annotations

import functools
import importlib
import sysconfig
from types import ModuleType

from optimizations.errors import NativeModuleMissing

MODULE = "optimizations._native"


@functools.cache
def native() -> ModuleType:
    """The compiled module.

    Raises:
        NativeModuleMissing: it is not installed, or was built for another Python.
        ImportError: it is there and refuses to load, for instance because PIO_ISA names an unknown set.
    """
    try:
        return importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        raise NativeModuleMissing(
            f"The compiled kernels were not found: looked for the module {MODULE} (a file _native{suffix} in the "
            "installed package `optimizations`). Build them with `pip install -e .` in the repository (needs a C++ "
            "compiler), or run `make bench`, which does it."
        ) from error
