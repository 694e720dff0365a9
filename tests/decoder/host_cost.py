"""What a token of generate() costs beside the kernels; a demonstration, nothing pytest collects.

    python tests/decoder/host_cost.py [--model=qwen3_4b_instruct_2507] [--layers=2] [--tokens=200] [--rounds=9]

Decoding with native_decoder over int4 weights, few layers of published width and the whole vocabulary: the time between
tokens, less what passes inside the native call that leads from one token to the logits of the next. What is left is the
loop of generate() and the face of the kernels. It times things: leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from statistics import median
from typing import Any

import torch

from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.session import apply_all
from pytest_inferencepio.catalog.configs import full_config
from pytest_inferencepio.catalog.loading import converted_while_loading, random_model
from pytest_inferencepio.measure.timing import quiet_rounds
from pytest_inferencepio.models import catalog_models
from pytest_inferencepio.stats import median_estimate

SEED = 0


class Clocked:
    """Stands for the native decoder and writes down the seconds of every call."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seconds = inner, []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments)
            self.seconds.append(time.perf_counter() - start)
            return result

        return timed


def build(name: str, layers: int) -> Runner:
    (model,) = [one for one in catalog_models() if one.answers_to(name)]
    config = full_config(model.name)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    for kinds in ("layer_types", "mlp_layer_types"):
        if getattr(text, kinds, None):
            setattr(text, kinds, getattr(text, kinds)[:layers])
    parts = parse("weight_int4+native_decoder")
    built = random_model(model.entry, config, converting=converted_while_loading(parts), seed=SEED)
    built.generation_config.eos_token_id = None  # every generation runs to its length
    built.generation_config.pad_token_id = 0
    runner = Runner(built, None)
    apply_all(runner, parts)
    return runner


def clocked(runner: Runner) -> Clocked:
    """The clock of the decoder's native calls, output layer included, from now on."""
    forward = runner.model.get_decoder().__dict__["forward"]
    clock = Clocked(forward.plan.decoder)
    forward.plan = dataclasses.replace(forward.plan, decoder=clock)
    return clock


def outside(runner: Runner, clock: Clocked, tokens: int) -> float:
    """Seconds per token, the median of one generation, less the kernels'."""
    prompt = torch.ones(1, 128, dtype=torch.int64)
    clock.seconds.clear()
    _, moments = runner.timed_generate(tokens, input_ids=prompt, attention_mask=torch.ones_like(prompt))
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    steps = clock.seconds[1:]  # the first call was the prompt's
    return median(gap - step for gap, step in zip(gaps, steps, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3_4b_instruct_2507")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    runner = build(options.model, options.layers)
    clock = clocked(runner)
    with quiet_rounds():
        found = [outside(runner, clock, options.tokens) for _ in range(options.rounds + 1)]
    host = median_estimate(found[1:])
    print(
        f"{options.model}, {options.layers} layers, {torch.get_num_threads()} threads, seed {SEED}: "
        f"{1e6 * host.value:.0f} us [{1e6 * host.low:.0f}, {1e6 * host.high:.0f}] per token outside the kernels"
    )


if __name__ == "__main__":
    main()
