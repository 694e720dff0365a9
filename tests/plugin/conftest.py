"""A project of its own for every test, measured by an inner pytest in this process.

In this process because importing torch takes seconds; everything the inner run imports is imported here before it,
since pytester forgets modules that appear inside and torch's registrations do not survive a second import.
"""

from __future__ import annotations

import gc

import pytest
import torch
from inner_pytest import BENCHMARK, CONFTEST, Project
from transformers import Qwen3Config, Qwen3ForCausalLM

import pytest_inferencepio.active
import pytest_inferencepio.catalog.configs
import pytest_inferencepio.catalog.loading
import pytest_inferencepio.listing
import pytest_inferencepio.measure.processes
import pytest_inferencepio.measure.rates
import pytest_inferencepio.suite.shared
import pytest_inferencepio.workloads  # noqa: F401  the last name stands for all of them
from optimizations.registry import techniques
from pytest_inferencepio import machine


@pytest.fixture(scope="session")
def imported() -> None:
    """Import what an inner run would import, and measure this machine once."""
    config = Qwen3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config)(input_ids=torch.ones(1, 2, dtype=torch.int64))
    techniques()
    machine.fingerprint()
    gc.collect()
    gc.freeze()  # every inner pytest ends with five garbage collections


@pytest.fixture
def project(pytester: pytest.Pytester, imported: None) -> Project:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_mine=BENCHMARK)
    return Project(pytester)
