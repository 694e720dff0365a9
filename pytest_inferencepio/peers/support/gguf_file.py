"""Random-weight GGUF files, written once per dimensions into a cache directory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pytest_inferencepio.errors import NotMeasurable
from pytest_inferencepio.peers.support.gguf_plan import BLOCKS, GgufPlan, TensorPlan

CACHE_VARIABLE = "PIO_CACHE_DIR"
ROOM_LEFT = 1 << 28  # bytes that a written file leaves free on the disk
# Blocks of random content that is repeated over a tensor: 2^16 blocks of Q4_0 are 1.2 MB, more than a second-level
# cache, and drawing 17 GB anew would take minutes.
_PATTERN = 1 << 16
# Scales that give weights of about 0.02: 16 levels of Q4_0 deviate by 4.6, Q8_0 by 74, Q6_K's levels times its
# 8-bit scales by 1,360.
_SCALES = {"Q4_0": 0.004, "Q8_0": 0.00027, "Q6_K": 1.5e-5}
_SCALE_OFFSET = {"Q4_0": 0, "Q8_0": 0, "Q6_K": 208}
_SEED = 0


def cache_directory() -> Path:
    """Where files are kept: $PIO_CACHE_DIR, else below the user's cache directory."""
    if told := os.environ.get(CACHE_VARIABLE):
        return Path(told).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "pytest-inferencepio", "gguf")


def file_of(plan: GgufPlan, directory: Path | None = None) -> Path:
    """The file of `plan`, written if it is not there or shorter than it must be.

    Raises:
        NotMeasurable: the disk has no room for it, or nothing can be written there.
    """
    place = directory or cache_directory()
    path = place / plan.file_name
    if path.is_file() and path.stat().st_size >= plan.nbytes:
        return path
    try:
        place.mkdir(parents=True, exist_ok=True)
        _check_room(place, plan)
        _write_beside(path, plan)
    except OSError as error:
        raise NotMeasurable(
            f"the GGUF file of {plan.nbytes / 1e9:.2f} GB cannot be written into {place} ({error}); set "
            f"{CACHE_VARIABLE} to another directory"
        ) from error
    return path


def _check_room(place: Path, plan: GgufPlan) -> None:
    free = shutil.disk_usage(place).free
    if free < plan.nbytes + ROOM_LEFT:
        raise NotMeasurable(
            f"the GGUF file needs {plan.nbytes / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB free "
            f"({ROOM_LEFT / 1e9:.2f} GB stay free); make room, or set {CACHE_VARIABLE} to another directory"
        )


def _write_beside(path: Path, plan: GgufPlan) -> None:
    """Write under a temporary name and rename, so that no half of a file is ever taken for one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        _write(Path(temporary), plan)
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, which would hide a shared cache from a group
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write(path: Path, plan: GgufPlan) -> None:
    """One tensor in memory at a time: the largest file has 17 GB."""
    import gguf

    writer = gguf.GGUFWriter(path, plan.architecture)
    try:
        for name, value in plan.keys:
            getattr(writer, f"add_{name}")(value)
        writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q4_0))
        writer.add_tokenizer_model("none")
        for tensor in plan.tensors:
            _announce(writer, tensor, gguf.GGMLQuantizationType)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in _contents(plan):
            writer.write_tensor_data(data)
    finally:
        writer.close()


def _announce(writer: Any, tensor: TensorPlan, types: Any) -> None:
    if tensor.format == "F32":
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes)
        return
    shape = (*tensor.shape[:-1], _row_bytes(tensor))
    writer.add_tensor_info(
        tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, getattr(types, tensor.format)
    )


def _contents(plan: GgufPlan) -> Iterator[np.ndarray]:
    """The data of every tensor in the order of the plan: norms of one, routers and blocks random."""
    rng = np.random.default_rng(_SEED)
    patterns = {kind: _pattern(kind, rng) for kind in _SCALES}
    for tensor in plan.tensors:
        if tensor.format != "F32":
            yield _blocks(tensor, patterns[tensor.format])
        elif len(tensor.shape) == 1:
            yield np.ones(tensor.shape, np.float32)
        else:
            yield (rng.standard_normal(tensor.shape) * 0.02).astype(np.float32)


def _pattern(kind: str, rng: np.random.Generator) -> np.ndarray:
    """`_PATTERN` blocks of random bits under one fixed scale, uint8 [blocks, bytes]."""
    _, size = BLOCKS[kind]
    blocks = rng.integers(0, 256, size=(_PATTERN, size), dtype=np.uint8)
    offset = _SCALE_OFFSET[kind]
    blocks[:, offset : offset + 2] = np.frombuffer(np.float16(_SCALES[kind]).tobytes(), np.uint8)
    return blocks


def _blocks(tensor: TensorPlan, pattern: np.ndarray) -> np.ndarray:
    """uint8 in the tensor's shape, its last dimension in bytes."""
    count = tensor.weights // BLOCKS[tensor.format][0]
    data = np.tile(pattern, (-(-count // len(pattern)), 1))[:count]
    return data.reshape(*tensor.shape[:-1], _row_bytes(tensor))


def _row_bytes(tensor: TensorPlan) -> int:
    count, size = BLOCKS[tensor.format]
    return tensor.shape[-1] // count * size
