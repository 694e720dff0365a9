"""The tensors of a GGUF file against the models whose dimensions they have."""

from __future__ import annotations

import pytest
from transformers import Qwen3Config, Qwen3MoeConfig

from pytest_inferencepio.catalog.configs import full_config, parameter_count
from pytest_inferencepio.catalog.tiny import tiny_config
from pytest_inferencepio.peers.support import gguf_plan

WRITTEN = ("qwen3_4b_instruct_2507", "qwen3_coder_30b")


@pytest.mark.parametrize("name", WRITTEN)
def test_every_weight_of_the_published_model_is_planned(name: str) -> None:
    planned = gguf_plan.plan(full_config(name))
    assert sum(tensor.weights for tensor in planned.tensors) == parameter_count(name)


@pytest.mark.parametrize(("name", "gigabytes"), [("qwen3_4b_instruct_2507", 2.37), ("qwen3_coder_30b", 17.3)])
def test_sizes_are_those_of_published_q4_0_files(name: str, gigabytes: float) -> None:
    """Qwen3-4B-Q4_0.gguf has 2.37 GB, Qwen3-Coder-30B-A3B-Instruct-Q4_0.gguf 17.3 GB."""
    assert gguf_plan.plan(full_config(name)).nbytes / 1e9 == pytest.approx(gigabytes, rel=0.03)


def test_decoding_reads_every_dense_weight_and_of_the_embedding_only_the_head() -> None:
    tied = gguf_plan.plan(full_config("qwen3_4b_instruct_2507"))
    assert tied.work().bytes_per_step == tied.nbytes
    assert tied.work().flops_per_token == pytest.approx(
        2 * 36 * (2560 * 128 * (32 + 8 + 8 + 32) + 3 * 2560 * 9728)
    )


def test_decoding_reads_the_experts_a_token_is_routed_to() -> None:
    planned = gguf_plan.plan(full_config("qwen3_coder_30b"))
    experts = sum(tensor.nbytes for tensor in planned.tensors if "_exps" in tensor.name)
    embedding = next(tensor.nbytes for tensor in planned.tensors if tensor.name == "token_embd.weight")
    read = planned.work().bytes_per_step
    assert read == pytest.approx(planned.nbytes - embedding - experts * (1 - 8 / 128), rel=1e-4)


def test_names_tell_dimensions_apart() -> None:
    names = {gguf_plan.plan(make(name)).file_name for name in WRITTEN for make in (full_config, tiny_config)}
    assert len(names) == 4
    assert all(
        name.startswith(("qwen3-q4_0-", "qwen3moe-q4_0-")) and name.endswith(".gguf") for name in names
    )
    assert gguf_plan.plan(tiny_config(WRITTEN[0])).file_name in names


def test_a_width_that_q6_k_cannot_pack_takes_q8_0() -> None:
    config = Qwen3Config(
        hidden_size=96, intermediate_size=64, head_dim=32, num_attention_heads=2, vocab_size=50
    )
    assert gguf_plan.refusal(config) is None
    formats = {tensor.name: tensor.format for tensor in gguf_plan.plan(config).tensors}
    assert formats["token_embd.weight"] == "Q8_0" and formats["blk.0.attn_q.weight"] == "Q4_0"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            full_config("glm_4_7_flash"),
            "llama.cpp runs it as deepseek2 with key and value projections absorbed",
        ),
        (full_config("qwen3_vl_2b"), "a separate vision file"),
        (Qwen3Config(hidden_size=80), "a row of 80 is no multiple of that"),
        (Qwen3MoeConfig(norm_topk_prob=False), "normalizes their weights; this model does not"),
        (Qwen3MoeConfig(norm_topk_prob=True, mlp_only_layers=[0]), "has experts in every layer"),
    ],
)
def test_what_is_not_written_is_refused_in_words(config: object, said: str) -> None:
    assert said in (gguf_plan.refusal(config) or "")


def test_an_unknown_architecture_is_named() -> None:
    class Llama:
        model_type = "llama"

    assert gguf_plan.refusal(Llama()) == (
        "no GGUF of the architecture llama is written here; known: qwen3, qwen3_moe"
    )
