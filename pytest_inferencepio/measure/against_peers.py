"""A row against peers: interleaved where both fit into memory, in blocks one after the other where they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from optimizations.contract import Target
from optimizations.errors import Refusal
from pytest_inferencepio.catalog.memory import available_memory
from pytest_inferencepio.errors import NotEnoughMemory, NotMeasurable
from pytest_inferencepio.machine import Work, require_possible, reread
from pytest_inferencepio.measure import latency
from pytest_inferencepio.measure.timing import Interleaver, Paired, quiet_rounds
from pytest_inferencepio.peers.contract import Peer, PeerRequest, PeerSession
from pytest_inferencepio.record import Metric, keyed, not_measured

if TYPE_CHECKING:
    from pytest_inferencepio.measurement import Measurement

RATES = ("prefill_tokens_per_second", "decode_tokens_per_second")
RATIOS = ("speedup", "prefill_speedup", "decode_speedup")
OF_THE_ROW = (*RATES, "time_to_first_token", "time_per_output_token")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A peer's generations paired with the row's (`before` is the peer), its least work, and what to tell."""

    paired: Paired[latency.Generation]
    work: Work
    notes: tuple[str, ...]


class Comparison:
    """Measures one row against several peers, each in pairs of its own; pytest-benchmark times the first.

    `outcomes` has for every peer what was measured, or the reason why nothing was.
    """

    def __init__(self, measure: Measurement, prompt: Sequence[int]) -> None:
        self.measure = measure
        self.prompt = list(prompt)
        self.outcomes: dict[str, Measured | str] = {}
        self._timed = False

    def against(self, peer: Peer) -> None:
        """Measure against `peer`, or note in words why that is not possible here.

        Raises:
            MeasurementFailed: the peer is there, takes the model, and failed.
        """
        try:
            self.outcomes[peer.name] = self._measured(peer)
        except (NotMeasurable, NotEnoughMemory, Refusal) as reason:
            self.outcomes[peer.name] = str(reason)

    @property
    def measured(self) -> dict[str, Measured]:
        return {name: found for name, found in self.outcomes.items() if isinstance(found, Measured)}

    def _measured(self, peer: Peer) -> Measured:
        request = self.request()
        self.measure.make_room()  # a peer before this one may have needed the row's memory too
        if peer.memory(request) > available_memory(self.measure.device):
            return self._in_blocks(peer, request)
        session = peer.open(request)
        try:
            paired = self._rounds(
                Interleaver(
                    lambda: self._of(session),
                    self._of_row,
                    warmup=self.measure.budget.warmup,
                    seed=self.measure.seed,
                    beside=self._reread,
                )
            )
        finally:
            session.close()
        return Measured(paired, session.work, session.notes)

    def _in_blocks(self, peer: Peer, request: PeerRequest) -> Measured:
        """First the row, then, with its memory given back, the peer: drift between the blocks is not cancelled."""
        measure = self.measure
        rounds: Interleaver[latency.Generation] = Interleaver(
            None, self._of_row, warmup=measure.budget.warmup, beside=self._reread
        )
        paired = self._rounds(rounds)
        measure.release()
        if (need := peer.memory(request)) > (have := available_memory(measure.device)):
            raise NotEnoughMemory(
                f"{peer.name} needs {need / 2**30:.2f} GiB for this model, {have / 2**30:.2f} GiB are available"
            )
        session = peer.open(request)
        try:
            with quiet_rounds():
                found = []
                for _ in range(measure.budget.warmup + len(paired)):
                    found.append(self._of(session))
                    self._reread()
        finally:
            session.close()
        paired.before += found[measure.budget.warmup :]
        told = f"{peer.name}: measured in blocks, first the row, then the peer, since both do not fit into memory"
        return Measured(paired, session.work, (*session.notes, told))

    def _rounds(self, interleaver: Interleaver[latency.Generation]) -> Paired[latency.Generation]:
        """Through pytest-benchmark the first time, and by the same clock without it later: it times one call a test."""
        pairs = self.measure.budget.pairs
        if not self._timed:
            self._timed = True
            return interleaver.benchmark(self.measure.benchmark, pairs)
        with quiet_rounds():
            for _ in range(interleaver.warmup + pairs):
                interleaver.setup()
                interleaver.run_after()
                interleaver.teardown()
        return interleaver.paired

    def _reread(self) -> None:
        reread(self.measure.device)

    def _of(self, session: PeerSession) -> latency.Generation:
        return session.generate(self.prompt, self.measure.budget.new_tokens)

    def _of_row(self) -> latency.Generation:
        import torch

        runner = self.measure.after
        ids = torch.tensor([self.prompt], device=runner.model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return latency.generate_once(runner, inputs, self.measure.budget.new_tokens)

    def request(self) -> PeerRequest:
        """The unoptimized model of the row, with this process's number of threads."""
        return request_of(self.measure)


def request_of(measure: Measurement) -> PeerRequest:
    """What every peer of this row is asked to run."""
    import torch

    budget = measure.budget
    return PeerRequest(
        measure.row.model,
        measure.load_request,
        torch.get_num_threads(),
        budget.prompt_tokens + budget.new_tokens,
    )


def refusals(measure: Measurement, peers: Mapping[str, Peer]) -> dict[str, str]:
    """Why a peer cannot be measured against this row: not installed, or not for this model."""
    target = Target(measure.row.model.config(measure.row.scale), measure.device, measure.dtype)
    found: dict[str, str] = {}
    for name, peer in peers.items():
        reason = peer.missing()
        if reason is None and (refused := peer.refusal(target)):
            reason = f"{name} refuses {measure.row.model.name}: {refused}"
        if reason:
            found[name] = reason
    return found


def metrics(outcomes: Mapping[str, Measured | str], device: str) -> dict[str, Metric]:
    """Rates of the row and of every peer, and how many times as fast as the peer the row is, pair by pair.

    Raises:
        ImpossibleFigure: a peer's figure above what this machine can do.
    """
    rows = [one for found in outcomes.values() if isinstance(found, Measured) for one in found.paired.after]
    measured = latency.latency_metrics(rows) if rows else {}
    result = {name: measured[name] for name in OF_THE_ROW if measured}
    for name, found in outcomes.items():
        result |= _unmeasured(name, found) if isinstance(found, str) else _against(name, found, device)
    return result


def notes(outcomes: Mapping[str, Measured | str]) -> Iterator[str]:
    """What was run, and why what was not."""
    for name, found in outcomes.items():
        if isinstance(found, str):
            yield found if found.startswith(name) else f"{name}: {found}"
        else:
            yield from found.notes


def _against(name: str, found: Measured, device: str) -> dict[str, Metric]:
    rates = latency.latency_metrics(found.paired.before)
    prompt_tokens = found.paired.before[0].prompt_tokens
    require_possible(rates, dataclasses.replace(found.work, prompt_tokens=prompt_tokens), device)
    told = {**latency.ratio_metrics(found.paired), **rates}
    return {keyed(metric, name): told[metric] for metric in (*RATES, *RATIOS)}


def _unmeasured(name: str, reason: str) -> dict[str, Metric]:
    return {keyed(metric, name): not_measured(keyed(metric, name), reason) for metric in (*RATES, *RATIOS)}
