"""The tensors of a GGUF file of given dimensions: names, shapes, formats, bytes. Needs neither gguf nor torch.

Linear layers are Q4_0, the format llama.cpp repacks for AVX2 and AVX-512; the embedding (and output layer) is Q6_K
as in llama.cpp's own Q4_0 files, or Q8_0 where the width is no multiple of Q6_K's 256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

from pytest_inferencepio.machine import Work

# transformers' model type -> llama.cpp's architecture, where its graph computes the same.
ARCHITECTURES = {"qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
# Why not, for models that llama.cpp itself has an architecture for.
NOT_WRITTEN = {
    "glm4_moe_lite": (
        "llama.cpp runs it as deepseek2 with key and value projections absorbed into 3-D tensors, which the random "
        "GGUF written here does not have"
    ),
    "qwen3_vl": (
        "llama.cpp splits it into a text model (qwen3vl) and a separate vision file, which the random GGUF written "
        "here does not have"
    ),
}
BLOCKS = {
    "Q4_0": (32, 18),
    "Q8_0": (32, 34),
    "Q6_K": (256, 210),
    "F32": (1, 4),
}  # weights and bytes of a block
VERSION = 1  # of what is written; another one is another file


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """One tensor: its shape in weights (rows last) and its format.

    `share` is the part a token reads: of routed experts those it is routed to, of an embedding next to nothing.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    share: float = 1.0
    is_head: bool = False

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        count, size = BLOCKS[self.format]
        return self.weights // count * size


@dataclasses.dataclass(frozen=True)
class GgufPlan:
    """A whole file. `keys` are the values of the header, by the method of `gguf.GGUFWriter` that writes them."""

    architecture: str
    keys: tuple[tuple[str, Any], ...]
    tensors: tuple[TensorPlan, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_name(self) -> str:
        """Equal for equal dimensions and formats."""
        told = json.dumps([VERSION, self.keys, [dataclasses.astuple(tensor) for tensor in self.tensors]])
        return f"{self.architecture}-q4_0-{hashlib.sha256(told.encode()).hexdigest()[:12]}.gguf"

    def work(self, prompt_tokens: float = 0.0) -> Work:
        """The least that a step of decoding reads and a prompt's token computes (without the output layer)."""
        flops = sum(
            2.0 * tensor.weights * tensor.share
            for tensor in self.tensors
            if len(tensor.shape) > 1 and not tensor.is_head
        )
        read = sum(tensor.nbytes * (1.0 if tensor.is_head else tensor.share) for tensor in self.tensors)
        return Work(read, flops, prompt_tokens=prompt_tokens)


def refusal(config: Any) -> str | None:
    """Why no file can be planned for a (text) configuration of transformers, or None."""
    kind = config.model_type
    if kind in NOT_WRITTEN:
        return NOT_WRITTEN[kind]
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return f"no GGUF of the architecture {kind} is written here; known: {known}"
    if kind == "qwen3_moe" and not _every_layer_alike(config):
        return "llama.cpp's qwen3moe has experts in every layer and normalizes their weights; this model does not"
    odd = [size for size in _reduced(config) if size % BLOCKS["Q4_0"][0]]
    if odd:
        return f"Q4_0 packs 32 weights of a row together, and a row of {odd[0]} is no multiple of that"
    return None


def plan(config: Any) -> GgufPlan:
    """The file for a (text) configuration that `refusal` does not refuse."""
    sparse = config.model_type == "qwen3_moe"
    tensors = [*_ends(config)]
    for layer in range(config.num_hidden_layers):
        tensors += _attention(config, f"blk.{layer}.")
        tensors += (_experts if sparse else _dense)(config, f"blk.{layer}.")
    return GgufPlan(ARCHITECTURES[config.model_type], tuple(_keys(config)), tuple(tensors))


def _every_layer_alike(config: Any) -> bool:
    return config.decoder_sparse_step == 1 and not config.mlp_only_layers and config.norm_topk_prob


def _reduced(config: Any) -> list[int]:
    """Lengths of rows: what is summed over in each linear layer."""
    inner = config.moe_intermediate_size if config.model_type == "qwen3_moe" else config.intermediate_size
    return [config.hidden_size, inner, config.num_attention_heads * config.head_dim]


def _keys(config: Any) -> Iterator[tuple[str, Any]]:
    yield "block_count", config.num_hidden_layers
    yield "context_length", config.max_position_embeddings
    yield "embedding_length", config.hidden_size
    yield "feed_forward_length", config.intermediate_size
    yield "head_count", config.num_attention_heads
    yield "head_count_kv", config.num_key_value_heads
    yield "key_length", config.head_dim
    yield "value_length", config.head_dim
    yield "rope_freq_base", float(config.rope_parameters["rope_theta"])
    yield "layer_norm_rms_eps", config.rms_norm_eps
    yield "vocab_size", config.vocab_size
    if config.model_type == "qwen3_moe":
        yield "expert_count", config.num_experts
        yield "expert_used_count", config.num_experts_per_tok
        yield "expert_feed_forward_length", config.moe_intermediate_size


def _ends(config: Any) -> Iterator[TensorPlan]:
    shape = (config.vocab_size, config.hidden_size)
    kind = "Q6_K" if config.hidden_size % BLOCKS["Q6_K"][0] == 0 else "Q8_0"
    tied = bool(config.tie_word_embeddings)
    yield TensorPlan("token_embd.weight", shape, kind, 1 / config.vocab_size, is_head=tied)
    if not tied:
        yield TensorPlan("output.weight", shape, kind, is_head=True)
    yield TensorPlan("output_norm.weight", (config.hidden_size,), "F32")


def _attention(config: Any, prefix: str) -> Iterator[TensorPlan]:
    width, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    for name, size in (("attn_norm", width), ("ffn_norm", width), ("attn_q_norm", dim), ("attn_k_norm", dim)):
        yield TensorPlan(f"{prefix}{name}.weight", (size,), "F32")
    shapes = {
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
    }
    for name, shape in shapes.items():
        yield TensorPlan(f"{prefix}{name}.weight", shape, "Q4_0")


def _dense(config: Any, prefix: str) -> Iterator[TensorPlan]:
    width, inner = config.hidden_size, config.intermediate_size
    for name, shape in (
        ("ffn_gate", (inner, width)),
        ("ffn_up", (inner, width)),
        ("ffn_down", (width, inner)),
    ):
        yield TensorPlan(f"{prefix}{name}.weight", shape, "Q4_0")


def _experts(config: Any, prefix: str) -> Iterator[TensorPlan]:
    width, inner, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
    share = config.num_experts_per_tok / count
    yield TensorPlan(f"{prefix}ffn_gate_inp.weight", (count, width), "F32")
    for name, shape in (
        ("ffn_gate_exps", (count, inner, width)),
        ("ffn_up_exps", (count, inner, width)),
        ("ffn_down_exps", (count, width, inner)),
    ):
        yield TensorPlan(f"{prefix}{name}.weight", shape, "Q4_0", share)
