"""A slower kernel, doubled memory and a perturbed weight on a real model, each found in the cell it is in."""

from __future__ import annotations

import pytest
from real_gate import MODEL, Gate

# Little of everything, and a clock that advances with the work instead of with the time: a forward pass of the model
# takes a second of it, an extra product of the slow kernel a millisecond, a look at it a hundredth. So the speeds are
# those of a machine without noise, and the gate sees on it what a busy one might hide. Memory is that of real processes.
LITTLE = """
import time

import torch

LITTLE = dict(pairs=5, warmup=1, prompt_tokens=32, heldout_tokens=512, task_examples=2, task_distance=64)


def pytest_pio_workloads(scale):
    return {"generations": 1, "new_tokens": 4, "processes": 1, **LITTLE}


class Clock:
    now = 0.0

    def __call__(self):
        self.now += 0.01
        return self.now


def forward_takes_a_second(module, inputs):
    clock.now += type(module).__name__ == "Qwen3ForCausalLM"


def product_takes_a_millisecond(*matrices, product=torch.mm):
    clock.now += 0.001
    return product(*matrices)


def pytest_sessionstart():
    # By then pytest-benchmark has its own clock, which it looks up by name.
    time.perf_counter = clock
    torch.mm = product_takes_a_millisecond
    torch.nn.modules.module.register_module_forward_pre_hook(forward_takes_a_second)


clock = Clock()
"""

# Each technique in the category that has to notice, and where nothing is to be noticed.
CELLS = (
    "(test_inference_speed and slow_kernel) or (test_memory_usage and (hungry_cache or perturbed_weight)) "
    "or (test_accuracy and perturbed_weight)"
)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """Baselines of the sound techniques."""
    found = Gate(tmp_path_factory.mktemp("gate"), conftest=LITTLE)
    done = found.run("-k", CELLS, "--pio-update-baseline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    return found


def test_each_fault_fails_its_own_cell(gate: Gate) -> None:
    stored = {path.name: path.read_bytes() for path in (gate.path / "baselines").iterdir()}
    done = gate.run(
        "-k", CELLS, "--benchmark-compare", fault="slow_kernel=0.3,hungry_cache=20,perturbed_weight=0.5"
    )
    failures = gate.failures()
    assert done.returncode == 1
    assert set(failures) == {
        f"test_inference_speed[{MODEL}-tiny-slow_kernel]",
        f"test_memory_usage[{MODEL}-tiny-hungry_cache]",
        f"test_accuracy[{MODEL}-tiny-perturbed_weight]",
    }, done.stdout
    slow = failures[f"test_inference_speed[{MODEL}-tiny-slow_kernel]"]
    assert f"regression: {MODEL} tiny, slow_kernel, inference_speed: decode_speedup" in slow
    hungry = failures[f"test_memory_usage[{MODEL}-tiny-hungry_cache]"]
    assert f"regression: {MODEL} tiny, hungry_cache, memory_usage: peak_memory" in hungry
    perturbed = failures[f"test_accuracy[{MODEL}-tiny-perturbed_weight]"]
    assert f"regression: {MODEL} tiny, perturbed_weight, accuracy: kl_divergence" in perturbed
    assert "--pio-update-baseline" in perturbed
    assert {path.name: path.read_bytes() for path in (gate.path / "baselines").iterdir()} == stored
