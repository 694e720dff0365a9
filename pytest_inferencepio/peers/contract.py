"""What a peer is: something a user would pick instead, run on the same dimensions."""

from __future__ import annotations

import abc
import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from optimizations.contract import Target
    from pytest_inferencepio.machine import Work
    from pytest_inferencepio.measure.latency import Generation
    from pytest_inferencepio.models import LoadRequest, Model


@dataclasses.dataclass(frozen=True)
class PeerRequest:
    """What a peer is to run: `model` as `load` would load it without optimizations, with `threads` threads, for
    `context` tokens of prompt and answer together."""

    model: Model
    load: LoadRequest
    threads: int
    context: int


class PeerSession(Protocol):
    """A peer with its model loaded.

    `work` is the least that its steps must do, for the ceilings; `notes` say what was run.
    """

    work: Work
    notes: tuple[str, ...]

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Generation:
        """Greedy generation of exactly `new_tokens` (two or more) after the token ids of `prompt`."""

    def close(self) -> None:
        """Give back its memory; closing again does nothing."""


class Peer(abc.ABC):
    """One peer. Importing its module needs nothing that may not be installed.

    `requires` are the modules without which it cannot run, `install` says how to get them, `distribution` is whose
    version is reported.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    install: ClassVar[str]
    distribution: ClassVar[str]

    def missing(self) -> str | None:
        """Why it cannot run on this machine, with what to install; None when it can."""
        absent = [module for module in self.requires if importlib.util.find_spec(module) is None]
        if not absent:
            return None
        return f"{self.name} is not installed here ({', '.join(absent)} not found): {self.install}"

    def version(self) -> str:
        """Name and version of the distribution it comes from."""
        return f"{self.distribution} {importlib.metadata.version(self.distribution)}"

    @abc.abstractmethod
    def refusal(self, target: Target) -> str | None:
        """Why it cannot run a model of this configuration, device and type, in words; None when it can."""

    @abc.abstractmethod
    def memory(self, request: PeerRequest) -> int:
        """Bytes that loading and running need, 0 where that is not known before."""

    @abc.abstractmethod
    def open(self, request: PeerRequest) -> PeerSession:
        """Load the model.

        Raises:
            NotMeasurable, NotEnoughMemory: it cannot be measured here, in words.
            MeasurementFailed: the peer failed.
        """
