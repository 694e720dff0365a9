"""Energy from hardware counters: NVML on a GPU, RAPL where it may be read. Never an estimate.

RAPL: Intel SDM vol. 3B 15.10, exported by Linux under /sys/class/powercap (`energy_uj` counts microjoules and
wraps after `max_energy_range_uj`). NVML: nvmlDeviceGetTotalEnergyConsumption, millijoules since the driver
was loaded (Volta and newer).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pytest_inferencepio.errors import NotMeasurable
from pytest_inferencepio.measure.timing import synchronize
from pytest_inferencepio.record import Metric, metric, not_measured

if TYPE_CHECKING:
    from optimizations.runner import Runner

POWERCAP = Path("/sys/class/powercap")
# A package counter of 2^32 units of 15 µJ wraps after a minute at 1 kW: it has to be read more often than that.
WRAP_SECONDS = 30.0


class Meter(Protocol):
    """A counter of joules. `source` names it; `scope` says whose energy it counts."""

    source: str
    scope: str

    def start(self) -> None:
        """Note the counter."""

    def joules(self) -> float:
        """Joules since `start`."""


@dataclasses.dataclass
class RaplZone:
    """One package domain: where its counter is, at what value it wraps (microjoules)."""

    name: str
    path: Path
    wrap: int

    def read(self) -> int:
        return int((self.path / "energy_uj").read_text())


class RaplMeter:
    """Sum of all package domains; sub-domains are inside their package and not added."""

    source = "RAPL"
    scope = "all processor packages, whatever runs on them"

    def __init__(self, root: Path = POWERCAP) -> None:
        self.zones = rapl_zones(root)
        self._last: list[int] = []
        self._microjoules = 0

    def start(self) -> None:
        self._last = [zone.read() for zone in self.zones]
        self._microjoules = 0

    def update(self) -> None:
        """Add what was counted since the last reading; call more often than the counter wraps."""
        now = [zone.read() for zone in self.zones]
        for zone, before, after in zip(self.zones, self._last, now, strict=True):
            self._microjoules += after - before if after >= before else after + zone.wrap - before
        self._last = now

    def joules(self) -> float:
        self.update()
        return self._microjoules / 1e6


class NvmlMeter:
    """The GPU's own counter."""

    source = "NVML"
    scope = "the whole GPU, whatever runs on it"

    def __init__(self, device: str = "cuda", nvml: ModuleType | None = None) -> None:
        self._nvml = nvml or _import_nvml()
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(device_uuid(device))
            self._start = self._read()
        except self._nvml.NVMLError as error:
            raise NotMeasurable(f"NVML gives no energy counter for {device}: {error}") from error

    def start(self) -> None:
        self._start = self._read()

    def joules(self) -> float:
        return (self._read() - self._start) / 1e3

    def _read(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def device_uuid(device: str) -> str:
    """NVML's name of a torch device: indices differ under CUDA_VISIBLE_DEVICES, UUIDs do not."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def rapl_zones(root: Path = POWERCAP) -> list[RaplZone]:
    """Readable package domains under `root`.

    Raises:
        NotMeasurable: no powercap interface, no package domain in it, or no right to read one.
    """
    if not root.is_dir():
        raise NotMeasurable(f"no RAPL counters: {root} does not exist (virtual machines rarely have it)")
    zones = [
        RaplZone(_text(path / "name"), path, int(_text(path / "max_energy_range_uj")))
        for path in sorted(root.glob("*rapl:*"))
        if path.name.count(":") == 1 and _text(path / "name").startswith("package")
    ]
    if not zones:
        raise NotMeasurable(f"no RAPL counters: {root} lists no processor package")
    for zone in zones:
        try:
            zone.read()
        except PermissionError as error:
            raise NotMeasurable(
                f"RAPL counters may not be read by this user: {zone.path / 'energy_uj'} "
                "(since CVE-2020-8694 only root may; grant read permission to measure energy)"
            ) from error
    return zones


def open_meter(device: str = "cpu", root: Path = POWERCAP) -> Meter:
    """The counter for `device`.

    Raises:
        NotMeasurable: there is none here, and why.
    """
    if torch.device(device).type == "cuda":
        return NvmlMeter(device)
    return RaplMeter(root)


@dataclasses.dataclass(frozen=True)
class EnergySample:
    """Joules and tokens of repeated work, and how long it ran."""

    joules: float
    tokens: int
    seconds: float

    @property
    def per_token(self) -> float:
        return self.joules / self.tokens


def measure(
    meter: Meter, work: Callable[[], int], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> EnergySample:
    """Repeat `work` (returns tokens produced) for at least `seconds`, reading the counter around it.

    Raises:
        NotMeasurable: the counter did not move, so it is not updated or finer than the time given.
    """
    meter.start()
    start = last = clock()
    tokens = 0
    while tokens == 0 or clock() - start < seconds:
        tokens += work()
        if isinstance(meter, RaplMeter) and clock() - last > WRAP_SECONDS:
            meter.update()
            last = clock()
    elapsed, joules = clock() - start, meter.joules()
    if joules <= 0:
        raise NotMeasurable(f"the {meter.source} counter did not move in {elapsed:.3g} s; measure for longer")
    return EnergySample(joules, tokens, elapsed)


def energy_per_token(
    runner: Runner, inputs: Mapping[str, Any], new_tokens: int, seconds: float, meter: Meter | None = None
) -> Metric:
    """`energy_per_token` of repeated generations from `inputs` [1, prompt]; not measured, with the reason,
    where there is no counter. Prompt processing is included, spread over the new tokens."""

    def work() -> int:
        runner.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        synchronize(runner.model.device)
        return new_tokens

    try:
        meter = meter or open_meter(str(runner.model.device))
        sample = measure(meter, work, seconds)
    except NotMeasurable as error:
        return not_measured("energy_per_token", str(error))
    return metric("energy_per_token", sample.per_token, n=sample.tokens)


def _import_nvml() -> ModuleType:
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise NotMeasurable(
            "NVML is not installed; `pip install nvidia-ml-py` (not the deprecated package `pynvml`)"
        ) from error
    return pynvml


def _text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
