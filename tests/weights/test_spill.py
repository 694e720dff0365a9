"""Weights set aside in a file come back to the bit, and the memory is free in between."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from optimizations.weights.spill import SetAside


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    tensors = [
        torch.randn(7, 5),
        torch.randn(5, 7).T,  # not contiguous
        torch.randn(3, 4, 2).to(torch.bfloat16),
        torch.tensor([float("nan"), -0.0, float("inf")]),
    ]
    return [nn.Parameter(tensor) for tensor in tensors]


def test_values_strides_and_objects_come_back():
    stored = parameters()
    copies = [(parameter.detach().clone(), parameter.stride(), parameter.dtype) for parameter in stored]
    aside = SetAside()
    for parameter in stored:
        aside.store(parameter)
    assert all(parameter.numel() == 0 for parameter in stored)
    aside.restore()
    for parameter, (value, stride, dtype) in zip(stored, copies, strict=True):
        assert isinstance(parameter, nn.Parameter)
        assert (parameter.stride(), parameter.dtype, parameter.shape) == (stride, dtype, value.shape)
        as_bytes = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (parameter, value)]
        assert torch.equal(*as_bytes)


def test_the_file_has_no_name_and_is_closed_with_its_owner(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    aside = SetAside()
    aside.store(parameters()[0])
    assert list(tmp_path.iterdir()) == []
    descriptor = aside._descriptor
    os.fstat(descriptor)
    del aside
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads resident memory from /proc")
def test_memory_is_free_while_aside():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    parameter = nn.Parameter(torch.ones(30_000_000))
    full = resident()
    aside = SetAside()
    aside.store(parameter)
    assert resident() < full - 100e6
    aside.restore()
    assert torch.equal(parameter, torch.ones(30_000_000))
