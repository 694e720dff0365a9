"""The least time this machine allows for a token and for a prompt, and how near a model comes.

A roofline (Williams et al., CACM 2009) of two ceilings: a step must read its weights at the measured bandwidth and
compute its products at the measured arithmetic; whichever takes longer bounds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pytest_inferencepio.machine import Fingerprint, Work
from pytest_inferencepio.measure.latency import Generation
from pytest_inferencepio.measure.metrics import from_estimate
from pytest_inferencepio.record import Metric, keyed, metric, not_measured
from pytest_inferencepio.stats import median_estimate

READING, COMPUTING = "reading", "computing"
_MIB = 1 << 20
_ONE_STEP = "all tokens came out of one step, so there is no time between tokens; ask for more tokens"


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least seconds of something, and which of `reading` and `computing` takes that long."""

    seconds: float
    limit: str


def decode_bound(work: Work, machine: Fingerprint) -> Bound:
    """Least seconds per output token: one step reads the weights once, and yields `tokens_per_step` tokens."""
    reading = work.bytes_per_step / machine.bandwidth_at(work.bytes_per_step) / work.tokens_per_step
    return _slower(reading, work.flops_per_token / machine.peak_arithmetic)


def prefill_bound(work: Work, machine: Fingerprint) -> Bound:
    """Least seconds until the first of `prompt_tokens` is answered: weights are read once, every token computed."""
    reading = work.bytes_per_step / machine.bandwidth_at(work.bytes_per_step)
    return _slower(reading, work.flops_per_token * work.prompt_tokens / machine.peak_arithmetic)


def machine_metrics(machine: Fingerprint) -> dict[str, Metric]:
    """Read bandwidth by working set, arithmetic peak by data type, threads."""
    found = {"threads": metric("threads", machine.threads)}
    for size, rate in sorted(machine.read_bandwidth.items()):
        name = keyed("read_bandwidth", f"{size / _MIB:g}MiB")
        found[name] = metric(name, rate.value, n=rate.n)
    for dtype, rate in machine.arithmetic.items():
        name = keyed("arithmetic_peak", dtype)
        found[name] = metric(name, rate.value, n=rate.n)
    return found


def roofline_metrics(
    generations: Sequence[Generation], work: Work, machine: Fingerprint
) -> dict[str, Metric]:
    """Bytes and operations per token, the least times, and the shares of them that `generations` reach."""
    first = [generation.time_to_first_token for generation in generations]
    later = [generation.time_per_output_token for generation in generations]
    prefill, decode = prefill_bound(work, machine), decode_bound(work, machine)
    flops = work.flops_per_token * work.prompt_tokens
    return {
        "bytes_read_per_token": metric("bytes_read_per_token", work.bytes_per_step / work.tokens_per_step),
        "flops_per_token": metric("flops_per_token", work.flops_per_token),
        "least_time_to_first_token": metric("least_time_to_first_token", prefill.seconds),
        "least_time_per_output_token": metric("least_time_per_output_token", decode.seconds),
        "prefill_roofline_share": _share("prefill_roofline_share", prefill, first),
        "decode_roofline_share": _share("decode_roofline_share", decode, later),
        "arithmetic_rate": from_estimate("arithmetic_rate", median_estimate(first).inverted(flops)),
    }


def notes(work: Work, machine: Fingerprint) -> list[str]:
    """Which ceiling bounds what."""
    fastest = max(machine.arithmetic, key=lambda dtype: machine.arithmetic[dtype].value)
    told = (
        f"bound by {prefill_bound(work, machine).limit} in prefill and by {decode_bound(work, machine).limit} in "
        f"decode; ceilings: the read bandwidth at the model's working set and the {fastest} peak, cache bytes and the "
        "arithmetic of attention not counted"
    )
    return [told]


def _slower(reading: float, computing: float) -> Bound:
    return Bound(reading, READING) if reading >= computing else Bound(computing, COMPUTING)


def _share(name: str, bound: Bound, seconds: Sequence[float]) -> Metric:
    if min(seconds) <= 0:
        return not_measured(name, _ONE_STEP)
    return from_estimate(name, median_estimate(seconds).inverted(bound.seconds))
