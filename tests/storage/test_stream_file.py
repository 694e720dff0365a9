from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stream_processes import open_files, run_in_child

from optimizations.errors import Refusal
from optimizations.storage.stream_file import (
    StreamWriter,
    TensorPlace,
    check_tensor,
    plan,
    read_header,
    tensor_bytes,
)
from optimizations.storage.unnamed_file import StreamError, StreamFile


def layers() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        {
            "weight": torch.randn(33, 65).bfloat16(),
            "packed": torch.randint(0, 255, (7, 3), dtype=torch.uint8),
            "transposed": torch.randn(5, 9).t(),
            "scalar": torch.tensor(3.5),
        },
        {"gapped": torch.randn(8, 8)[:, ::2], "bias": torch.randn(4000).double()},
        {},
        {"flags": torch.tensor([True, False])},
    ]


def written(directory: Path) -> StreamFile:
    tensors = layers()
    writer = StreamWriter(str(directory), plan(tensors))
    for index, each in enumerate(tensors):
        for name, tensor in each.items():
            writer.write(index, name, tensor)
    return writer.finish()


def test_every_tensor_comes_back_bit_by_bit(tmp_path: Path) -> None:
    file = written(tmp_path)
    content = bytearray(file.path.read_bytes())
    for index, (record, tensors) in enumerate(zip(read_header(file), layers(), strict=True)):
        data = content[record.offset : record.offset + record.nbytes]
        for place in record.places:
            found = place.view(torch.frombuffer(data, dtype=torch.uint8))
            assert found.dtype == tensors[place.name].dtype
            assert torch.equal(found, tensors[place.name])
            check_tensor(file, index, place, tensor_bytes(found))
    assert len(content) == file.size


def test_layouts_that_are_dense_keep_their_strides(tmp_path: Path) -> None:
    places = {place.name: place for record in plan(layers()) for place in record.places}
    assert places["transposed"].stride == (1, 9)
    assert places["gapped"].stride == (4, 1)


def test_records_and_tensors_are_aligned() -> None:
    for record in plan(layers()):
        assert record.offset % 4096 == record.nbytes % 4096 == 0
        assert all(place.offset % 64 == 0 for place in record.places)


def test_a_plan_needs_no_memory() -> None:
    huge = [{"weight": torch.empty(2**20, 2**20, dtype=torch.bfloat16, device="meta")}] * 2
    assert plan(huge)[1].offset > 2**41


def test_a_file_is_complete_with_all_its_tensors_only(tmp_path: Path) -> None:
    tensors = layers()
    writer = StreamWriter(str(tmp_path), plan(tensors))
    writer.write(0, "weight", tensors[0]["weight"])
    with pytest.raises(
        StreamError, match="layer 0's packed was never written to the file of streamed layers in"
    ):
        writer.finish()
    with pytest.raises(StreamError, match="has no header"):
        read_header(writer.file)
    writer.discard()
    assert not open_files(tmp_path)


def test_a_file_has_no_name_and_ends_with_its_owner(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert len(open_files(tmp_path)) == 1
    assert not list(tmp_path.iterdir())
    assert str(file) == f"the file of streamed layers in {tmp_path}"
    del file
    assert not open_files(tmp_path)


def test_a_forked_child_opens_the_file_anew_and_closes_its_own_only(tmp_path: Path) -> None:
    file = written(tmp_path)
    content = file.path.read_bytes()

    def work() -> None:
        assert file.path.read_bytes() == content
        file.close()

    assert run_in_child(work) == 0
    assert file.path.read_bytes() == content


def test_a_tensor_that_was_not_planned_is_an_error(tmp_path: Path) -> None:
    writer = StreamWriter(str(tmp_path), plan(layers()))
    with pytest.raises(ValueError, match=r"layer 0's scalar was planned as float32 \(\), got torch.float64"):
        writer.write(0, "scalar", torch.tensor(1.0).double())
    writer.discard()


def damaged(file: StreamFile, change: Any) -> StreamFile:
    content = bytearray(file.path.read_bytes())
    file.path.write_bytes(change(content))
    return file


def flip(content: bytearray, position: int) -> bytearray:
    content[position] ^= 1
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:5], "has no header: it was overwritten or truncated; load the model again"),
        (lambda content: b"SQLite format 3" + content, "has no header"),
        (lambda content: flip(content, 15), "the header of .* is damaged"),  # the length of the header
        (lambda content: flip(content, 60), "the header of .* is damaged"),
        (lambda content: content[:-4096], "its header promises .* it was truncated; load the model again"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        read_header(damaged(written(tmp_path), change))


def test_a_closed_file_is_named(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.close()
    file.close()
    with pytest.raises(
        StreamError, match=r"layers in .* is closed: layer_streaming was undone; apply it again"
    ):
        read_header(file)


def test_a_changed_value_is_named(tmp_path: Path) -> None:
    place = TensorPlace("bias", "uint8", (2,), (1,), 0, 2, crc=1)
    with pytest.raises(StreamError, match="layer 3's bias in .* is damaged"):
        check_tensor(StreamFile(tmp_path), 3, place, memoryview(b"ab"))


def test_a_full_disk_is_a_refusal_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(
        Refusal, match=r"needs 0.0 MiB in .* and 0.0 MiB are free; free .* or raise pin_layers"
    ):
        StreamWriter(str(tmp_path), plan(layers()))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_meanwhile_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Refusal, match="No space left on device; name another directory"):
        StreamWriter(str(tmp_path), plan(layers()))
    assert not open_files(tmp_path)


def test_a_directory_that_is_not_there_is_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="absent is not a directory; create it or name another"):
        StreamWriter(str(tmp_path / "absent"), plan(layers()))
