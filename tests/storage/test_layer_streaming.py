from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stream_processes import open_files
from transformers import AutoModelForCausalLM, Qwen3VLForConditionalGeneration

from optimizations.contract import Target
from optimizations.errors import InvalidSpec, Refusal
from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.session import apply_all, optimize
from optimizations.storage.layer_streaming import LayerStreaming, streaming_report
from optimizations.storage.unnamed_file import StreamError
from pytest_inferencepio.catalog.tiny import TINY, tiny_config


def tiny_runner(name: str) -> Runner:
    torch.manual_seed(0)
    config = tiny_config(name)
    if name == "qwen3_vl_2b":
        model: Any = Qwen3VLForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    return Runner(model.bfloat16().eval(), SimpleNamespace(pad_token_id=0, eos_token_id=0))


@pytest.fixture(params=TINY)
def runner(request: pytest.FixtureRequest) -> Runner:
    return tiny_runner(request.param)


@pytest.fixture
def dense() -> Runner:
    return tiny_runner("qwen3_4b_instruct_2507")


@pytest.fixture
def streaming(dense: Runner, tmp_path: Path) -> Iterator[Runner]:
    with optimize(dense, LayerStreaming(directory=str(tmp_path))):
        yield dense


def prompts(rows: int = 1, length: int = 9, padding: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(8, 1792, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def outputs(runner: Runner) -> list[torch.Tensor]:
    """Logits, and tokens greedy, batched with padding on the left, and sampled."""
    torch.manual_seed(5)
    results = [runner.forward(**prompts(3, 8, 3)).logits]
    if hasattr(runner.model.config, "vision_config"):
        ids = torch.tensor([[9, 3, *[5] * 4, 4, 10]])
        images = {
            "pixel_values": torch.randn(16, 384).bfloat16(),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (ids == 5).int(),
        }
        results.append(runner.forward(input_ids=ids, **images).logits)
    for arguments in (
        {**prompts(), "do_sample": False},
        {**prompts(3, 8, 3), "do_sample": False},
        {**prompts(2, 5, 1), "do_sample": True},
    ):
        results.append(runner.generate(**arguments, max_new_tokens=6))
    return results


def fingerprint(model: Any) -> dict[str, tuple[int, torch.Tensor, tuple[int, ...], bool]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: (id(tensor), tensor.detach().clone(), tensor.stride(), tensor.requires_grad)
        for name, tensor in tensors
    }


@pytest.mark.parametrize("settings", [{}, {"buffers": 2, "pin_layers": 1}, {"buffers": 8}])
def test_outputs_are_identical_and_undo_is_exact(
    runner: Runner, settings: dict[str, int], tmp_path: Path
) -> None:
    expected, before = outputs(runner), fingerprint(runner.model)
    attributes = {id(each): set(each.__dict__) for each in runner.model.modules()}
    with optimize(runner, LayerStreaming(directory=str(tmp_path), **settings)):
        for found, wanted in zip(outputs(runner), expected, strict=True):
            assert torch.equal(found, wanted)
        assert open_files(tmp_path)
        assert not list(tmp_path.iterdir())
    after = fingerprint(runner.model)
    assert before.keys() == after.keys()
    for name, (identity, value, stride, gradient) in before.items():
        assert (after[name][0], after[name][2], after[name][3]) == (identity, stride, gradient), name
        assert torch.equal(after[name][1], value), name
    assert {id(each): set(each.__dict__) for each in runner.model.modules()} == attributes
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in runner.model.modules())
    assert not open_files(tmp_path)
    assert "layer-reader" not in {thread.name for thread in threading.enumerate()}
    for found, wanted in zip(outputs(runner), expected, strict=True):
        assert torch.equal(found, wanted)


def test_layers_hold_no_memory_between_forwards(streaming: Runner) -> None:
    streaming.forward(**prompts())
    for layer in streaming.model.model.layers:
        for parameter in layer.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.element_size()
            assert torch.isnan(parameter).all()
    assert not torch.isnan(streaming.model.model.norm.weight).any()


def test_the_report_counts_what_was_read(streaming: Runner, tmp_path: Path) -> None:
    layers = streaming.model.model.layers
    weights = sum(each.nbytes for layer in layers for each in layer.parameters())
    streaming.generate(**prompts(), max_new_tokens=5, do_sample=False)
    report = streaming_report(streaming)
    assert report.passes == 5
    assert weights <= report.bytes_per_pass <= weights + 4 * (4096 + 64 * 20)
    in_memory = report.buffers * report.bytes_per_pass / 4
    assert 5 * report.bytes_per_pass <= report.bytes_read <= 5 * report.bytes_per_pass + in_memory
    assert report.bandwidth == report.bytes_read / report.read_seconds > 0
    assert report.stall_seconds > 0
    assert (report.streamed_layers, report.pinned_layers, report.buffers) == (4, 0, 3)
    assert report.file_bytes > weights
    assert report.directory == str(tmp_path)


def test_pinned_layers_stay_in_memory(dense: Runner, tmp_path: Path) -> None:
    with optimize(dense, LayerStreaming(directory=str(tmp_path), pin_layers=3)):
        dense.forward(**prompts())
        report = streaming_report(dense)
        assert (report.streamed_layers, report.pinned_layers) == (1, 3)
        pinned = [torch.isnan(layer.mlp.up_proj.weight).any() for layer in dense.model.model.layers]
        assert pinned == [False, False, False, True]


def test_a_forward_that_fails_half_way_leaves_streaming_intact(streaming: Runner) -> None:
    expected = streaming.forward(**prompts()).logits
    layer = streaming.model.model.layers[2]

    def failing(*arguments: Any, **named: Any) -> None:
        raise KeyError("half-way")

    for raised in (failing, interrupting):
        layer.mlp.forward = raised
        with pytest.raises((KeyError, KeyboardInterrupt)):
            streaming.forward(**prompts())
        del layer.mlp.forward
        assert torch.equal(streaming.forward(**prompts()).logits, expected)


def interrupting(*arguments: Any, **named: Any) -> None:
    raise KeyboardInterrupt


def test_gradients_are_an_error_in_words(streaming: Runner) -> None:
    with pytest.raises(RuntimeError, match="there are no gradients: run under torch.no_grad"):
        streaming.model(**prompts())
    with torch.no_grad():
        streaming.model(**prompts())


def test_a_damaged_file_is_an_error_on_use_and_on_undo(dense: Runner, tmp_path: Path) -> None:
    undo = apply_all(dense, [LayerStreaming(directory=str(tmp_path), buffers=2)])
    with dense.model.streamed_layers.file.path.open("r+b") as file:
        file.seek(-5000, 2)
        file.write(b"\x00" * 16)
    with pytest.raises(StreamError, match="layer 3's .* is damaged"):
        dense.forward(**prompts())
    with pytest.raises(StreamError, match="layer 3's .* is damaged .*; load the model again"):
        undo()
    assert not open_files(tmp_path)


def test_no_room_is_a_refusal_that_changes_nothing(
    dense: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = outputs(dense)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(Refusal, match="layer_streaming needs .* and 0.0 MiB are free"):
        apply_all(dense, [LayerStreaming(directory=str(tmp_path))])
    for found, wanted in zip(outputs(dense), before, strict=True):
        assert torch.equal(found, wanted)


def test_a_model_that_is_dropped_takes_its_file_along(tmp_path: Path) -> None:
    runner = tiny_runner("qwen3_4b_instruct_2507")
    apply_all(runner, [LayerStreaming(directory=str(tmp_path))])
    runner.forward(**prompts())
    assert open_files(tmp_path)
    del runner
    gc.collect()
    assert not open_files(tmp_path)


@pytest.mark.parametrize("name", ["weight_int4", "weight_int8"])
def test_packed_weights_stream_too(dense: Runner, name: str, tmp_path: Path) -> None:
    parts = parse(name)
    with optimize(dense, *parts):
        expected = outputs(dense)
        plain = sum(each.nbytes for layer in dense.model.model.layers for each in layer.buffers())
        with optimize(dense, LayerStreaming(directory=str(tmp_path))):
            for found, wanted in zip(outputs(dense), expected, strict=True):
                assert torch.equal(found, wanted)
            assert streaming_report(dense).bytes_per_pass < plain + 4 * 4096 * 4
        for found, wanted in zip(outputs(dense), expected, strict=True):
            assert torch.equal(found, wanted)


def test_it_composes_with_compiled_layers(dense: Runner, tmp_path: Path) -> None:
    with optimize(dense, "torch_compile"):
        expected = outputs(dense)
        with optimize(dense, LayerStreaming(directory=str(tmp_path))):
            for found, wanted in zip(outputs(dense), expected, strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layer_streaming(buffers=1)", "buffers must be a whole number of at least 2 .*, got 1"),
        ("layer_streaming(pin_layers=-1)", "pin_layers must be a whole number of at least 0 .*, got -1"),
        ("layer_streaming(buffers=true)", "buffers must be a whole number of at least 2 .*, got True"),
        ("layer_streaming(directory=3)", "directory must be a path, got 3"),
    ],
)
def test_bad_settings_are_named(spec: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        parse(spec)


def test_refusals_in_words() -> None:
    config = tiny_config("qwen3_4b_instruct_2507")
    assert LayerStreaming().refusal(Target(config)) is None
    reason = LayerStreaming(pin_layers=4).refusal(Target(config))
    assert reason == "pin_layers=4 keeps all 4 layers in memory; nothing would be streamed"
    assert "the model is on cuda" in str(LayerStreaming().refusal(Target(config, device="cuda")))


def test_without_it_there_is_no_report(dense: Runner) -> None:
    with pytest.raises(LookupError, match="layer_streaming is not applied to this model"):
        streaming_report(dense)
