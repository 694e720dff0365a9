"""Each row against the peers it was measured with, from the cells of the category `comparative`."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_inferencepio import units
from pytest_inferencepio.record import Record, keyed, parts_of
from pytest_inferencepio.verdict import Verdict

CATEGORY = "comparative"
HEADING = (
    "model",
    "optimization",
    "peer",
    "decode [95 %]",
    "ours (all rounds) / peer's",
    "prefill [95 %]",
    "ours (all rounds) / peer's",
    "whole [95 %]",
)
_NOTHING = "-"


def rows(measured: Sequence[tuple[Record, Verdict]]) -> list[tuple[str, ...]]:
    """One row per model, optimization and measured peer under `HEADING`: how many times as fast ours is."""
    return [
        _row(record, peer)
        for record in _records(measured)
        for peer in _peers(record)
        if not _reason(record, peer)
    ]


def unmeasured(measured: Sequence[tuple[Record, Verdict]]) -> list[str]:
    """Peers that were asked for and not measured, one sentence per reason, with how many cells it holds for."""
    told: dict[str, list[str]] = {}
    for record in _records(measured):
        for peer in _peers(record):
            if reason := _reason(record, peer):
                told.setdefault(reason if reason.startswith(peer) else f"{peer}: {reason}", []).append(
                    record.cell
                )
    return [f"{reason} ({_places(cells)})" for reason, cells in told.items()]


def _places(cells: Sequence[str]) -> str:
    return cells[0] if len(cells) == 1 else f"{len(cells)} cells: {cells[0]}, ..."


def _records(measured: Sequence[tuple[Record, Verdict]]) -> list[Record]:
    return [record for record, _ in measured if record.category == CATEGORY]


def _peers(record: Record) -> list[str]:
    return [key for name in record.metrics for base, key in [parts_of(name)] if base == "speedup" and key]


def _reason(record: Record, peer: str) -> str | None:
    return record.metrics[keyed("speedup", peer)].reason


def _row(record: Record, peer: str) -> tuple[str, ...]:
    return (
        f"{record.model} {record.scale}",
        record.optimization,
        peer,
        _ratio(record, keyed("decode_speedup", peer)),
        _rates(record, "decode_tokens_per_second", peer),
        _ratio(record, keyed("prefill_speedup", peer)),
        _rates(record, "prefill_tokens_per_second", peer),
        _ratio(record, keyed("speedup", peer)),
    )


def _ratio(record: Record, name: str) -> str:
    found = record.metrics.get(name)
    if found is None or found.value is None:
        return _NOTHING
    return f"{units.times(found.value)} {units.interval(found.low, found.high)}".strip()


def _rates(record: Record, name: str, peer: str) -> str:
    sides = (record.metrics.get(name), record.metrics.get(keyed(name, peer)))
    return " / ".join(_NOTHING if side is None else units.quantity(side.value, side.unit) for side in sides)
