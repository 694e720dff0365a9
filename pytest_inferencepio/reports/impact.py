"""One line per model and optimization: before → after of everything that was measured about it.

`before` is reconstructed from the ratio measured in pairs (after x speedup, after / memory ratio), so it always
belongs to the same moment as `after`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pytest_inferencepio import units
from pytest_inferencepio.record import Metric, Record
from pytest_inferencepio.verdict import Outcome, Status, Verdict

UNOPTIMIZED = "none"
NOTHING = "-"
PRESERVED = 0.01  # relative loss up to which accuracy counts as preserved
# Gravest first: the verdict of a row is that of its worst cell.
_GRAVITY = (
    Status.BUDGET_EXCEEDED,
    Status.REGRESSION,
    Status.INCONCLUSIVE,
    Status.NO_BASELINE,
    Status.PASSED,
)


@dataclasses.dataclass(frozen=True)
class Impact:
    """What one optimization does to one model, from all its cells."""

    model: str
    scale: str
    device: str
    dtype: str
    optimization: str
    metrics: Mapping[str, Metric]
    status: Status
    over_budget: bool

    @property
    def group(self) -> str:
        return f"{self.model}, {self.scale}, {self.device}, {self.dtype}"

    @property
    def speedup(self) -> str:
        """Whole inference, with its interval."""
        return self.ratio("speedup")

    def ratio(self, name: str) -> str:
        """`1.84x [1.80, 1.88]`."""
        found = self.metrics.get(name)
        if found is None:
            return NOTHING
        bounds = units.interval(found.low, found.high)
        same = "" if self._optimized else "A/A "
        return f"{same}{units.times(found.value)} {bounds}".strip()

    def time(self, name: str, speedup: str) -> str:
        """`12.3 ms → 5.21 ms`, or the plain value where there is no pair."""
        return self._change(name, self._value(speedup))

    def throughput(self) -> str:
        """Output tokens per second of real batches, before → after."""
        ratio = self._value("throughput_ratio")
        return self._change("output_tokens_per_second", 1 / ratio if ratio else None)

    def memory(self) -> str:
        """Peak of a fresh process, before → after and by how much."""
        return self._bytes("peak_memory", "memory_ratio")

    def weights(self) -> str:
        """Resident weights, before → after and by how much."""
        return self._bytes("weight_memory", "weight_memory_ratio")

    def energy(self) -> str:
        """Joules per token, or why there are none."""
        found = self.metrics.get("energy_per_token")
        if found is None:
            return NOTHING
        return found.reason or units.quantity(found.value, found.unit)

    def accuracy(self) -> str:
        """Preserved (within 1 %), within the declared budget, or not preserved; and by how much answers moved.

        Without perplexity and tasks (random weights) nothing is said about answers.
        """
        moved = self._moved()
        if not self._optimized:
            return ", ".join(moved) or NOTHING
        if not moved:
            return "not measured"
        if self.over_budget:
            return f"not preserved: {', '.join(moved)}"
        if self._value("perplexity_ratio") is None and self._value("task_drop") is None:
            return f"of answers not measured (numbers alone: {', '.join(moved)})"
        return f"{'preserved' if self._within_target() else 'within its budget'}: {', '.join(moved)}"

    def _within_target(self) -> bool:
        """Perplexity and exact tasks at most 1 % worse, relative: what users mean by unchanged answers."""
        ratio, drop = self._value("perplexity_ratio"), self._value("task_drop")
        return (ratio or 1.0) <= 1 + PRESERVED and (drop or 0.0) <= PRESERVED

    @property
    def _optimized(self) -> bool:
        return self.optimization != UNOPTIMIZED

    def _moved(self) -> list[str]:
        parts = []
        if self._optimized:
            parts += self._told("kl_divergence", "KL {}", "nat")
            parts += self._share("top1_agreement", "top-1 {}")
        parts += self._perplexity()
        parts += self._share("task_exact_match", "tasks {}")
        return parts

    def _bytes(self, name: str, ratio_name: str) -> str:
        ratio = self._value(ratio_name)
        text = self._change(name, 1 / ratio if ratio else None)
        return f"{text} ({units.percent(ratio - 1)})" if ratio and units.ARROW in text else text

    def _told(self, name: str, form: str, unit: str) -> list[str]:
        value = self._value(name)
        return [] if value is None else [form.format(units.quantity(value, unit))]

    def _share(self, name: str, form: str) -> list[str]:
        value = self._value(name)
        return [] if value is None else [form.format(units.share(value, 3))]

    def _perplexity(self) -> list[str]:
        value, ratio = self._value("perplexity"), self._value("perplexity_ratio")
        if value is None:
            return [] if ratio is None else [f"perplexity {units.percent(ratio - 1)}"]
        moved = f" ({units.percent(ratio - 1)})" if ratio is not None and self._optimized else ""
        return [f"perplexity {units.significant(value)}{moved}"]

    def _change(self, name: str, factor: float | None) -> str:
        found = self.metrics.get(name)
        if found is None:
            return NOTHING
        if found.value is None or factor is None or not self._optimized:
            return units.quantity(found.value, found.unit)
        return units.change(found.value * factor, found.value, found.unit)

    def _value(self, name: str) -> float | None:
        found = self.metrics.get(name)
        return None if found is None else found.value


def impacts(measured: Sequence[tuple[Record, Verdict]]) -> list[Impact]:
    """One `Impact` per model, scale, device, type and optimization, in the order of the run."""
    rows: dict[tuple[str, ...], list[tuple[Record, Verdict]]] = {}
    for record, verdict in measured:
        key = (record.model, record.scale, record.device, record.dtype, record.optimization)
        rows.setdefault(key, []).append((record, verdict))
    return [_impact(key, cells) for key, cells in rows.items()]


def _impact(key: tuple[str, ...], cells: Sequence[tuple[Record, Verdict]]) -> Impact:
    model, scale, device, dtype, optimization = key
    metrics: dict[str, Metric] = {}
    for record, _ in cells:  # the category that measured a metric first is the one made for it
        for name, value in record.metrics.items():
            if name not in metrics or not metrics[name].measured:
                metrics[name] = value
    statuses = {verdict.status for _, verdict in cells}
    return Impact(
        model,
        scale,
        device,
        dtype,
        optimization,
        metrics,
        status=next(status for status in _GRAVITY if status in statuses),
        over_budget=any(verdict.of(Outcome.BUDGET) for _, verdict in cells),
    )
