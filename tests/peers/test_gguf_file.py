"""Random GGUF files: whole or not there, never without room; read back by gguf itself where it is installed."""

from __future__ import annotations

import os
import shutil
import sys
import types
from collections import namedtuple
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from transformers import Qwen3Config

from pytest_inferencepio.catalog.tiny import tiny_config
from pytest_inferencepio.errors import NotMeasurable
from pytest_inferencepio.peers.support import gguf_file, gguf_plan
from pytest_inferencepio.peers.support.gguf_plan import GgufPlan

Usage = namedtuple("Usage", "total used free")


class Writer:
    """Stands in for `gguf.GGUFWriter`: writes the tensors' bytes behind one another, keeps the keys."""

    made: ClassVar[list[Writer]] = []
    fails_after: ClassVar[int] = 10**9

    def __init__(self, path: Path, architecture: str) -> None:
        self.path, self.keys, self.announced = path, {"architecture": architecture}, []
        self.stream = path.open("wb")
        Writer.made.append(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("add_"):
            return lambda value: self.keys.__setitem__(name.removeprefix("add_"), value)
        if name.startswith("write_"):
            return lambda: None
        raise AttributeError(name)

    def add_tensor_info(self, name: str, shape: Any, dtype: Any, nbytes: int, raw_dtype: Any = None) -> None:
        self.announced.append((name, tuple(shape), dtype, nbytes, raw_dtype))

    def write_tensor_data(self, data: np.ndarray) -> None:
        if self.stream.tell() > Writer.fails_after:
            raise OSError(28, "No space left on device")
        _, shape, dtype, nbytes, _ = self.announced.pop(0)
        assert (data.shape, data.dtype, data.nbytes) == (shape, dtype, nbytes)
        data.tofile(self.stream)

    def close(self) -> None:
        self.stream.close()


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> type[Writer]:
    """The module `gguf`, replaced."""
    module: Any = types.ModuleType("gguf")
    module.GGUFWriter = Writer
    module.LlamaFileType = types.SimpleNamespace(MOSTLY_Q4_0=2)
    module.GGMLQuantizationType = types.SimpleNamespace(Q4_0=2, Q8_0=8, Q6_K=14)
    monkeypatch.setitem(sys.modules, "gguf", module)
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setattr(Writer, "fails_after", 10**9)
    return Writer


@pytest.fixture
def small() -> GgufPlan:
    config = Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=50, tie_word_embeddings=True,
    )  # fmt: skip
    return gguf_plan.plan(config)


def test_a_file_is_written_once(tmp_path: Path, writer: type[Writer], small: GgufPlan) -> None:
    path = gguf_file.file_of(small, tmp_path / "below")
    assert path == tmp_path / "below" / small.file_name
    assert path.stat().st_size == small.nbytes
    assert path.stat().st_mode & 0o777 == 0o644
    assert gguf_file.file_of(small, tmp_path / "below") == path
    (made,) = writer.made
    assert made.keys["architecture"] == "qwen3" and made.keys["block_count"] == 1
    assert made.keys["file_type"] == 2 and made.keys["tokenizer_model"] == "none"
    assert made.keys["head_count_kv"] == 1 and made.keys["vocab_size"] == 50
    assert [each.name for each in path.parent.iterdir()] == [small.file_name]


def test_a_shorter_file_is_written_again(tmp_path: Path, writer: type[Writer], small: GgufPlan) -> None:
    (tmp_path / small.file_name).write_bytes(b"half")
    assert gguf_file.file_of(small, tmp_path).stat().st_size == small.nbytes


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path, writer: type[Writer], small: GgufPlan) -> None:
    one, other = (gguf_file.file_of(small, tmp_path / name).read_bytes() for name in ("a", "b"))
    assert one == other


def test_a_failure_leaves_nothing_behind(tmp_path: Path, writer: type[Writer], small: GgufPlan) -> None:
    writer.fails_after = 1000
    with pytest.raises(NotMeasurable, match="cannot be written into .*No space left.*; set PIO_CACHE_DIR"):
        gguf_file.file_of(small, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_writing(
    tmp_path: Path, writer: type[Writer], small: GgufPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(1, 1, gguf_file.ROOM_LEFT))
    with pytest.raises(NotMeasurable, match="needs 0.00 GB and .* has 0.27 GB free .*set PIO_CACHE_DIR"):
        gguf_file.file_of(small, tmp_path)
    assert writer.made == [] and list(tmp_path.iterdir()) == []


def test_the_cache_lies_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PIO_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gguf_file.cache_directory() == tmp_path / "pytest-inferencepio" / "gguf"
    monkeypatch.setenv("PIO_CACHE_DIR", "~/elsewhere")
    assert gguf_file.cache_directory() == Path(os.path.expanduser("~/elsewhere"))


@pytest.mark.parametrize("name", ["qwen3_4b_instruct_2507", "qwen3_coder_30b"])
def test_gguf_reads_back_finite_weights_of_the_planned_shapes(tmp_path: Path, name: str) -> None:
    gguf = pytest.importorskip(
        "gguf", reason="gguf is not installed: pip install 'pytest-inferencepio[peers]'"
    )
    plan = gguf_plan.plan(tiny_config(name))
    reader = gguf.GGUFReader(gguf_file.file_of(plan, tmp_path))
    assert [tensor.name for tensor in reader.tensors] == [tensor.name for tensor in plan.tensors]
    for read, planned in zip(reader.tensors, plan.tensors, strict=True):
        assert tuple(int(size) for size in reversed(read.shape)) == planned.shape
        values = gguf.dequantize(read.data, read.tensor_type)
        assert np.isfinite(values).all()
        if len(planned.shape) > 1:
            assert 0.01 < values.std() < 0.04, planned.name
