"""Threads held for a whole decoder call: the same bits from every source, errors, forks and several models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from two_loops import PACKED

from optimizations.decoder.steps import Steps
from optimizations.native.loader import native
from optimizations.runner import Runner
from optimizations.session import optimize

Tiny = Callable[..., Runner]
Prompts = Callable[..., dict[str, Tensor]]
DENSE, LATENT = "qwen3_4b_instruct_2507", "glm_4_7_flash"
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    native().set_thread_source("torch")
    torch.set_num_threads(threads)


def logits(runner: Runner, inputs: dict[str, Tensor]) -> Tensor:
    """(tokens, batch, vocabulary) of a prompt and the steps after it."""
    return torch.stack(runner.generate(**inputs, **OPTIONS).logits)


def test_source_and_number_of_threads_leave_the_bits_alone(family: str, tiny: Tiny, prompts: Prompts) -> None:
    inputs = prompts(2, 150, padding=3)
    with optimize(tiny(family), *PACKED):
        torch.set_num_threads(1)
        wanted = logits(tiny(family), inputs)
        for source in ("torch", "own"):
            native().set_thread_source(source)
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                assert torch.equal(logits(tiny(family), inputs), wanted), (source, threads)


@pytest.mark.parametrize("weights", [(), ("weight_int4",)], ids=["dense", "int4"])
def test_an_error_inside_a_call_comes_out_and_lets_the_threads_go(
    weights: tuple[str, ...], tiny: Tiny, prompts: Prompts
) -> None:
    """Tokens are looked up inside: the call has its threads by then."""
    runner, inputs = tiny(DENSE), prompts(1, 150)
    torch.set_num_threads(3)
    with optimize(runner, *weights, "native_decoder"), torch.inference_mode():
        wanted = logits(runner, inputs)
        cache = runner.generate(**inputs, **OPTIONS).past_key_values
        steps = Steps(runner.model, runner.model.get_decoder().forward, {"past_key_values": cache})
        for _ in range(20):
            with pytest.raises(ValueError, match=r"-7 is outside 0 \.\. "):
                steps.logits([-7])
        assert torch.equal(logits(runner, inputs), wanted)


def test_models_of_several_threads_run_at_once(tiny: Tiny, prompts: Prompts) -> None:
    """One of them has the threads; the others compute alone until it ends."""
    runners, inputs = [tiny(DENSE), tiny(LATENT)], prompts(1, 150)
    torch.set_num_threads(2)
    with optimize(runners[0], *PACKED), optimize(runners[1], *PACKED):
        wanted = [logits(runner, inputs) for runner in runners]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda runner: logits(runner, inputs), runners * 8))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted * 8, strict=True))


def test_child_of_a_fork_decodes_with_threads_of_its_own(tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(DENSE), prompts(1, 150)
    torch.set_num_threads(2)
    with optimize(runner, *PACKED), torch.inference_mode():
        here, there = (
            Steps(runner.model, runner.model.get_decoder().forward, {"past_key_values": cache})
            for cache in (runner.generate(**inputs, **OPTIONS).past_key_values for _ in range(2))
        )
        wanted, source = here.logits([9]), native().thread_source()
        child = os.fork()
        if child == 0:
            same = torch.equal(there.logits([9]), wanted) and native().thread_source() == "own"
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (source, native().thread_source()) == ("torch", "torch")
        assert torch.equal(there.logits([9]), wanted)
