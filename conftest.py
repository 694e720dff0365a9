"""Keeps the repository's root off the import path.

The root holds `kernels/`, C++ only, and Hugging Face has a package of that name, which transformers and
bitsandbytes look for: with the root on the path they could find ours. pytest's prepend mode, `python -m pytest` and
editable installs all put it there.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

for package in ("optimizations", "pytest_inferencepio", "training"):
    importlib.import_module(package)  # once imported, a package finds its modules without the root
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
