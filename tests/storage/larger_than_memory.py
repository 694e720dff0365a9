"""A fresh process under an address-space limit: run as a script, it prints one JSON object.

Arguments: directory of the stream file, "streamed" or "resident". A Qwen3 of 280 MB is made tensor by tensor with
seeded weights; the process may take 60 % of that on top of what the imports took.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from optimizations.runner import Runner
from optimizations.storage.layer_streaming import LayerStreaming, streaming_report
from pytest_inferencepio.catalog.random_weights import materialize, original_parameters

SHARE = 0.6


def meta_model() -> Any:
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        dtype="bfloat16",
        eos_token_id=None,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main(directory: str, how: str) -> None:
    torch.set_num_threads(1)
    model = meta_model()
    size = sum(parameter.nbytes for parameter in model.parameters())
    before = status("VmHWM")
    limit = status("VmSize") + int(SHARE * size)
    if how != "unlimited":
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    technique = LayerStreaming(directory=directory, buffers=2)
    originals = original_parameters(model)
    if how == "streamed":
        technique.convert_meta(model)
    materialize(model, originals, "cpu", seed=0)
    runner = Runner(model, SimpleNamespace(pad_token_id=0, eos_token_id=0))
    if how == "streamed":
        technique.apply(runner)
    ids = torch.arange(1, 9)[None]
    tokens = runner.generate(input_ids=ids, max_new_tokens=3, do_sample=False)[0].tolist()
    logits = runner.forward(input_ids=ids).logits.double().sum().item()
    found = {"size": size, "grown": status("VmHWM") - before, "tokens": tokens, "logits": logits}
    if how == "streamed":
        report = streaming_report(runner)
        found |= {"bytes_per_pass": report.bytes_per_pass, "direct": report.direct, "passes": report.passes}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
