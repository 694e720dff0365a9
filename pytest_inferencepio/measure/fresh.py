"""What fresh processes run to have their peak memory measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from optimizations.registry import parse, techniques
from optimizations.runner import Runner
from optimizations.session import apply_all
from pytest_inferencepio import workloads
from pytest_inferencepio.catalog.entries import lookup
from pytest_inferencepio.catalog.loading import load
from pytest_inferencepio.measure.transport import register_foreign
from pytest_inferencepio.measure.zygote import resident_bytes

DISCOVERED = tuple(techniques())  # found before the fork: searching takes 5 MB


def without_model(new_tokens: int = 4) -> dict[str, int]:
    """Generate with a model of a few kilobytes: what Python, torch and transformers take by themselves."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.int64), "attention_mask": torch.ones(1, 8)}
    Runner(model, None).generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return {"resident": resident_bytes()}


def generation(
    model: str,
    scale: str,
    optimization: str,
    prompt_tokens: int,
    new_tokens: int,
    device: str = "cpu",
    dtype: str = "bfloat16",
    checkpoint: str | None = None,
    seed: int = 0,
    image_size: int = 0,
    foreign: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """Load one model, optimize it, answer one prompt; resident bytes loaded and at the end.

    `foreign` are what `transport.foreign_techniques` lists of the composition.
    """
    register_foreign(foreign)
    parts = [] if optimization == "none" else parse(optimization)
    loaded = load(
        lookup(model),
        scale,
        device=device,
        dtype=dtype,
        checkpoint=checkpoint,
        optimizations=parts,
        seed=seed,
    )
    apply_all(loaded.runner, parts)
    after_loading = resident_bytes()
    inputs = _inputs(loaded.runner, prompt_tokens, seed, image_size)
    loaded.runner.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    return {"loaded": after_loading, "resident": resident_bytes(), "allocator_peak": _allocator_peak(device)}


def _inputs(runner: Runner, prompt_tokens: int, seed: int, image_size: int) -> dict[str, Any]:
    if image_size:
        return workloads.image_prompt(runner, prompt_tokens, seed, image_size)
    return workloads.prompt(runner, prompt_tokens, seed)


def _allocator_peak(device: str) -> int | None:
    """High-water mark of torch's CUDA allocator in bytes; None on a CPU, whose allocator keeps none."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else None
