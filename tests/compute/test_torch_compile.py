"""Compilation is slow, so one compiled model per family serves all tests of that family."""

from __future__ import annotations

import copy
import dataclasses
import sysconfig
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3VLForConditionalGeneration

from optimizations.compute import torch_compile as module
from optimizations.compute.decoder_layers import decoder_layers
from optimizations.compute.torch_compile import TorchCompile, compile_report, recompilations
from optimizations.contract import Target
from optimizations.errors import IncompatibleOptimizations, InvalidSpec, Refusal
from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.session import apply_all
from pytest_inferencepio.catalog.tiny import tiny_config

# Structures of decoder layers: GLM's first layer is dense. Each compiles in two forms, one row and a batch.
STRUCTURES = {"qwen3_4b_instruct_2507": 1, "qwen3_coder_30b": 1, "glm_4_7_flash": 2, "qwen3_vl_2b": 1}
FORMS = 2


@dataclasses.dataclass
class Compiled:
    runner: Runner
    undo: Callable[[], None]
    stock: Any  # the same weights, never touched
    attributes: set[str]  # of the model before anything was applied
    name: str


def tiny_model(name: str) -> Any:
    torch.manual_seed(0)
    config = tiny_config(name)
    kind = Qwen3VLForConditionalGeneration if name == "qwen3_vl_2b" else AutoModelForCausalLM
    model = kind(config) if name == "qwen3_vl_2b" else kind.from_config(config)
    model.generation_config.eos_token_id = None
    return model.float().eval()


def tiny_runner(name: str) -> Runner:
    return Runner(tiny_model(name), SimpleNamespace(pad_token_id=0, eos_token_id=0))


