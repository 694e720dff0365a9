"""Continuous batching: transformers' own engine, driven by an adaptive token budget."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from optimizations.contract import ROUNDING_BUDGET, AccuracyBudget, Fidelity, Kind, Optimization, Target, Undo
from optimizations.errors import InvalidSpec, OptimizationError
from optimizations.runner import Runner
from optimizations.runtime.token_budget import TokenBudget
from optimizations.serving import Completion, Request, wait_until

SCHEDULER = "pio_adaptive"


class ServingError(OptimizationError):
    """The engine gave a request back with an error."""


class AdaptiveScheduler(FIFOScheduler):
    """First in, first out, decoding first; the prefill that joins a decoding step is bounded by a budget."""

    def __init__(
        self, cache: Any, safety_margin: Any, max_requests_per_batch: int, budget: TokenBudget
    ) -> None:
        super().__init__(cache, safety_margin, max_requests_per_batch)
        self.budget = budget

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        states = self.active_requests.values()
        decoding = sum(state.status == RequestStatus.DECODING for state in states)
        return super().schedule_batch(min(token_budget, self.budget.tokens(decoding)), cache_budget)


class ContinuousServer:
    """Requests enter and leave the running batch at every step (iteration-level scheduling).

    Each `serve` starts transformers' continuous-batching engine, waits until it runs (a server is up before
    its load arrives), submits every request at its arrival and returns one completion per request, greedy.
    """

    def __init__(self, runner: Runner, technique: ContinuousBatching) -> None:
        self.runner = runner
        self.technique = technique

    def serve(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of `requests`; ServingError names a request the engine failed on."""
        if not requests:
            return []
        budget = TokenBudget(self.technique.slowdown, self.technique.max_batch_tokens)
        with self.engine(requests, budget) as manager:
            start = time.perf_counter()
            for request in sorted(requests, key=lambda request: request.arrival):
                wait_until(start + request.arrival)
                manager.add_request(
                    list(request.prompt_ids),
                    request_id=request.request_id,
                    max_new_tokens=request.max_new_tokens,
                    record_timestamps=True,
                )
            outputs = collect(manager, len(requests))
        return [completion(request, outputs[request.request_id], start) for request in requests]

    @contextlib.contextmanager
    def engine(self, requests: Sequence[Request], budget: TokenBudget) -> Iterator[Any]:
        model = self.runner.model
        scheduler = functools.partial(AdaptiveScheduler, budget=budget)
        settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=self.runner.pad_token_id())
        SCHEDULER_MAPPING[SCHEDULER] = scheduler
        try:
            with (
                timed_forwards(model, budget),
                model.continuous_batching_context_manager(
                    generation_config=settings,
                    continuous_batching_config=self.config_for(requests),
                ) as manager,
            ):
                yield manager
        finally:
            del SCHEDULER_MAPPING[SCHEDULER]

    def config_for(self, requests: Sequence[Request]) -> ContinuousBatchingConfig:
        """Enough cache blocks for `max_requests` requests of the longest kind, and a fifth spare."""
        technique = self.technique
        longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
        blocks = math.ceil(longest / technique.page_size) * min(technique.max_requests, len(requests))
        return ContinuousBatchingConfig(
            page_size=technique.page_size,
            num_blocks=math.ceil(1.2 * blocks) + 1,
            max_batch_tokens=technique.max_batch_tokens,
            max_requests_per_batch=technique.max_requests,
            scheduler_type=SCHEDULER,
            allow_block_sharing=False,
            use_cuda_graph=False,
            use_async_batching=False,
        )


@dataclasses.dataclass(frozen=True)
class ContinuousBatching(Optimization):
    """Iteration-level batching through transformers' continuous-batching engine (paged cache, SDPA on a CPU).

    Sequences join and leave at every step and long prompts are prefilled in chunks. The tokens of a step
    follow a closed loop: while requests decode, a step may take `slowdown` times a pure decode step. It
    changes `runner.server`, not `generate()`. A single request gains nothing.

    Source: Orca (Yu et al., OSDI 2022); chunked prefill, Sarathi-Serve (Agrawal et al. 2024, 2403.02310);
    batch control by feedback (2503.05248).
    """

    name: ClassVar[str] = "continuous_batching"
    kind: ClassVar[Kind] = Kind.RUNTIME
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING
    summary: ClassVar[str] = "requests join and leave the batch at every step, under an adaptive token budget"
    source: ClassVar[str] = "Orca (OSDI 2022); Sarathi-Serve, 2403.02310; 2503.05248"
    budget: ClassVar[AccuracyBudget] = ROUNDING_BUDGET
    conflicts: ClassVar[dict[str, str]] = {
        "kv_int8": "the engine keeps its own paged bf16 cache, which replaces the int8 one",
        "torch_compile": "its static cache is not the engine's paged one",
        "prompt_lookup": "the engine decodes one token per request and step",
        "visual_token_pruning": "the engine takes token ids, no images",
    }

    slowdown: float = 3.0
    max_batch_tokens: int = 256
    max_requests: int = 16
    page_size: int = 32

    def __post_init__(self) -> None:
        if not 1.0 < self.slowdown <= 100.0:
            raise InvalidSpec(
                f"continuous_batching: slowdown must be above 1, at most 100, got {self.slowdown}"
            )
        if not TokenBudget.SMALLEST <= self.max_batch_tokens <= 65536:
            raise InvalidSpec(
                f"continuous_batching: max_batch_tokens must be {TokenBudget.SMALLEST} to 65536, "
                f"got {self.max_batch_tokens}"
            )
        if not 1 <= self.max_requests <= 1024:
            raise InvalidSpec(f"continuous_batching: max_requests must be 1 to 1024, got {self.max_requests}")
        if not 4 <= self.page_size <= 1024:
            raise InvalidSpec(
                f"continuous_batching: page_size must be 4 to 1024 tokens, got {self.page_size}"
            )

    @classmethod
    def search_space(cls) -> dict[str, Sequence[float]]:
        return {"slowdown": (1.5, 2.0, 3.0, 5.0), "max_batch_tokens": (128, 256, 512)}

    def refusal(self, target: Target) -> str | None:
        if target.model_type == "glm4_moe_lite":
            return (
                "transformers' paged cache keeps keys and values of one head size, and multi-head latent "
                "attention has keys of qk_nope + qk_rope and values of v_head_dim; use the default server"
            )
        return None

    def apply(self, runner: Runner) -> Undo:
        before = runner.server
        runner.server = ContinuousServer(runner, self)

        def undo() -> None:
            runner.server = before

        return undo


@contextlib.contextmanager
def timed_forwards(model: Any, budget: TokenBudget) -> Iterator[None]:
    """Tell `budget` how many tokens each forward of `model` held and how long it took."""
    started: list[float] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        started.append(time.perf_counter())

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        budget.observe(kwargs["input_ids"].numel(), time.perf_counter() - started.pop())

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def collect(manager: Any, count: int) -> dict[str, Any]:
    """Finished outputs by request id; ServingError when one failed or the engine stopped early."""
    outputs: dict[str, Any] = {}
    while len(outputs) < count:
        output = manager.get_result(timeout=1.0)
        if output is None:
            if not manager.is_running():
                raise ServingError(
                    f"the engine stopped after {len(outputs)} of {count} requests; its log says why"
                )
            continue
        if output.error is not None:
            raise ServingError(f"request {output.request_id} failed in the engine: {output.error}")
        outputs[output.request_id] = output
    return outputs


def completion(request: Request, output: Any, start: float) -> Completion:
    moments = tuple(moment - start for moment in output.timestamps)
    return Completion(request, tuple(output.generated_tokens), moments)
