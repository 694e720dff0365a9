"""The text of a baseline file: data classes, strict reading, stable writing with one metric per line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from pytest_inferencepio.errors import BaselineError
from pytest_inferencepio.gate_rules import STORED_DIGITS
from pytest_inferencepio.record import BETTER
from pytest_inferencepio.verdict import CellKey

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Value:
    """A metric in one session. `examples` is one character per task example, 1 where the answer was exact."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 1
    examples: str = ""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A metric's values by session, oldest session first."""

    unit: str
    better: str
    values: Mapping[str, Value]


@dataclasses.dataclass(frozen=True)
class StoredCell:
    """One cell: what was run and what came out."""

    workload: Mapping[str, Any]
    metrics: Mapping[str, Stored]


@dataclasses.dataclass(frozen=True)
class Session:
    """Where values were measured: the class of machine, its instruction set, its fingerprint."""

    machine: str
    isa: str
    fingerprint: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class BaselineFile:
    """All stored cells of one model at one scale."""

    model: str
    scale: str
    sessions: Mapping[str, Session]
    cells: Mapping[CellKey, StoredCell]

    def pruned(self) -> BaselineFile:
        """Without the sessions that no metric refers to any more."""
        used = {
            key for cell in self.cells.values() for metric in cell.metrics.values() for key in metric.values
        }
        return dataclasses.replace(
            self, sessions={key: value for key, value in self.sessions.items() if key in used}
        )


def rounded(value: float) -> float:
    """Six significant digits: enough for every tolerance, and stable against noise in the last bits. Counts and
    bytes stay exact."""
    value = float(value)
    exact = value.is_integer() and abs(value) < 2**53
    return value if exact else float(f"{value:.{STORED_DIGITS - 1}e}")


def plain(data: Any) -> Any:
    """`data` as it comes back from JSON (tuples become lists), floats rounded as they are stored."""
    return json.loads(json.dumps(_rounded_all(data)))


def _rounded_all(data: Any) -> Any:
    if isinstance(data, float):
        return rounded(data)
    if isinstance(data, Mapping):
        return {str(key): _rounded_all(value) for key, value in data.items()}
    return [_rounded_all(value) for value in data] if isinstance(data, list | tuple) else data


# Writing


def dumps(file: BaselineFile) -> str:
    """JSON text: keys sorted, one session and one metric per line, so that a diff shows what moved."""
    sessions = {key: dataclasses.asdict(session) for key, session in file.sessions.items()}
    lines = [
        "{",
        f' "schema": {SCHEMA},',
        f' "model": {_compact(file.model)},',
        f' "scale": {_compact(file.scale)},',
    ]
    lines += [' "sessions": {', *_rows(sessions, "  "), " },"]
    lines += [' "cells": {', *_cells(file), " }", "}"]
    return "\n".join(lines) + "\n"


def _cells(file: BaselineFile) -> list[str]:
    blocks = []
    for key, cell in sorted((_cell_key(cell), stored) for cell, stored in file.cells.items()):
        metrics = {name: _metric_json(metric) for name, metric in cell.metrics.items()}
        blocks.append(
            [
                f"  {_compact(key)}: {{",
                f'   "workload": {_compact(cell.workload)},',
                '   "metrics": {',
                *_rows(metrics, "    "),
                "   }",
                "  }",
            ]
        )
    for block in blocks[:-1]:
        block[-1] += ","
    return [line for block in blocks for line in block]


def _metric_json(metric: Stored) -> dict[str, Any]:
    values = {key: _value_json(value) for key, value in metric.values.items()}
    return {"unit": metric.unit, "better": metric.better, "values": values}


def _value_json(value: Value) -> dict[str, Any]:
    optional = {"low": value.low, "high": value.high, "examples": value.examples}
    told = {key: _number(item) for key, item in optional.items() if item not in (None, "")}
    return {"value": _number(value.value), "n": value.n, **told}


