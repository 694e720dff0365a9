"""Requests, completions and the plain server: static batching, what every runner has by default."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from optimizations.runner import Runner


@dataclasses.dataclass(frozen=True)
class Request:
    """One request: token ids of the prompt, how many tokens to produce, arrival in seconds from the start."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    arrival: float = 0.0


@dataclasses.dataclass(frozen=True)
class Completion:
    """What came out: tokens and the moment (seconds from the start) each became available."""

    request: Request
    token_ids: tuple[int, ...]
    token_times: tuple[float, ...]

    @property
    def time_to_first_token(self) -> float:
        """Seconds from arrival to the first token."""
        return self.token_times[0] - self.request.arrival

    @property
    def time_per_output_token(self) -> float:
        """Seconds per token after the first; 0 tokens after the first has no such time (ValueError)."""
        if len(self.token_times) < 2:
            raise ValueError(f"request {self.request.request_id} produced fewer than two tokens")
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)


class Server(Protocol):
    """Drives a runner over requests that arrive in real time and returns one completion per request."""

    def serve(self, requests: Sequence[Request]) -> list[Completion]: ...


class StaticBatchServer:
    """Static batching: takes what has arrived, up to `batch_size`, pads left, runs the batch to its end.

    The baseline every continuous-batching paper compares with (Orca, OSDI '22).
    """

    def __init__(self, runner: Runner, batch_size: int = 8) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.runner = runner
        self.batch_size = batch_size

    def serve(self, requests: Sequence[Request]) -> list[Completion]:
        waiting = sorted(requests, key=lambda request: request.arrival)
        done: list[Completion] = []
        start = time.perf_counter()
        while waiting:
            wait_until(start + waiting[0].arrival)
            now = time.perf_counter() - start
            batch = [request for request in waiting if request.arrival <= now][: self.batch_size]
            waiting = waiting[len(batch) :]
            done.extend(self.run_batch(batch, start))
        return done

    def run_batch(self, batch: Sequence[Request], start: float) -> list[Completion]:
        steps = max(request.max_new_tokens for request in batch)
        tokens, times = self.runner.timed_batch([request.prompt_ids for request in batch], steps)
        return [
            Completion(
                request,
                tuple(row[: request.max_new_tokens]),
                tuple(moment - start for moment in times[: request.max_new_tokens]),
            )
            for request, row in zip(batch, tokens, strict=True)
        ]


def wait_until(moment: float) -> None:
    """Idle until `moment` on the performance counter: the server has nothing to do before an arrival."""
    remaining = moment - time.perf_counter()
    if remaining > 0:
        time.sleep(remaining)
