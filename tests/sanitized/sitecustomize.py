"""On PYTHONPATH, gives this interpreter and its children the kernels of PIO_SANITIZED in place of the installed ones.

The installation stays as it is; no test and no module knows of this (`make sanitize`).
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location

MODULE = "optimizations._native"


class SanitizedFinder:
    """Answers for the compiled module alone."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_file_location(MODULE, os.environ["PIO_SANITIZED"]) if name == MODULE else None


sys.meta_path.insert(0, SanitizedFinder)