@pytest.fixture(scope="module", params=STRUCTURES)
def compiled(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    runner = tiny_runner(request.param)
    stock = copy.deepcopy(runner.model)
    if request.param == "qwen3_coder_30b":
        for model in (runner.model, stock):
            model.set_experts_implementation("eager")
    attributes = set(runner.model.__dict__)
    undo = apply_all(runner, [TorchCompile()])
    yield Compiled(runner, undo, stock, attributes, request.param)
    if runner.applied:
        undo()


def prompts(rows: int, length: int, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(8, 1792, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def test_each_structure_compiles_once_per_form(compiled: Compiled) -> None:
    report = compile_report(compiled.runner)
    assert report.warmed_up == FORMS * STRUCTURES[compiled.name]
    assert report.seconds > 0


@pytest.mark.parametrize(("rows", "length", "padding"), [(1, 9, 0), (1, 40, 0), (3, 12, 0), (4, 12, 5)])
def test_greedy_tokens_and_logits_match_without_recompilation(
    compiled: Compiled, rows: int, length: int, padding: int
) -> None:
    settings: dict[str, Any] = {
        **prompts(rows, length, padding),
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with torch.inference_mode():
        expected = compiled.stock.generate(**settings)
    found = compiled.runner.generate(**settings)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)
    assert recompilations(compiled.runner) == 0


def test_sampling_and_beams_match_without_recompilation(compiled: Compiled) -> None:
    for settings in ({"do_sample": True, "num_return_sequences": 2}, {"do_sample": False, "num_beams": 3}):
        arguments = {**prompts(2, 7, 2), "max_new_tokens": 8, **settings}
        torch.manual_seed(3)
        with torch.inference_mode():
            expected = compiled.stock.generate(**arguments)
        torch.manual_seed(3)
        assert torch.equal(compiled.runner.generate(**arguments), expected)
    assert recompilations(compiled.runner) == 0


def test_decode_steps_really_run_compiled(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    for layer in decoder_layers(compiled.runner.model):
        attention = layer.forward.__self__.original.__self__.self_attn
        assert attention is layer.self_attn
        original = layer.forward.__self__.original

        def counted(hidden: torch.Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            lengths.append(hidden.shape[1])
            return original(hidden, *args, **kwargs)

        monkeypatch.setattr(layer.forward.__self__, "_call", lambda *args: pytest.fail("compiled"))
        monkeypatch.setattr(layer.forward.__self__, "original", counted)
    compiled.runner.generate(**prompts(1, 6), max_new_tokens=1, do_sample=False)
    assert lengths == [6] * len(decoder_layers(compiled.runner.model))
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        compiled.runner.generate(**prompts(1, 6), max_new_tokens=2, do_sample=False)


def test_a_cache_of_the_callers_own_takes_the_uncompiled_path(compiled: Compiled) -> None:
    inputs = prompts(1, 9)
    with torch.inference_mode():
        expected = compiled.stock.generate(**inputs, max_new_tokens=5, do_sample=False)
    for own in ({"past_key_values": DynamicCache()}, {"cache_implementation": "static"}):
        found = compiled.runner.generate(**inputs, max_new_tokens=5, do_sample=False, **own)
        assert torch.equal(found, expected)
    found = compiled.runner.generate(**inputs, max_new_tokens=5, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(found, expected)
    assert recompilations(compiled.runner) == 0


def test_a_returned_cache_can_be_continued_past_its_size(compiled: Compiled) -> None:
    inputs = prompts(1, 9)
    first = compiled.runner.generate(
        **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    rest = compiled.runner.generate(
        input_ids=first.sequences, past_key_values=first.past_key_values, max_new_tokens=20, do_sample=False
    )
    with torch.inference_mode():
        assert torch.equal(rest, compiled.stock.generate(**inputs, max_new_tokens=24, do_sample=False))
    assert recompilations(compiled.runner) == 0


def test_gradients_are_those_of_the_stock_model(compiled: Compiled) -> None:
    ids = prompts(1, 8)["input_ids"]
    gradients = []
    for model in (compiled.runner.model, compiled.stock):
        model(ids).logits.sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_undo_is_exact_and_applying_again_compiles_nothing(compiled: Compiled) -> None:
    runner, stock = compiled.runner, compiled.stock
    compiled.undo()
    assert not [each for each in runner.model.modules() if "forward" in each.__dict__]
    by_generate = {"_previous_max_cache_length"}  # transformers notes it when a caller names a static cache
    assert set(runner.model.__dict__) - by_generate == compiled.attributes - by_generate
    assert runner.model.config.to_dict() == stock.config.to_dict()
    assert runner.model.get_experts_implementation() == stock.get_experts_implementation()
    assert runner.model.generation_config.to_dict() == stock.generation_config.to_dict()
    numbers = [layer.self_attn.layer_idx for layer in decoder_layers(runner.model)]
    assert numbers == list(range(len(numbers)))
    with torch.inference_mode():
        ids = prompts(2, 9, 3)
        assert torch.equal(runner.forward(**ids).logits, stock(**ids).logits)
    with pytest.raises(LookupError, match="torch_compile is not applied to this model"):
        recompilations(runner)
    undo = apply_all(runner, [TorchCompile()])
    assert compile_report(runner).compilations == 0
    undo()


def test_without_warm_up_the_first_call_compiles_and_a_failed_warm_up_undoes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = tiny_runner("qwen3_4b_instruct_2507")
    before = set(runner.model.__dict__)
    undo = TorchCompile(warm_up=False).apply(runner)
    assert compile_report(runner).compilations == 0
    undo()

    def failing(runner: Runner) -> None:
        raise MemoryError("compiling")

    monkeypatch.setattr(module, "warm_up", failing)
    with pytest.raises(MemoryError, match="compiling"):
        TorchCompile().apply(runner)
    assert set(runner.model.__dict__) == before
    assert not [each for each in runner.model.modules() if "forward" in each.__dict__]


def test_no_compiler_is_a_refusal_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = tiny_runner("qwen3_4b_instruct_2507")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        Refusal, match=r"torch_compile refuses qwen3: .*needs a C\+\+ compiler and found none .*g"
    ):
        apply_all(runner, [TorchCompile()])
    assert not runner.applied


def test_missing_python_headers_are_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    reason = TorchCompile().refusal(Target(tiny_config("qwen3_4b_instruct_2507")))
    assert reason is not None and "Python.h does not exist; install python3-dev" in reason


def test_gpus_need_triton_and_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("qwen3_4b_instruct_2507")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    reason = TorchCompile().refusal(Target(config, device="cuda"))
    assert reason is not None and "needs Triton" in reason
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: SimpleNamespace())
    assert TorchCompile().refusal(Target(config, device="cuda")) is None
    assert TorchCompile().refusal(Target(config, device="mps")) == "it is built for cpu and cuda, not for mps"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torch_compile(mode=fast)", "mode must be one of default, max-autotune-no-cudagraphs, got 'fast'"),
        ("torch_compile(warm_up=2)", "warm_up must be true or false, got 2"),
    ],
)
def test_bad_settings_are_named(spec: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        parse(spec)


def test_techniques_that_never_decode_one_token_conflict() -> None:
    with pytest.raises(
        IncompatibleOptimizations, match="torch_compile and prompt_lookup .*several tokens a step"
    ):
        parse("prompt_lookup+torch_compile")
