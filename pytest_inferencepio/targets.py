"""What an optimization has to reach to be worth it; the defaults can be set in the ini file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from pytest_inferencepio.naming import unknown
from pytest_inferencepio.record import Metric


@dataclasses.dataclass(frozen=True)
class Targets:
    """`speedup` or `memory_saving` is to be reached, at an accuracy within `accuracy_loss` (fractions)."""

    speedup: float = 1.20
    memory_saving: float = 0.15
    accuracy_loss: float = 0.01

    def judged(
        self, speedup: Metric | None, memory_ratio: Metric | None, perplexity_ratio: Metric | None
    ) -> str:
        """One sentence: which targets are met, by the measured values; what was not measured is said."""
        parts = [
            _part("speed", _value(speedup), self.speedup, "x", higher=True),
            _part("memory", _value(memory_ratio), 1 - self.memory_saving, "x", higher=False),
            _part("perplexity", _value(perplexity_ratio), 1 + self.accuracy_loss, "x", higher=False),
        ]
        fast, small, accurate = (met for met, _ in parts)
        if accurate is None or (fast is None and small is None):
            verdict = "targets not judged"
        else:
            verdict = "targets met" if accurate and (fast or small) else "targets not met"
        return f"{verdict}: {'; '.join(text for _, text in parts)}"


def parse_targets(lines: Iterable[str]) -> Targets:
    """`speedup=1.2`, `memory_saving=0.15`, `accuracy_loss=0.01`, one per line.

    Raises:
        ValueError: an unknown target or a value that is no number.
    """
    known = [field.name for field in dataclasses.fields(Targets)]
    found = {}
    for line in lines:
        name, _, text = (part.strip() for part in line.partition("="))
        if name not in known:
            raise ValueError(unknown("target", name, known))
        try:
            found[name] = float(text)
        except ValueError:
            raise ValueError(f"target {name} needs a number, got {text!r}") from None
    return Targets(**found)


def _value(metric: Metric | None) -> float | None:
    return None if metric is None else metric.value


def _part(
    what: str, value: float | None, target: float, unit: str, *, higher: bool
) -> tuple[bool | None, str]:
    wanted = f"wanted {'>=' if higher else '<='} {target:.3g}{unit}"
    if value is None:
        return None, f"{what} not measured ({wanted})"
    return (value >= target if higher else value <= target), f"{what} {value:.3g}{unit} ({wanted})"
