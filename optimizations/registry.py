"""Finding techniques, reading their specifications, composing them."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from optimizations.contract import Optimization
from optimizations.discovery import classes_in, installed
from optimizations.errors import IncompatibleOptimizations, InvalidSpec, UnknownOptimization

ENTRY_POINT_GROUP = "pytest_inferencepio.optimizations"
PACKAGES = ("weights", "cache", "vision", "compute", "storage", "runtime")

_registered: dict[str, type[Optimization]] = {}
_discovered = False


def register(technique: type[Optimization]) -> type[Optimization]:
    """Add a technique from outside (a conftest, an entry point). Usable as a decorator.

    Raises:
        InvalidSpec: another class already has this name.
    """
    known = _registered.get(technique.name)
    if known is not None and known is not technique:
        raise InvalidSpec(
            f"two optimizations are named {technique.name!r}: {known} and {technique}; rename one"
        )
    _registered[technique.name] = technique
    return technique


def unregister(name: str) -> None:
    """Forget a technique added with `register`; unknown names are an UnknownOptimization."""
    lookup(name)
    del _registered[name]


def techniques() -> dict[str, type[Optimization]]:
    """Every technique by name, in order of composition, then by name."""
    _discover()
    return dict(sorted(_registered.items(), key=lambda item: (item[1].kind.order, item[0])))


def lookup(name: str) -> type[Optimization]:
    """The technique called `name`.

    Raises:
        UnknownOptimization: lists the near names and all names.
    """
    known = techniques()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UnknownOptimization(f"unknown optimization {name!r}; {hint}known: {', '.join(known)}")


def parse(spec: str) -> list[Optimization]:
    """Read `a`, `a+b` or `a(key=value, ...)+b` into techniques in order of composition.

    Raises:
        InvalidSpec, UnknownOptimization, IncompatibleOptimizations
    """
    return compose([_parse_one(part) for part in _split(spec)])


def compose(parts: Iterable[Optimization]) -> list[Optimization]:
    """Order by kind, then by name, and refuse pairs that cannot work together, by name and reason."""
    ordered = sorted(parts, key=lambda part: (part.kind.order, part.name))
    for position, first in enumerate(ordered):
        for second in ordered[position + 1 :]:
            if first.name == second.name:
                raise IncompatibleOptimizations(f"{first.name} is named twice in one composition")
            reason = first.conflicts.get(second.name) or second.conflicts.get(first.name)
            if reason:
                raise IncompatibleOptimizations(
                    f"{first.name} and {second.name} cannot be combined: {reason}"
                )
    return ordered


def spec_of(parts: Sequence[Optimization]) -> str:
    """Canonical text of a composition; `none` for the unoptimized model."""
    return "+".join(part.spec() for part in parts) or "none"


def _parse_one(text: str) -> Optimization:
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise InvalidSpec(f"cannot read {text!r}; write name or name(key=value, key=value)")
    technique = lookup(match[1])
    return technique.from_settings(_settings(match[2] or "", text))


def _settings(arguments: str, text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("positional settings")
        return {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise InvalidSpec(
            f"cannot read the settings of {text!r}; write name(key=value, key=value) with numbers, words, "
            "true or false"
        ) from error


def _value(node: ast.expr) -> Any:
    """A literal; bare words are strings, `true`/`false` are booleans."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    return ast.literal_eval(node)


def _split(spec: str) -> list[str]:
    """Split on `+` outside parentheses."""
    parts, depth, current = [], 0, ""
    for character in spec:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "+" and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    if depth != 0:
        raise InvalidSpec(f"unbalanced parentheses in {spec!r}")
    return [*parts, current]


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    for package in PACKAGES:
        for technique in classes_in(f"optimizations.{package}", Optimization):
            register(technique)
    _discovered = True
    for technique in installed(ENTRY_POINT_GROUP):
        register(technique)
