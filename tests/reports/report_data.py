"""A run built from numbers: two optimizations of one model, one regression, one refusal, one missing cell."""

from __future__ import annotations

import dataclasses

from pytest_inferencepio.baselines import cell_of
from pytest_inferencepio.gate_run import RunVerdict
from pytest_inferencepio.record import Metric, Record, metric, not_measured
from pytest_inferencepio.reports.run_data import RunData
from pytest_inferencepio.verdict import ACCEPT, Finding, Outcome, Verdict, verdict_of

FINGERPRINT = {"cpu": "Example 9000", "isa": "avx2", "threads": 2, "arithmetic": {"float32": 1e11}}


@dataclasses.dataclass(frozen=True)
class Unmeasured:
    """A cell without a record."""

    model: str
    scale: str
    optimization: str
    category: str
    reason: str


def one_record(
    optimization: str, metrics: dict[str, Metric], category: str = "optimization_impact"
) -> Record:
    return Record(
        "qwen3_vl_2b", "tiny", optimization, category, "cpu", "bfloat16", {"prompt": 64}, metrics, FINGERPRINT
    )


def none() -> Record:
    """The unoptimized model, against itself."""
    metrics = {
        "speedup": metric("speedup", 1.001, 0.99, 1.01, 9),
        "total_time": metric("total_time", 0.182, 0.18, 0.19, 9),
        "time_per_output_token": metric("time_per_output_token", 0.0123, 0.012, 0.013, 9),
        "peak_memory": metric("peak_memory", 412e6),
        "perplexity": metric("perplexity", 9.12),
        "task_exact_match": metric("task_exact_match", 0.98),
    }
    return one_record("none", metrics)


def int4() -> Record:
    """Faster, smaller, slightly less accurate."""
    metrics = {
        "speedup": metric("speedup", 1.84, 1.8, 1.88, 9),
        "decode_speedup": metric("decode_speedup", 2.36, 2.3, 2.41, 9),
        "total_time": metric("total_time", 0.099, 0.098, 0.1, 9),
        "time_per_output_token": metric("time_per_output_token", 0.00521),
        "peak_memory": metric("peak_memory", 210e6),
        "memory_ratio": metric("memory_ratio", 210 / 412),
        "weight_memory": metric("weight_memory", 3.1e6),
        "perplexity": metric("perplexity", 9.15),
        "perplexity_ratio": metric("perplexity_ratio", 9.15 / 9.12),
        "kl_divergence": metric("kl_divergence", 0.0021),
        "top1_agreement": metric("top1_agreement", 0.991),
        "task_exact_match": metric("task_exact_match", 0.98),
        "energy_per_token": not_measured("energy_per_token", "no counter is readable"),
    }
    return one_record("weight_int4(group_size=64)", metrics)


def regression(record: Record) -> Finding:
    return Finding(
        cell_of(record),
        "decode_speedup",
        Outcome.REGRESSION,
        before=2.6,
        after=2.36,
        low=2.3,
        high=2.41,
        n=9,
        threshold="allowed: 3.0 % slower (least change of interest)",
        advice=ACCEPT,
    )


def run(*, gated: bool = True, findings: tuple[Finding, ...] | None = None) -> RunData:
    """The run; by default one regression of weight_int4."""
    records = (none(), int4())
    found = (regression(records[1]),) if findings is None else findings
    verdicts = [
        Verdict(cell_of(records[0]), verdict_of(cell_of(records[0]), []).status),
        verdict_of(cell_of(records[1]), found),
    ]
    refused = Unmeasured("qwen3_vl_2b", "tiny", "layer_streaming", "accuracy", "the disk is read only")
    again = dataclasses.replace(refused, category="throughput")
    missing = Unmeasured("qwen3_vl_2b", "tiny", "kv_int8", "accuracy", "the time budget was used up")
    return RunData(
        measured=list(zip(records, verdicts, strict=True)),
        refused=[refused, again],
        missing=[missing],
        run=RunVerdict(tuple(verdicts), {}, {}, (), (), (), ("a note of the run",)),
        seconds=123.4,
        fingerprint=FINGERPRINT,
        gated=gated,
    )
