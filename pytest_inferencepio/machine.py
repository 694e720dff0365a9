"""This machine in a mapping: what it is, how fast it reads and computes, and what no figure may exceed.

Comparing fingerprints and checking figures needs no torch; only measuring does.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_inferencepio.errors import ImpossibleFigure
from pytest_inferencepio.record import Metric

# Which parts of a fingerprint make ratios of speeds comparable; the amount of memory, say, does not.
CLASS_FIELDS = ("cpu", "isa", "threads", "device")
_ISA_FLAGS = (  # best first: what the name of a set needs
    ("avx512_bf16_vnni", {"avx512f", "avx512_bf16", "avx512_vnni"}),
    ("avx512_vnni", {"avx512f", "avx512_vnni"}),
    ("avx512", {"avx512f"}),
    ("avx2", {"avx2", "fma"}),
    ("neon", {"asimd"}),
)
REMEASURE = 3  # other processes can slow down a whole measurement of a ceiling, hardly three
_VERSIONED = ("torch", "transformers", "pytest-inferencepio")


@dataclasses.dataclass(frozen=True)
class Rate:
    """A measured rate per second: the best of `n` tries, because interference only ever slows one down."""

    value: float
    n: int


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a figure was measured on.

    `read_bandwidth` maps a working set in bytes to bytes/s read from it again and again; `arithmetic` maps
    float32, bfloat16 and int8 to operations/s of a matrix product (a multiply-add is two). `threads` is what
    torch uses, `memory` in bytes, `commit` the HEAD of the repository around the working directory, `dirty`
    whether it had changes.
    """

    cpu: str
    isa: str
    cores: int
    threads: int
    memory: int
    os: str
    device: str
    python: str
    versions: Mapping[str, str]
    commit: str | None
    dirty: bool | None
    read_bandwidth: Mapping[int, Rate]
    arithmetic: Mapping[str, Rate]

    def to_mapping(self) -> dict[str, Any]:
        """Plain types for a record; keys of `read_bandwidth` become decimal strings."""
        plain = dataclasses.asdict(self)
        plain["read_bandwidth"] = {
            str(size): dataclasses.asdict(rate) for size, rate in self.read_bandwidth.items()
        }
        plain["machine_class"] = machine_class(plain)
        return plain

    def merged(self, other: Fingerprint) -> Fingerprint:
        """The higher of both measured rates: the machine was less busy in one of the two measurements."""
        return dataclasses.replace(
            self,
            read_bandwidth=_faster(self.read_bandwidth, other.read_bandwidth),
            arithmetic=_faster(self.arithmetic, other.arithmetic),
        )

    def bandwidth_at(self, working_set: float) -> float:
        """Bytes/s that nothing reading `working_set` bytes over and over can exceed.

        The rate of the largest measured size that is not larger: smaller sets sit in faster caches, so
        this errs upwards.
        """
        sizes = sorted(self.read_bandwidth)
        fitting = [size for size in sizes if size <= working_set] or sizes[:1]
        return max(self.read_bandwidth[size].value for size in sizes if size >= fitting[-1])

    @property
    def peak_arithmetic(self) -> float:
        """Operations/s of the fastest data type."""
        return max(rate.value for rate in self.arithmetic.values())


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that one step of a model must do, from its real tensors.

    `bytes_per_step` are read once per forward pass of decoding, `tokens_per_step` come out of it (the batch,
    or accepted drafts), `flops_per_token` are multiplications and additions of the active weights.
    `prompt_tokens` pass the model in one forward pass of prefill, which reads the weights too; 0 where that is unknown.
    """

    bytes_per_step: float
    flops_per_token: float
    tokens_per_step: float = 1.0
    prompt_tokens: float = 0.0


def fingerprint(device: str = "cpu", *, measure: bool = True) -> Fingerprint:
    """This machine, measured once per process, device and number of threads (about a second).

    Without `measure` the rates are empty: enough to say what machine this is.
    """
    key = (device, _threads(), measure)
    if key not in _known:
        _known[key] = _take(device, measure)
    return _known[key]


def remeasured(device: str = "cpu") -> Fingerprint:
    """The fingerprint with its rates measured again and the higher ones kept, for later calls too."""
    known = fingerprint(device)
    _known[(device, _threads(), True)] = known.merged(_take(device, measure=True))
    return fingerprint(device)


def reread(device: str = "cpu") -> None:
    """Measure reading of the largest working set again (a third of a second) and keep the higher rate.

    Memory that others share changes its speed by half for minutes: a ceiling has to have seen what a figure saw, so this
    runs beside the samples of a figure that comes close.
    """
    from pytest_inferencepio.measure import rates

    known = fingerprint(device)
    found = rates.read_bandwidth(device, (max(known.read_bandwidth),))
    faster = _faster(known.read_bandwidth, found)
    _known[(device, _threads(), True)] = dataclasses.replace(known, read_bandwidth=faster)


def machine_class(fingerprint: Mapping[str, Any]) -> str:
    """One line that is equal where speed ratios are from the same kind of machine and torch release."""
    parts = [f"{name}={fingerprint.get(name)}" for name in CLASS_FIELDS]
    torch_release = ".".join(str(dict(fingerprint.get("versions", {})).get("torch")).split(".")[:2])
    return " ".join([*parts, f"torch={torch_release}"])


def ceiling_violations(metrics: Mapping[str, Metric], work: Work, machine: Fingerprint) -> list[str]:
    """Sentences about figures above what `machine` can do; empty when all are possible.

    Rates of tokens are checked against the bytes they must read and the operations they must compute.
    """
    bandwidth = machine.bandwidth_at(work.bytes_per_step)
    reading = bandwidth * work.tokens_per_step / max(work.bytes_per_step, 1.0)
    computing = machine.peak_arithmetic / max(work.flops_per_token, 1.0)
    prefilling = (computing, "what the measured arithmetic allows")
    if work.prompt_tokens:
        once = bandwidth * work.prompt_tokens / max(work.bytes_per_step, 1.0)
        prefilling = min(prefilling, (once, "what reading the weights once for the prompt allows"))
    limits = {
        "memory_bandwidth": (bandwidth, "the measured read bandwidth at this working set"),
        "decode_tokens_per_second": (min(reading, computing), "what reading and computing the weights allow"),
        "output_tokens_per_second": (min(reading, computing), "what reading and computing the weights allow"),
        "prefill_tokens_per_second": prefilling,
    }
    return [
        f"{name} of {metrics[name].value:.4g} {metrics[name].unit} exceeds {limit:.4g}, {why}"
        for name, (limit, why) in limits.items()
        if name in metrics and (metrics[name].value or 0.0) > limit
    ]


def require_possible(metrics: Mapping[str, Metric], work: Work, device: str = "cpu") -> None:
    """Refuse figures above the ceilings, which are measured again up to `REMEASURE` times before that.

    Raises:
        ImpossibleFigure: what exceeds what; the measurement or the count of bytes is wrong.
    """
    violations = ceiling_violations(metrics, work, fingerprint(device))
    for _ in range(REMEASURE):
        if not violations:
            return
        violations = ceiling_violations(metrics, work, remeasured(device))
    if violations:
        raise ImpossibleFigure(
            f"{'; '.join(violations)}. The work was not done, or its bytes are counted wrongly; "
            "if the machine was busy while it was fingerprinted, run again."
        )


_known: dict[tuple[str, int, bool], Fingerprint] = {}


def _take(device: str, measure: bool) -> Fingerprint:
    from pytest_inferencepio.measure import rates

    cpu, flags = read_cpu()
    commit, dirty = read_commit(Path.cwd())
    return Fingerprint(
        cpu=cpu,
        isa=_isa(flags),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=_threads(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        device=rates.device_name(device),
        python=platform.python_version(),
        versions=_versions(),
        commit=commit,
        dirty=dirty,
        read_bandwidth=rates.read_bandwidth(device) if measure else {},
        arithmetic=rates.arithmetic(device) if measure else {},
    )


def read_cpu(path: Path = Path("/proc/cpuinfo")) -> tuple[str, set[str]]:
    """Name of the processor and its flags; the platform's name where Linux does not describe it.

    The name carries family, model and stepping, because clouds call different generations the same.
    """
    if not path.is_file():
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.machine()
    numbers = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    suffix = f" ({'/'.join(numbers)})" if numbers else ""
    return name + suffix, set(fields.get("flags", fields.get("Features", "")).split())


def read_commit(directory: Path) -> tuple[str | None, bool | None]:
    """HEAD of the repository around `directory` and whether files differ from it; None outside of one."""
    head = _git(directory, "rev-parse", "HEAD")
    changes = _git(directory, "status", "--porcelain")
    if head is None or changes is None:
        return head and head.strip(), None
    return head.strip(), bool(changes)


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _isa(flags: set[str]) -> str:
    """The set the kernels use; without kernels, the best of the known sets that the processor has."""
    from optimizations.errors import NativeModuleMissing
    from optimizations.native.loader import native

    try:
        return str(native().isa())
    except NativeModuleMissing:
        return next((name for name, needed in _ISA_FLAGS if needed <= flags), "portable") + " (no kernels)"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _versions() -> dict[str, str]:
    installed = {}
    for name in _VERSIONED:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def _faster(one: Mapping[Any, Rate], other: Mapping[Any, Rate]) -> dict[Any, Rate]:
    return {key: max(one[key], other.get(key, one[key]), key=lambda rate: rate.value) for key in one}
