from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stream_processes import run_in_child

from optimizations.storage.layer_ring import LayerRing, StreamingReport, open_past_cache
from optimizations.storage.stream_file import StreamWriter, plan, read_header
from optimizations.storage.unnamed_file import StreamError, StreamFile

LAYERS = 5


def stream_file(directory: Path) -> StreamFile:
    tensors = [{"weight": torch.full((3000,), float(index))} for index in range(LAYERS)]
    writer = StreamWriter(str(directory), plan(tensors))
    for index, each in enumerate(tensors):
        writer.write(index, "weight", each["weight"])
    return writer.finish()


def ring_on(file: StreamFile, buffers: int = 3) -> LayerRing:
    return LayerRing(file, read_header(file), buffers, StreamingReport())


@pytest.fixture(params=[2, 3, 7])
def ring(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LayerRing]:
    made = ring_on(stream_file(tmp_path), request.param)
    yield made
    made.close()


def value_of(ring: LayerRing, layer: int) -> float:
    buffer = ring.buffers[ring.acquire(layer)]
    values = ring.records[layer].places[0].view(buffer).unique()
    assert len(values) == 1
    return float(values)


def test_layers_come_in_order_round_after_round(ring: LayerRing) -> None:
    for _ in range(4):
        for layer in range(LAYERS):
            assert value_of(ring, layer) == layer
            ring.release()
    assert ring.report.passes == 4
    assert ring.report.layers_read >= 4 * LAYERS
    assert ring.report.bytes_read == ring.report.layers_read * ring.records[0].nbytes
    assert ring.report.bandwidth > 0


def test_the_next_layers_are_read_while_one_is_in_use(ring: LayerRing) -> None:
    assert value_of(ring, 0) == 0
    with ring._change:
        ahead = ring._change.wait_for(lambda: len(ring._ready) == len(ring.buffers), timeout=30)
    assert ahead
    assert ring.report.layers_read == len(ring.buffers)
    assert value_of(ring, 1) == 1  # the layer in use is not overwritten by what was read ahead


def test_a_layer_out_of_turn_restarts_the_order(ring: LayerRing) -> None:
    for layer in (0, 1, 0, 1, 2, 4, 3, 0, 0):
        assert value_of(ring, layer) == layer
        ring.release()


def test_a_layer_never_released_is_released_by_the_next(ring: LayerRing) -> None:
    for layer in (0, 1, 2, 3, 4, 0):
        assert value_of(ring, layer) == layer


def test_a_damaged_layer_is_an_error_where_it_is_needed(tmp_path: Path) -> None:
    file = stream_file(tmp_path)
    records = read_header(file)
    os.pwrite(file.descriptor, b"\x55", records[2].offset + 100)
    ring = ring_on(file)
    assert value_of(ring, 0) == 0
    assert value_of(ring, 1) == 1
    for _ in range(2):
        with pytest.raises(StreamError, match="layer 2's weight in .* is damaged"):
            ring.acquire(2)
    ring.close()


def test_a_file_cut_off_while_in_use_is_an_error(tmp_path: Path) -> None:
    file = stream_file(tmp_path)
    records = read_header(file)
    ring = ring_on(file, buffers=2)
    assert value_of(ring, 0) == 0
    os.truncate(file.descriptor, records[3].offset)
    with pytest.raises(StreamError, match=f"ended at byte {records[3].offset}: it was truncated"):
        for layer in range(1, LAYERS):
            ring.acquire(layer)
    ring.close()


def test_without_o_direct_pages_are_dropped_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "O_DIRECT", 0)
    ring = ring_on(stream_file(tmp_path))
    assert not ring.report.direct
    assert "O_DIRECT is refused here" in ring.report.note
    assert [value_of(ring, layer) for layer in range(LAYERS)] == list(range(LAYERS))
    ring.close()


def test_a_file_system_that_refuses_direct_reads_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*arguments: object) -> int:
        raise OSError(22, "Invalid argument")

    file = stream_file(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "preadv", refusing)
    descriptor, direct, _ = open_past_cache(file)
    assert not direct
    os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing_ends_the_thread_and_further_use_is_an_error(tmp_path: Path) -> None:
    ring = ring_on(stream_file(tmp_path))
    value_of(ring, 0)
    ring.close()
    ring.close()
    assert "layer-reader" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(StreamError, match="layer_streaming was undone"):
        ring.acquire(0)


def test_a_forked_child_streams_with_a_thread_of_its_own(tmp_path: Path) -> None:
    ring = ring_on(stream_file(tmp_path))
    assert value_of(ring, 0) == 0

    def work() -> None:
        assert [value_of(ring, layer) for layer in (1, 2, 3, 4, 0, 1)] == [1, 2, 3, 4, 0, 1]

    assert run_in_child(work) == 0
    assert [value_of(ring, layer) for layer in (1, 2, 3)] == [1, 2, 3]
    ring.close()
