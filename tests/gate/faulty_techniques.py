"""Techniques of a user's package that are sound until FAULT names what is wrong with them.

Each really does what it says: computes more, holds more memory, changes a weight. They are found through an entry
point, as an installed package's would be, because fresh processes must find them too.
"""

from __future__ import annotations

import dataclasses
import os
import time
from statistics import median
from typing import ClassVar

import torch

from optimizations.contract import AccuracyBudget, Fidelity, Kind, Optimization, Target, Undo
from optimizations.runner import Runner

ANYTHING = AccuracyBudget(100.0, 0.0, 100.0, 1.0)  # so that only the comparison with the baseline can object
BATCH = 50  # products per sample of the calibration
SIDE = 96  # of the square matrices multiplied as extra work


class _Technique(Optimization):
    kind = Kind.COMPUTE
    fidelity = Fidelity.LOSSY
    source = "this test"
    budget = ANYTHING

    def refusal(self, target: Target) -> str | None:
        return None

    @property
    def fault(self) -> float:
        """How much is wrong, e.g. 0.1 for FAULT=`slow_kernel=0.1`; 0 when nothing is."""
        faults = dict(part.split("=") for part in os.environ.get("FAULT", "").split(",") if part)
        return float(faults.get(self.name, 0.0))


@dataclasses.dataclass(frozen=True)
class SlowKernel(_Technique):
    """Every forward pass also multiplies matrices for `fault` times as long as a decoding step takes."""

    name: ClassVar[str] = "slow_kernel"
    summary: ClassVar[str] = "extra matrix products in every forward pass"

    def apply(self, runner: Runner) -> Undo:
        matrix = torch.randn(SIDE, SIDE)
        token = torch.ones(1, 1, dtype=torch.int64)
        count = 0
        if self.fault:
            step = _seconds(lambda: runner.forward(input_ids=token, use_cache=False))
            batch = _seconds(lambda: [torch.mm(matrix, matrix) for _ in range(BATCH)])
            count = max(1, round(self.fault * step / batch * BATCH))

        def extra(*_: object) -> None:
            for _ in range(count):
                torch.mm(matrix, matrix)

        return runner.model.register_forward_pre_hook(extra).remove


@dataclasses.dataclass(frozen=True)
class HungryCache(_Technique):
    """Holds `fault` times the model's weights in touched memory."""

    name: ClassVar[str] = "hungry_cache"
    summary: ClassVar[str] = "memory that is held and not needed"

    def apply(self, runner: Runner) -> Undo:
        weights = sum(parameter.nbytes for parameter in runner.model.parameters())
        held = [torch.ones(round(self.fault * weights), dtype=torch.uint8)]

        def use(*_: object) -> None:
            held[0][:1].sum()

        handle = runner.model.register_forward_pre_hook(use)

        def undo() -> None:
            handle.remove()
            held.clear()

        return undo


@dataclasses.dataclass(frozen=True)
class PerturbedWeight(_Technique):
    """Adds noise of `fault` times its own standard deviation to the first layer's output projection."""

    name: ClassVar[str] = "perturbed_weight"
    summary: ClassVar[str] = "noise on one weight"

    def apply(self, runner: Runner) -> Undo:
        weight = runner.model.get_decoder().layers[0].self_attn.o_proj.weight
        original = weight.detach().clone()
        noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            weight.add_((self.fault * original.float().std() * noise).to(weight.dtype))

        def undo() -> None:
            with torch.no_grad():
                weight.copy_(original)

        return undo


def _seconds(work: object) -> float:
    """Median of 20 runs."""
    samples = []
    for _ in range(20):
        start = time.perf_counter()
        work()  # type: ignore[operator]
        samples.append(time.perf_counter() - start)
    return median(samples)
