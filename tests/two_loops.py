"""Runs a generation through transformers' loop and through the native decoder's own, over the same native decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from optimizations.decoder import generation
from optimizations.runner import Runner
from optimizations.session import optimize

PACKED = ("weight_int4", "native_decoder")  # packed output layers have the same bits in both loops


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@contextmanager
def transformers_loop(patch: pytest.MonkeyPatch) -> Iterator[None]:
    with patch.context() as inner:
        inner.setattr(generation, "unsuitable", lambda *_: "a test wants transformers' loop")
        yield


@contextmanager
def passes(model: Any) -> Iterator[list[int]]:
    """Tokens of every pass whose inputs transformers prepared; counted in the class, as the loop minds the instance."""
    cls, found = type(model), []
    own = "prepare_inputs_for_generation" in cls.__dict__
    prepare = cls.prepare_inputs_for_generation

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = prepare(self, *args, **kwargs)
        found.append(made["input_ids"].shape[1])
        return made

    cls.prepare_inputs_for_generation = counting
    yield found
    if own:
        cls.prepare_inputs_for_generation = prepare
    else:
        del cls.prepare_inputs_for_generation


def both_loops(
    runner: Runner, patch: pytest.MonkeyPatch, parts: tuple[str, ...], make: Callable[[], dict[str, Any]]
) -> list[Any]:
    """The results of transformers' loop and of ours, in which transformers prepared nothing but the prompt."""
    results = []
    with optimize(runner, *parts):
        for ours in (False, True):
            torch.manual_seed(3)
            with passes(runner.model) as prepared:
                if ours:
                    results.append(runner.generate(**make()))
                    assert len(prepared) == 1
                else:
                    with transformers_loop(patch):
                        results.append(runner.generate(**make()))
                    assert len(prepared) > 1
    return results
