"""Counters: RAPL files with wrap and missing rights, NVML's calls, and every reason for not measuring."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from optimizations.runner import Runner
from pytest_inferencepio import workloads
from pytest_inferencepio.errors import NotMeasurable
from pytest_inferencepio.measure import energy
from pytest_inferencepio.measure.energy import NvmlMeter, RaplMeter, RaplZone


def add_zone(root: Path, folder: str, name: str, microjoules: int, wrap: int = 1000) -> Path:
    zone = root / folder
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "max_energy_range_uj").write_text(f"{wrap}\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    return zone


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, one sub-domain inside the first, and the platform domain that contains both."""
    root = tmp_path / "powercap"
    add_zone(root, "intel-rapl:0", "package-0", 100)
    add_zone(root, "intel-rapl:1", "package-1", 900)
    add_zone(root, "intel-rapl:0:0", "core", 50)
    add_zone(root, "intel-rapl:2", "psys", 5000)
    return root


def test_packages_are_added_and_what_they_contain_is_not(powercap: Path) -> None:
    meter = RaplMeter(powercap)
    meter.start()
    for folder, microjoules in (("intel-rapl:0", 300), ("intel-rapl:1", 950), ("intel-rapl:0:0", 999)):
        (powercap / folder / "energy_uj").write_text(str(microjoules))
    assert meter.joules() == pytest.approx(250e-6)


def test_a_counter_that_wrapped_goes_on(powercap: Path) -> None:
    meter = RaplMeter(powercap)
    meter.start()
    counter = powercap / "intel-rapl:1" / "energy_uj"
    for reading in (980, 30, 700, 10):  # + 80, + 50 over the wrap at 1000, + 670, + 310 over it again
        counter.write_text(str(reading))
        meter.update()
    assert meter.joules() == pytest.approx(1110e-6)


def test_starting_again_forgets(powercap: Path) -> None:
    meter = RaplMeter(powercap)
    meter.start()
    (powercap / "intel-rapl:0" / "energy_uj").write_text("500")
    assert meter.joules() > 0
    meter.start()
    assert meter.joules() == 0


def test_no_interface_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(NotMeasurable, match=r"no RAPL counters: .*powercap does not exist"):
        RaplMeter(tmp_path / "powercap")


def test_no_package_is_a_reason(tmp_path: Path) -> None:
    add_zone(tmp_path, "intel-rapl:0", "psys", 5)
    with pytest.raises(NotMeasurable, match="lists no processor package"):
        RaplMeter(tmp_path)


def test_no_right_to_read_is_a_reason(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: RaplZone) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(RaplZone, "read", forbidden)
    with pytest.raises(NotMeasurable, match=r"may not be read by this user: .*energy_uj.*CVE-2020-8694"):
        RaplMeter(powercap)


class NvmlError(Exception):
    """What pynvml raises."""


def nvml(readings: list[int], *, broken: bool = False) -> Any:
    """The four names of pynvml that are used; readings in millijoules."""
    following = iter(readings)

    def total(handle: str) -> int:
        if broken:
            raise NvmlError("Not Supported")
        assert handle == "handle of GPU-abc"
        return next(following)

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
        nvmlDeviceGetTotalEnergyConsumption=total,
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        energy.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc")
    )


@pytest.mark.usefixtures("gpu")
def test_nvml_counts_millijoules_of_the_device_by_its_uuid() -> None:
    meter = NvmlMeter("cuda", nvml([1000, 2000, 4500]))
    meter.start()
    assert meter.joules() == 2.5


@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_a_counter_is_a_reason() -> None:
    with pytest.raises(NotMeasurable, match="NVML gives no energy counter for cuda: Not Supported"):
        NvmlMeter("cuda", nvml([], broken=True))


def test_nvml_that_is_not_installed_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NotMeasurable, match="pip install nvidia-ml-py"):
        NvmlMeter("cuda")


def test_a_cpu_is_metered_by_rapl_and_a_gpu_by_nvml(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(energy.open_meter("cpu", powercap), RaplMeter)
    fake = ModuleType("pynvml")
    vars(fake).update(vars(nvml([7])))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(
        energy.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc")
    )
    assert isinstance(energy.open_meter("cuda"), NvmlMeter)


class Counter:
    """A meter of 3 J per reading."""

    source, scope = "test", "nothing"

    def __init__(self, joules: float = 3.0) -> None:
        self.value = joules

    def start(self) -> None:
        """Counts from nothing."""

    def joules(self) -> float:
        return self.value


def test_work_is_repeated_for_the_time_given() -> None:
    clock = itertools.count(0.0, 0.5)
    sample = energy.measure(Counter(), lambda: 4, 2.0, clock=lambda: next(clock))
    assert sample.tokens % 4 == 0 and sample.tokens >= 8
    assert sample.per_token == pytest.approx(3.0 / sample.tokens)
    assert sample.seconds >= 2.0


def test_a_counter_that_stands_still_is_a_reason() -> None:
    with pytest.raises(NotMeasurable, match="the test counter did not move in .* measure for longer"):
        energy.measure(Counter(0.0), lambda: 1, 0.0)


def test_energy_per_token_of_real_generations(runner: Runner) -> None:
    inputs = workloads.prompt(runner, 8)
    found = energy.energy_per_token(runner, inputs, 3, 0.0, Counter())
    assert found.value == pytest.approx(1.0) and found.n == 3
    missing = energy.energy_per_token(runner, inputs, 3, 0.0, Counter(0.0))
    assert missing.value is None and "did not move" in str(missing.reason)
