"""continuous_batching serves every request with the model's own tokens, through transformers' engine."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from optimizations.contract import Target
from optimizations.errors import IncompatibleOptimizations, InvalidSpec, Refusal
from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.runtime.continuous_batching import SCHEDULER, ServingError, collect
from optimizations.serving import Request
from optimizations.session import apply_all, optimize
from pytest_inferencepio.catalog.tiny import tiny_config

SERVABLE = ["qwen3_4b_instruct_2507", "qwen3_coder_30b", "qwen3_vl_2b"]


def load(count: int = 6) -> list[Request]:
    source = random.Random(4)
    return [
        Request(
            request_id=f"r{i}",
            prompt_ids=tuple(source.randrange(2, 500) for _ in range(source.randrange(4, 70))),
            max_new_tokens=source.randrange(2, 12),
            arrival=0.01 * i,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module", params=SERVABLE)
def servable(request: pytest.FixtureRequest, make_runner: Callable[..., Runner]) -> Runner:
    return make_runner(request.param)


def test_every_request_gets_the_models_own_tokens(servable: Runner) -> None:
    requests = load()
    alone = [servable.timed_batch([each.prompt_ids], each.max_new_tokens)[0][0] for each in requests]
    with optimize(servable, "continuous_batching(max_batch_tokens=64)"):
        completions = servable.server.serve(requests)
    assert [completion.request for completion in completions] == requests
    assert [list(completion.token_ids) for completion in completions] == alone


def test_moments_follow_the_arrival_and_each_other(servable: Runner) -> None:
    with optimize(servable, "continuous_batching"):
        for completion in servable.server.serve(load(4)):
            assert len(completion.token_times) == completion.request.max_new_tokens
            assert completion.time_to_first_token > 0
            assert list(completion.token_times) == sorted(completion.token_times)


def test_a_server_serves_again_and_nothing_is_nothing(servable: Runner) -> None:
    with optimize(servable, "continuous_batching"):
        first = [completion.token_ids for completion in servable.server.serve(load(2))]
        second = [completion.token_ids for completion in servable.server.serve(load(2))]
        assert servable.server.serve([]) == []
    assert first == second


def test_undo_is_exact(servable: Runner) -> None:
    server, attributes = servable.server, set(servable.model.__dict__)
    attention = servable.text_config._attn_implementation
    undo = apply_all(servable, parse("continuous_batching"))
    servable.server.serve(load(2))
    undo()
    assert servable.server is server
    assert set(servable.model.__dict__) == attributes
    assert servable.text_config._attn_implementation == attention
    assert not servable.model._forward_hooks
    assert not servable.model._forward_pre_hooks
    assert SCHEDULER not in SCHEDULER_MAPPING


def test_latent_attention_is_refused_in_words(make_runner: Callable[..., Runner]) -> None:
    [technique] = parse("continuous_batching")
    reason = technique.refusal(Target(tiny_config("glm_4_7_flash")))
    assert reason is not None
    assert "keys and values of one head size" in reason
    with pytest.raises(Refusal, match="continuous_batching refuses glm4_moe_lite"):
        apply_all(make_runner("glm_4_7_flash"), [technique])


def test_a_failed_request_is_named() -> None:
    class Failed:
        request_id, error = "r7", "no memory"

    class Manager:
        def get_result(self, timeout: float) -> Failed:
            return Failed()

    with pytest.raises(ServingError, match="request r7 failed in the engine: no memory"):
        collect(Manager(), 1)


def test_a_dead_engine_is_reported() -> None:
    class Manager:
        def get_result(self, timeout: float) -> None:
            return None

        def is_running(self) -> bool:
            return False

    with pytest.raises(ServingError, match="the engine stopped after 0 of 3 requests"):
        collect(Manager(), 3)


@pytest.mark.parametrize("other", ["kv_int8", "torch_compile", "prompt_lookup"])
def test_pairs_that_cannot_work_are_named(other: str) -> None:
    with pytest.raises(IncompatibleOptimizations, match="continuous_batching"):
        parse(f"continuous_batching+{other}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("continuous_batching(slowdown=1.0)", "slowdown must be above 1"),
        ("continuous_batching(max_batch_tokens=2)", "max_batch_tokens must be 16 to 65536, got 2"),
        ("continuous_batching(max_requests=0)", "max_requests must be 1 to 1024, got 0"),
        ("continuous_batching(page_size=2)", "page_size must be 4 to 1024 tokens, got 2"),
    ],
)
def test_settings_are_checked(spec: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        parse(spec)