def _number(value: Any) -> Any:
    """Whole numbers without `.0`: byte counts are easier to review that way."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _rows(mapping: Mapping[str, Any], indent: str) -> list[str]:
    rows = [f"{indent}{_compact(key)}: {_compact(mapping[key])}" for key in sorted(mapping)]
    return [*(row + "," for row in rows[:-1]), *rows[-1:]]


def _compact(data: Any) -> str:
    return json.dumps(data, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _cell_key(cell: CellKey) -> str:
    return f"{cell.optimization}/{cell.category}/{cell.device}/{cell.dtype}"


# Reading


def loads(text: str, where: str) -> BaselineFile:
    """Read the text of a baseline file; `where` names it in errors.

    Raises:
        BaselineError: not JSON, another schema, a missing key, a value of the wrong type.
    """
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BaselineError(
            f"baseline {where} is not valid JSON ({error}); restore it from version control or measure again "
            "with --pio-update-baseline"
        ) from error
    return _Reader(where).file(data)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Checks every type on the way; the path to the wrong value is part of the message."""

    where: str

    def file(self, data: Any) -> BaselineFile:
        mapping = self.mapping(data, "the file")
        if mapping.get("schema") != SCHEMA or isinstance(mapping.get("schema"), bool):
            raise BaselineError(
                f"baseline {self.where} has schema {mapping.get('schema')!r}, this version reads {SCHEMA}; "
                "measure again with --pio-update-baseline"
            )
        model, scale = self.text(mapping, "model", "the file"), self.text(mapping, "scale", "the file")
        sessions = {
            key: self.session(value, f"session {key}") for key, value in self.items(mapping, "sessions")
        }
        cells = {
            self.cell(model, scale, key): self.stored_cell(value, key, sessions)
            for key, value in self.items(mapping, "cells")
        }
        return BaselineFile(model, scale, sessions, cells)

    def session(self, data: Any, path: str) -> Session:
        mapping = self.mapping(data, path)
        fingerprint = self.mapping(mapping.get("fingerprint"), f"{path}: fingerprint")
        return Session(self.text(mapping, "machine", path), self.text(mapping, "isa", path), fingerprint)

    def cell(self, model: str, scale: str, key: str) -> CellKey:
        parts = key.rsplit("/", 3)
        if len(parts) != 4 or not all(parts):
            self.fail(f"cell {key!r} is not named optimization/category/device/dtype")
        optimization, category, device, dtype = parts
        return CellKey(model, scale, optimization, category, device, dtype)

    def stored_cell(self, data: Any, path: str, sessions: Mapping[str, Session]) -> StoredCell:
        mapping = self.mapping(data, path)
        workload = self.mapping(mapping.get("workload"), f"{path}: workload")
        metrics = {
            name: self.metric(value, f"{path}: {name}", sessions)
            for name, value in self.items(mapping, "metrics", path)
        }
        return StoredCell(workload, metrics)

    def metric(self, data: Any, path: str, sessions: Mapping[str, Session]) -> Stored:
        mapping = self.mapping(data, path)
        better = self.text(mapping, "better", path)
        if better not in BETTER:
            self.fail(f"{path}: better is {better!r}, not one of {', '.join(BETTER)}")
        values = {key: self.value(value, path) for key, value in sorted(self.items(mapping, "values", path))}
        if not values:
            self.fail(f"{path}: there are no values")
        for key in values:
            if key not in sessions:
                self.fail(f"{path}: session {key!r} is not among the file's sessions")
        return Stored(self.text(mapping, "unit", path), better, values)

    def value(self, data: Any, path: str) -> Value:
        mapping = self.mapping(data, path)
        count = mapping.get("n", 1)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            self.fail(f"{path}: n is {count!r}, not a count")
        examples = mapping.get("examples", "")
        if not isinstance(examples, str) or set(examples) - {"0", "1"}:
            self.fail(f"{path}: examples must be a text of 0 and 1")
        low, high = (self.number(mapping[key], path) if key in mapping else None for key in ("low", "high"))
        return Value(self.number(mapping.get("value"), path), low, high, count, examples)

    def number(self, data: Any, path: str) -> float:
        if isinstance(data, bool) or not isinstance(data, int | float):
            self.fail(f"{path}: {data!r} is not a number")
        try:
            value = float(data)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            self.fail(f"{path}: a number is not finite")
        return value

    def text(self, mapping: Mapping[str, Any], key: str, path: str) -> str:
        value = mapping.get(key)
        if not isinstance(value, str):
            self.fail(f"{path}: {key} is {value!r}, not a text")
        return value

    def items(self, mapping: Mapping[str, Any], key: str, path: str = "the file") -> list[tuple[str, Any]]:
        return list(self.mapping(mapping.get(key), f"{path}: {key}").items())

    def mapping(self, data: Any, path: str) -> dict[str, Any]:
        if not isinstance(data, dict):
            self.fail(f"{path} is a {type(data).__name__}, not a mapping")
        return data

    def fail(self, what: str) -> NoReturn:
        raise BaselineError(
            f"baseline {self.where}: {what}; restore it from version control or measure again with "
            "--pio-update-baseline"
        )
