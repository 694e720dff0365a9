from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pytest_inferencepio.catalog.tiny import reference_directory


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(reference_directory("qwen3_4b_instruct_2507"))
