"""Memory figures: bytes that can be written down by hand, and a real fresh process."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build
from torch import nn

from optimizations.runner import Runner
from pytest_inferencepio.measure import memory
from pytest_inferencepio.measure.latency import Generation
from pytest_inferencepio.record import metric, not_measured


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def buffer_bytes(model: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def test_weights_are_parameters_and_buffers(runner: Runner) -> None:
    model = runner.model
    extra = memory.weight_memory(model) - parameter_bytes(model) - buffer_bytes(model)
    assert 0 <= extra <= 4 * model.config.head_dim * 4  # original_inv_freq is a plain attribute


def test_tied_weights_views_and_packed_attributes_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    model[0].view = model[0].weight.detach()[:4]
    model[1].packed = [torch.zeros(100, dtype=torch.uint8), {"scales": torch.zeros(5)}]
    assert memory.weight_memory(model) == 8 * 8 * 4 + 100 + 20


def test_weights_on_the_meta_device_take_nothing() -> None:
    assert memory.weight_memory(nn.Linear(1000, 1000, device="meta")) == 0


def test_cache_bytes_per_token_are_those_of_keys_and_values(runner: Runner) -> None:
    found = memory.kv_bytes_per_token(runner, 16, 48)
    config = runner.model.config
    per_layer = 2 * config.num_key_value_heads * config.head_dim * 4  # float32
    assert found.value == config.num_hidden_layers * per_layer
    half = Runner(copy.deepcopy(runner.model).bfloat16(), runner.processor)
    assert memory.kv_bytes_per_token(half, 16, 48).value == found.value / 2


def test_without_a_cache_the_reason_is_given(runner: Runner) -> None:
    runner.generate_kwargs["use_cache"] = False
    found = memory.kv_bytes_per_token(runner, 4, 8)
    assert found.value is None and "returned no cache to look into" in str(found.reason)


def test_cache_tensors_are_found_wherever_they_hang() -> None:
    layer = SimpleNamespace(keys=torch.zeros(2), nested=[{"values": torch.zeros(3)}])
    cache = SimpleNamespace(layers=[layer, layer], owner=nn.Linear(4, 4), kind=dict)
    layer.back = cache
    assert sorted(tensor.numel() for tensor in memory.cache_tensors(cache)) == [2, 3]


def test_a_step_reads_all_but_the_embedding(runner: Runner) -> None:
    embedding = runner.model.get_input_embeddings().weight
    needed = memory.weight_memory(runner.model) - embedding.numel() * embedding.element_size()
    assert memory.bytes_read_per_step(runner) == needed


def test_a_tied_embedding_is_read_by_the_output_layer(runner: Runner) -> None:
    model = copy.deepcopy(runner.model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert memory.bytes_read_per_step(Runner(model, None)) == memory.weight_memory(model)


def test_packed_weights_are_read_as_packed() -> None:
    """int8 halves bfloat16 and adds scales; the packed embedding shares them with the output layer."""
    from optimizations.registry import parse
    from optimizations.session import apply_all
    from pytest_inferencepio.catalog.entries import lookup
    from pytest_inferencepio.catalog.loading import load

    runner = load(lookup("qwen3_4b_instruct_2507"), "tiny").runner
    before = memory.bytes_read_per_step(runner)
    apply_all(runner, parse("weight_int8"))
    assert 0.5 < memory.bytes_read_per_step(runner) / before < 0.6
    assert memory.bytes_read_per_step(runner) == pytest.approx(memory.weight_memory(runner.model), rel=1e-3)


def test_what_a_technique_keeps_for_longer_passes_is_not_read() -> None:
    """The native decoder holds a dense kv_b_proj for many queries; one token reads the packed one."""
    from optimizations.cache.int8_attention import ABSORBED
    from optimizations.session import optimize

    runner = build("glm_4_7_flash", torch.float32)
    with optimize(runner, "weight_int4"):
        packed = memory.bytes_read_per_step(runner)
        with optimize(runner, "native_decoder"):
            held = sum(b.nbytes for name, b in runner.model.named_buffers() if name.endswith(ABSORBED))
            assert held == 4 * (64 + 64) * 128 * 4 * 4  # heads x (nope + v) x rank x float32, four layers
            assert memory.bytes_read_per_step(runner) == pytest.approx(packed, rel=0.02)


@pytest.mark.parametrize("name", ["qwen3_coder_30b", "glm_4_7_flash"])
def test_only_the_routed_share_of_the_experts_is_read(name: str) -> None:
    from pytest_inferencepio.catalog.configs import meta_model
    from pytest_inferencepio.catalog.entries import lookup
    from pytest_inferencepio.catalog.tiny import tiny_config

    model = meta_model(lookup(name), tiny_config(name), torch.bfloat16).to_empty(device="cpu")
    runner = Runner(model, None)
    share = memory.routed_share(runner)
    config = model.config
    total = getattr(config, "num_experts", None) or config.n_routed_experts
    assert share == config.num_experts_per_tok / total < 1
    experts = sum(p.numel() * 2 for n, p in model.named_parameters() if ".experts." in n)
    embedding = model.get_input_embeddings().weight.numel() * 2
    whole = memory.weight_memory(model)
    assert memory.bytes_read_per_step(runner) == pytest.approx(
        whole - embedding - (1 - share) * experts, rel=1e-3
    )


def test_the_vision_tower_is_not_read_by_decoding() -> None:
    from pytest_inferencepio.catalog.configs import meta_model
    from pytest_inferencepio.catalog.entries import lookup
    from pytest_inferencepio.catalog.tiny import tiny_config

    model = meta_model(lookup("qwen3_vl_2b"), tiny_config("qwen3_vl_2b"), torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    tower = parameter_bytes(model.model.visual)
    assert tower > 0
    assert memory.bytes_read_per_step(Runner(model, None)) <= memory.weight_memory(model) - tower


def test_operations_are_two_per_weight_of_the_layers(runner: Runner) -> None:
    layers = sum(p.numel() for p in runner.model.model.layers.parameters() if p.dim() == 2)
    work = memory.work_of(runner, runner)
    assert work.flops_per_token == 2 * layers


def test_bandwidth_is_bytes_over_the_time_of_a_token(runner: Runner) -> None:
    generations = [Generation(8, 0.1, (0.01, 0.03), 0.2)] * 5
    found = memory.bandwidth_metrics(runner, generations)
    needed = memory.bytes_read_per_step(runner)
    assert found["bytes_read_per_token"].value == needed
    assert found["memory_bandwidth"].value == pytest.approx(needed / 0.02)


def test_ratios_need_both_sides() -> None:
    before = {"peak_memory": metric("peak_memory", 400.0), "weight_memory": metric("weight_memory", 8.0)}
    after = {
        "peak_memory": metric("peak_memory", 100.0),
        "weight_memory": not_measured("weight_memory", "x"),
    }
    ratios = memory.memory_ratios(before, after)
    assert ratios["memory_ratio"].value == 0.25
    for name in ("weight_memory_ratio", "model_memory_ratio"):
        assert ratios[name].reason == "one of the two sides was not measured"


def test_a_generation_in_a_fresh_process_takes_more_than_none() -> None:
    """The tiny reference has 2.8 M parameters in bfloat16; its process must show at least them."""
    from pytest_inferencepio.measure.processes import FreshProcesses

    arguments = {
        "model": "qwen3_4b_instruct_2507",
        "scale": "tiny",
        "optimization": "none",
        "prompt_tokens": 32,
        "new_tokens": 3,
    }
    with FreshProcesses() as processes:
        metrics = memory.peak_metrics(processes, arguments, n=2, patience=1800)
        impatient = memory.peak_metrics(processes, arguments, n=2, patience=0)
    assert metrics["peak_memory"].n == 2
    assert impatient["peak_memory"].n == 1
    assert metrics["model_peak_memory"].value > 2 * 2.8e6
    assert metrics["process_memory"].value + metrics["model_peak_memory"].value == pytest.approx(
        metrics["peak_memory"].value
    )
    assert "CPU allocator keeps no high-water mark" in str(metrics["allocator_peak"].reason)


def test_what_a_prompt_leaves_behind_is_no_weight() -> None:
    """Qwen3-VL keeps the positions of its last prompt: a model that has run weighs what a fresh one does."""
    model = build("qwen3_vl_2b", torch.float32).model
    before = memory.weight_memory(model)
    model.generate(input_ids=torch.ones(1, 5, dtype=torch.int64), max_new_tokens=1, do_sample=False)
    assert model.model.rope_deltas is not None
    assert memory.weight_memory(model) == before
