"""Decoding behind long contexts at published dimensions, rows interleaved; a demonstration, nothing pytest collects.

    python tests/decoder/long_context.py --model=qwen3_4b_instruct_2507 --context=128,16384 \\
        --rows=weight_int4+native_decoder,weight_int4+native_decoder+kv_int8 [--layers=4] [--decoder-only] [--steps=8] [--rounds=9]

Weights are random, and so is the history: it is appended to the cache instead of being computed, since the time of a
step does not depend on the values and computing 16,384 tokens would take minutes per row. Every row runs one token at
a time, in turns; ratios are to the first row. It times things: leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from statistics import median, quantiles
from typing import Any

import torch
from tqdm import tqdm

from optimizations.decoder.forward import NativeForward
from optimizations.decoder.steps import Steps
from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.session import apply_all
from pytest_inferencepio.catalog.configs import full_config
from pytest_inferencepio.catalog.entries import ModelEntry
from pytest_inferencepio.catalog.loading import converted_while_loading, random_model
from pytest_inferencepio.measure import memory, rates
from pytest_inferencepio.measure.memory import bytes_read_per_step, cache_tensors
from pytest_inferencepio.measure.timing import quiet_rounds
from pytest_inferencepio.models import catalog_models
from pytest_inferencepio.stats import log_ratios, ratio_estimate

PIECE = 1024  # tokens appended at once
SEED = 0
READ = 256 << 20  # bytes of memory that the bandwidth is taken of


class Row:
    """One composition on a model of its own, and a cache filled with random history."""

    def __init__(self, spec: str, entry: ModelEntry, config: Any, *, decoder_only: bool) -> None:
        self.spec = spec
        parts = [] if spec == "none" else parse(spec)
        model = random_model(
            entry, copy.deepcopy(config), converting=converted_while_loading(parts), seed=SEED
        )
        self.runner = Runner(model, None)
        apply_all(self.runner, parts)
        self.run = model.get_decoder() if decoder_only else model
        self.weights = bytes_read_per_step(self.runner)  # bytes per step
        if decoder_only:
            self.weights -= memory.weight_memory(model.get_output_embeddings())
        self.token = torch.ones(1, 1, dtype=torch.int64)
        self.cache: Any = None
        # The native decoder's, as generate() takes them: the output layer is part of it.
        self.steps: Any = None
        self.per_token = 0  # bytes of history per token

    @torch.inference_mode()
    def fill(self, context: int) -> None:
        """A fresh cache with `context` tokens."""
        self.cache = None
        gc.collect()
        self.cache = self.run(input_ids=self.token.expand(1, 16), use_cache=True).past_key_values
        draw = torch.Generator().manual_seed(SEED)
        for number, layer in enumerate(
            tqdm(self.cache.layers, desc=f"{self.spec} {context}", leave=False, disable=None)
        ):
            heads, *widths = _shape(layer)
            while (have := layer.get_seq_length()) < context:
                count = min(PIECE, context - have)
                states = [
                    torch.randn(1, heads, count, width, generator=draw, dtype=torch.bfloat16)
                    for width in widths
                ]
                self.cache.update(*states, number)
        self.per_token = _cache_bytes(self.cache) // context
        forward = self.runner.model.get_decoder().__dict__.get("forward")
        if self.run is self.runner.model and isinstance(forward, NativeForward):
            inputs = {"past_key_values": self.cache, "position_ids": torch.tensor([[context]])}
            self.steps = Steps(self.runner.model, forward, inputs)

    def read(self, context: int) -> int:
        """Bytes that one more token reads."""
        return self.weights + self.per_token * context

    @torch.inference_mode()
    def step(self) -> float:
        """Seconds of one more token: its logits, or with `decoder_only` its hidden state."""
        start = time.perf_counter()
        if self.steps is not None:
            self.steps.logits([1])
        else:
            self.run(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        return time.perf_counter() - start


def _shape(layer: Any) -> tuple[int, int, int]:
    """Heads and the widths of both tensors of a cache layer, int8 or dense."""
    if hasattr(layer, "stores"):
        first, second = layer.stores
        return first.scales.shape[1], first.dim, second.dim
    return layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]


def _cache_bytes(cache: Any) -> int:
    """Of what is filled; room ahead is not read."""
    used = 0
    for layer in cache.layers:
        capacity = getattr(layer, "capacity", layer.get_seq_length())
        held = sum(t.nbytes for t in cache_tensors(layer))
        used += held * layer.get_seq_length() // max(1, capacity)
    return used


def measure(rows: list[Row], context: int, rounds: int, steps: int) -> None:
    """Print time per token, bytes and bandwidth of every row behind `context` tokens, and its ratio to the first.

    Shared memory changes its speed by half for seconds, so it is read before and after every sample, and the share of
    the bandwidth is that of the sample's own neighbours.
    """
    for row in rows:
        row.fill(context)
        row.step()
    times: dict[str, list[float]] = {row.spec: [] for row in rows}
    shares: dict[str, list[float]] = {row.spec: [] for row in rows}
    with quiet_rounds():
        before = _bandwidth()
        for number in tqdm(range(rounds), desc=f"context {context}", leave=False, disable=None):
            for row in rows if number % 2 else reversed(rows):
                times[row.spec].append(median(row.step() for _ in range(steps)))
                after = _bandwidth()
                possible = row.read(context) / ((before + after) / 2)
                shares[row.spec].append(100 * possible / times[row.spec][-1])
                before = after
    for row in rows:
        seconds, (low, middle, high) = median(times[row.spec]), quantiles(shares[row.spec], n=4)
        ratio = ratio_estimate(log_ratios(times[row.spec], times[rows[0].spec]))
        print(
            f"context {context:6}  {row.spec:40} {1e3 * seconds:8.2f} ms/token  {row.read(context) / 1e9:6.3f} GB  "
            f"{row.read(context) / seconds / 1e9:5.1f} GB/s = {middle:3.0f} % [{low:.0f}, {high:.0f}] of the bandwidth  "
            f"{ratio.value:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}]",
            flush=True,
        )


def _bandwidth() -> float:
    """Bytes per second that this machine reads now of more than any cache holds."""
    return rates.read_bandwidth("cpu", (READ,))[READ].value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="compositions; `none` is stock transformers in bf16")
    parser.add_argument("--context", default="128,4096", help="tokens of history")
    parser.add_argument("--layers", type=int, help="decoder layers; default: all")
    parser.add_argument("--decoder-only", action="store_true", help="without the output vocabulary")
    parser.add_argument("--steps", type=int, default=8, help="tokens per row and round; their median counts")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    (model,) = [one for one in catalog_models() if one.answers_to(options.model)]
    config = full_config(model.name)
    if options.layers:
        text = config.get_text_config(decoder=True)
        text.num_hidden_layers = options.layers
        for name in ("layer_types", "mlp_layer_types"):
            if getattr(text, name, None):
                setattr(text, name, getattr(text, name)[: options.layers])
    print(f"{model.name}, seed {SEED}, {torch.get_num_threads()} threads, random weights and history")
    rows = [
        Row(spec, model.entry, config, decoder_only=options.decoder_only) for spec in options.rows.split(",")
    ]
    for context in map(int, options.context.split(",")):
        measure(rows, context, options.rounds, options.steps)


if __name__ == "__main__":
    main()
