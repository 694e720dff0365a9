"""Applying a composition and undoing it exactly, in reverse order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from optimizations.contract import Optimization, Target, Undo
from optimizations.errors import Refusal
from optimizations.registry import compose, parse
from optimizations.runner import Runner


def target_of(runner: Runner) -> Target:
    """What `Optimization.refusal` is asked about, read from a loaded model."""
    dtype = str(runner.model.dtype).removeprefix("torch.")
    return Target(config=runner.model.config, device=runner.model.device.type, dtype=dtype)


def apply_all(runner: Runner, parts: Sequence[Optimization]) -> Undo:
    """Apply `parts` in order of composition; a failure undoes what was already applied.

    Raises:
        Refusal: the first technique that refuses this model, with its reason.
    """
    undos: list[tuple[Optimization, Undo]] = []

    def undo_all() -> None:
        while undos:
            part, undo = undos.pop()
            undo()
            runner.applied.remove(part)

    try:
        for part in compose(parts):
            reason = part.refusal(target_of(runner))
            if reason:
                raise Refusal(f"{part.name} refuses {runner.model.config.model_type}: {reason}")
            undos.append((part, part.apply(runner)))
            runner.applied.append(part)
    except BaseException:
        undo_all()
        raise
    return undo_all


@contextlib.contextmanager
def optimize(model: Any, *specs: str | Optimization, processor: Any = None) -> Iterator[Runner]:
    """Apply techniques to a transformers model for the length of a `with` block.

    Args:
        model: any transformers causal language model (or a `Runner`).
        specs: names, `name(key=value)`, `a+b`, or configured techniques.
        processor: tokenizer or processor; needed where padding or images are.

    Raises:
        Refusal, UnknownOptimization, InvalidSpec, IncompatibleOptimizations
    """
    runner = model if isinstance(model, Runner) else Runner(model, processor)
    parts = [part for spec in specs for part in ([spec] if isinstance(spec, Optimization) else parse(spec))]
    undo = apply_all(runner, parts)
    try:
        yield runner
    finally:
        undo()
