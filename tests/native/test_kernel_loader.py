"""The compiled module: what happens without it, and that its sources shadow nobody."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

WITHOUT_MODULE = """
import sys
sys.modules["optimizations._native"] = None  # import machinery: as if it were not installed
import torch
from optimizations.native.linear import linear
from optimizations.native.packing import Packed
from optimizations.native.ops import linear_op
weight = Packed(torch.zeros(1, 1, 256, dtype=torch.uint8), torch.zeros(1, 1, 16, dtype=torch.bfloat16), 16, 32, 4, 32)
print("imported")
linear(torch.zeros(1, 32), weight)
"""


def test_missing_module_is_an_error_of_the_call_not_of_the_import() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_MODULE], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "imported"
    last = result.stderr.strip().splitlines()[-1]
    assert "NativeModuleMissing" in last
    assert "optimizations._native" in last
    assert "pip install -e ." in last


def test_importing_optimizations_loads_neither_torch_nor_kernels() -> None:
    code = "import sys, optimizations; print('torch' in sys.modules, 'optimizations._native' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_the_folder_kernels_is_no_package() -> None:
    folder = Path(__file__).resolve().parents[2] / "kernels"
    assert not list(folder.rglob("*.py"))
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.loader is None or Path(str(spec.origin)).parent != folder
    if spec is None or spec.origin is None:
        assert not import_utils.is_kernels_available()


@pytest.mark.parametrize("bad", ["1 +", "import optimizations._nativ"])
def test_other_import_errors_are_not_disguised(bad: str, tmp_path: Path) -> None:
    package = tmp_path / "broken.py"
    package.write_text(bad)
    code = (
        "import sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('optimizations._native', {str(package)!r})\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return spec if name == 'optimizations._native' else None\n"
        "import optimizations\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from optimizations.native.loader import native\n"
        "native()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "NativeModuleMissing" not in result.stderr
