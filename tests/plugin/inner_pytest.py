"""A user's repository for tests: its conftest, its benchmark test, and an inner pytest on it."""

from __future__ import annotations

import json
from typing import Any

import pytest

CONFTEST = '''
import dataclasses

import torch
from optimizations.contract import ROUNDING_BUDGET, Fidelity, Kind, Optimization
from optimizations.runner import Runner
from pytest_inferencepio.models import CustomModel
from transformers import Qwen3Config, Qwen3ForCausalLM


class Tokenizer:
    pad_token_id = 0
    eos_token_id = None


def make_config(scale):
    return Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )


def make_runner(request):
    torch.manual_seed(request.seed)
    model = Qwen3ForCausalLM(make_config(request.scale)).to(getattr(torch, request.dtype)).eval()
    return Runner(model.to(request.device), Tokenizer())


@dataclasses.dataclass(frozen=True)
class WideArithmetic(Optimization):
    """Computes in float32 what was stored narrower."""

    name = "wide_arithmetic"
    kind = Kind.COMPUTE
    fidelity = Fidelity.ROUNDING
    summary = "computes in float32"
    source = "this test"
    budget = ROUNDING_BUDGET
    refused_type: str = "glm4_moe_lite"

    def refusal(self, target):
        if target.model_type == self.refused_type:
            return f"{self.refused_type} is not for it"
        return None

    def apply(self, runner):
        dtype = runner.model.dtype
        runner.model.float()
        return lambda: runner.model.to(dtype)


def pytest_pio_models():
    return [CustomModel("small", make_config, make_runner, scales=("tiny", "full"))]


def pytest_pio_optimizations():
    return [WideArithmetic]
'''

BENCHMARK = """
from pytest_inferencepio import workloads
from pytest_inferencepio.measure.metrics import ratio_metric
from pytest_inferencepio.measure.memory import weight_memory
from pytest_inferencepio.record import metric


def test_prefill(pio_measure):
    inputs = workloads.prompt(pio_measure.after, 16, pio_measure.seed)
    paired = pio_measure.interleave(lambda runner: runner.forward(**inputs).logits, pairs=5, warmup=1)
    pio_measure.conclude(
        {
            "speedup": ratio_metric("speedup", paired.before_seconds, paired.after_seconds),
            "weight_memory": metric("weight_memory", weight_memory(pio_measure.after.model)),
        },
        {"prompt_tokens": 16},
    )
"""


class Project:
    """A user's repository with a model, an optimization and a benchmark test of its own."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.path = pytester.path

    def run(self, *arguments: str) -> pytest.RunResult:
        """pytest with these arguments in the project, in a terminal wide enough for every message.

        pytest cuts the lines of its summary at the width of the terminal that the tests themselves run in.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "300")
            return self.pytester.runpytest_inprocess(*arguments, no_reraise_ctrlc=True)

    def measure(self, *arguments: str) -> pytest.RunResult:
        """Run only the project's own benchmark on its own model."""
        return self.run("test_mine.py", "-k", "test_prefill", "--pio-model=small", *arguments)

    def collected(self, *arguments: str) -> list[str]:
        """Node ids that these arguments select."""
        result = self.run("--collect-only", "-q", *arguments)
        assert result.ret == 0, result.stdout.str() + result.stderr.str()
        return [line for line in result.outlines if "::" in line]

    def refused(self, *arguments: str) -> str:
        """The message of a usage error: status 4, nothing collected."""
        result = self.run(*arguments)
        assert result.ret == pytest.ExitCode.USAGE_ERROR, result.stdout.str() + result.stderr.str()
        assert "collected" not in result.stdout.str()
        return result.stderr.str()

    def records(self, *arguments: str) -> list[dict[str, Any]]:
        """What the benchmarks of a passing run stored under extra_info["pio"]."""
        result = self.measure("--benchmark-json=bench.json", *arguments)
        assert result.ret == 0, result.stdout.str() + result.stderr.str()
        return self.stored()

    def stored(self) -> list[dict[str, Any]]:
        """The records in bench.json."""
        benchmarks = json.loads((self.path / "bench.json").read_text())["benchmarks"]
        return [benchmark["extra_info"]["pio"] for benchmark in benchmarks]
