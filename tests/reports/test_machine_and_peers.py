"""The tables of the categories `hardware` and `comparative`, on the terminal and in report.md."""

from __future__ import annotations

import dataclasses

from report_data import one_record

from pytest_inferencepio.baselines import cell_of
from pytest_inferencepio.record import Record, metric, not_measured
from pytest_inferencepio.reports import hardware, markdown, peers, terminal
from pytest_inferencepio.reports.run_data import RunData
from pytest_inferencepio.verdict import Status, Verdict


def data_of(*records: Record) -> RunData:
    return RunData([(record, Verdict(cell_of(record), Status.PASSED)) for record in records])


def machine_record(optimization: str, bandwidth: float) -> Record:
    metrics = {
        "read_bandwidth[16MiB]": metric("read_bandwidth[16MiB]", bandwidth),
        "arithmetic_peak[int8]": metric("arithmetic_peak[int8]", 1.2e12),
        "bytes_read_per_token": metric("bytes_read_per_token", 2.5e9),
        "least_time_per_output_token": metric("least_time_per_output_token", 0.036),
        "time_per_output_token": metric("time_per_output_token", 0.048, 0.047, 0.05, 9),
        "decode_roofline_share": metric("decode_roofline_share", 0.75, 0.72, 0.766, 9),
        "least_time_to_first_token": metric("least_time_to_first_token", 0.9),
        "time_to_first_token": metric("time_to_first_token", 1.8),
        "prefill_roofline_share": metric("prefill_roofline_share", 0.5),
    }
    return one_record(optimization, metrics, "hardware")


def peer_record() -> Record:
    metrics = {
        "decode_tokens_per_second": metric("decode_tokens_per_second", 24.0),
        "decode_tokens_per_second[llama_cpp]": metric("decode_tokens_per_second[llama_cpp]", 16.0),
        "decode_speedup[llama_cpp]": metric("decode_speedup[llama_cpp]", 1.5, 1.45, 1.55, 9),
        "prefill_tokens_per_second": metric("prefill_tokens_per_second", 150.0),
        "prefill_tokens_per_second[llama_cpp]": metric("prefill_tokens_per_second[llama_cpp]", 75.0),
        "prefill_speedup[llama_cpp]": metric("prefill_speedup[llama_cpp]", 2.0, 1.9, 2.1, 9),
        "speedup[llama_cpp]": metric("speedup[llama_cpp]", 1.8, 1.7, 1.9, 9),
        "speedup[torch_int4]": not_measured("speedup[torch_int4]", "torch_int4 refuses it: experts"),
        "speedup[other]": not_measured("speedup[other]", "the disk is full"),
    }
    return one_record("weight_int4", metrics, "comparative")


def text_of(data: RunData) -> str:
    return "\n".join(line.text for line in terminal.lines(data))


def test_shares_and_least_times_stand_in_one_row() -> None:
    (row,) = hardware.rows(data_of(machine_record("weight_int4", 7e10)).measured)
    assert row == (
        "qwen3_vl_2b tiny", "weight_int4", "2.50 GB", "36.0 ms", "48.0 ms", "75.0 %", "900 ms", "1.80 s", "50.0 %",
    )  # fmt: skip


def test_ceilings_are_told_once_and_the_highest() -> None:
    data = data_of(machine_record("none", 6e10), machine_record("weight_int4", 7e10))
    told = ["reads 70.0 GB/s at 16MiB", "computes 1.20T/s operations in int8"]
    assert hardware.ceilings(data.measured) == told
    assert "this machine reads 70.0 GB/s at 16MiB; computes" in text_of(data)
    report = markdown.report(data)
    assert "## Hardware\n\n- reads 70.0 GB/s at 16MiB\n- computes" in report
    assert "| qwen3_vl_2b tiny | weight_int4 | 2.50 GB |" in report


def test_what_has_no_share_says_so() -> None:
    record = machine_record("prompt_lookup", 7e10)
    metrics = {**record.metrics, "decode_roofline_share": not_measured("decode_roofline_share", "one step")}
    del metrics["time_to_first_token"]
    (row,) = hardware.rows(data_of(dataclasses.replace(record, metrics=metrics)).measured)
    assert row[5] == "-" and row[7] == "-"


def test_both_rates_and_the_ratio_stand_in_one_row() -> None:
    (row,) = peers.rows(data_of(peer_record()).measured)
    assert row == (
        "qwen3_vl_2b tiny", "weight_int4", "llama_cpp", "1.50x [1.45, 1.55]", "24.0/s / 16.0/s",
        "2.00x [1.90, 2.10]", "150/s / 75.0/s", "1.80x [1.70, 1.90]",
    )  # fmt: skip


def test_peers_that_were_not_measured_are_listed_with_the_reason_and_their_cells() -> None:
    other = dataclasses.replace(peer_record(), optimization="none")
    data = data_of(peer_record(), other)
    where = "(2 cells: qwen3_vl_2b/tiny/weight_int4/comparative, ...)"
    told = [f"torch_int4 refuses it: experts {where}", f"other: the disk is full {where}"]
    assert peers.unmeasured(data.measured) == told
    assert "peers not measured: 2" in text_of(data)
    report = markdown.report(data)
    assert all(
        f"- {line}" in report for line in ("torch_int4 refuses it: experts", "other: the disk is full")
    )


def test_runs_without_them_have_no_such_sections() -> None:
    data = data_of(one_record("none", {"peak_memory": metric("peak_memory", 1e6)}))
    assert hardware.rows(data.measured) == [] and peers.rows(data.measured) == []
    assert "## Hardware" not in markdown.report(data) and "## Peers" not in markdown.report(data)
    assert "hardware" not in text_of(data) and "peers" not in text_of(data)
