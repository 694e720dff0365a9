"""A peer that is a transformers model with other linear layers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from pytest_inferencepio.measure import latency, memory

if TYPE_CHECKING:
    from optimizations.runner import Runner
    from pytest_inferencepio.models import Model
    from pytest_inferencepio.peers.contract import PeerRequest


class TransformersSession:
    """A runner that is driven exactly as the row's own."""

    def __init__(self, runner: Runner, notes: Sequence[str], undo: Callable[[], None] | None = None) -> None:
        self.notes = tuple(notes)
        self.work = memory.work_of(runner, runner)
        self._runner: Runner | None = runner
        self._undo = undo

    def generate(self, prompt: Sequence[int], new_tokens: int) -> latency.Generation:
        assert self._runner is not None, "the session is closed"
        ids = torch.tensor([list(prompt)], device=self._runner.model.device)
        return latency.generate_once(
            self._runner, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new_tokens
        )

    def close(self) -> None:
        undo, self._undo, self._runner = self._undo, None, None
        if undo is not None:
            undo()
        gc.collect()


def memory_of(request: PeerRequest, *, converted: Sequence = ()) -> int:
    """Bytes of loading a catalog model at full scale; 0 for others, whose size nobody knows before."""
    model: Model = request.model
    if not model.in_catalog or request.load.scale != "full":
        return 0
    from pytest_inferencepio.catalog.memory import config_need

    return config_need(model.entry, model.config(request.load.scale), request.load.dtype, converted)
