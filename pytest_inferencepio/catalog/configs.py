"""The published dimensions (`full` scale), and what follows from them without allocating a weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import Glm4MoeLiteConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig, Qwen3VLConfig

from pytest_inferencepio.catalog.entries import ENTRIES, ModelEntry
from pytest_inferencepio.errors import UnknownName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_QWEN_END = {"bos_token_id": 151643, "eos_token_id": 151645}


def _rope(theta: float, **more: object) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def glm_4_7_flash() -> Glm4MoeLiteConfig:
    """GLM-4.7-Flash: 47 layers of latent attention, 64 experts (4 a token) and a shared one."""
    return Glm4MoeLiteConfig(
        vocab_size=154880,
        hidden_size=2048,
        intermediate_size=10240,
        moe_intermediate_size=1536,
        num_hidden_layers=47,
        num_attention_heads=20,
        num_key_value_heads=20,
        n_shared_experts=1,
        n_routed_experts=64,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.8,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        max_position_embeddings=202752,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters=_rope(1e6),
        rope_interleave=True,
        bos_token_id=None,
        eos_token_id=154820,
        pad_token_id=154820,
    )


def qwen3_4b_instruct_2507() -> Qwen3Config:
    """Qwen3-4B-Instruct-2507: dense, grouped-query attention, tied embeddings."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=262144,
        max_window_layers=36,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters=_rope(5e6),
        **_QWEN_END,
    )


def qwen3_coder_30b() -> Qwen3MoeConfig:
    """Qwen3-Coder-30B-A3B-Instruct: 48 sparse layers of 128 experts (8 a token)."""
    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=262144,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters=_rope(1e7),
        **_QWEN_END,
    )


def qwen3_vl_2b() -> Qwen3VLConfig:
    """Qwen3-VL-2B-Instruct: 28 text layers with interleaved M-RoPE, vision tower of 24 with DeepStack."""
    text = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": _rope(5e6, mrope_section=[24, 20, 20], mrope_interleaved=True),
        **_QWEN_END,
    }
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "num_heads": 16,
        "intermediate_size": 4096,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


FULL: dict[str, Callable[[], PreTrainedConfig]] = {
    function.__name__: function
    for function in (glm_4_7_flash, qwen3_4b_instruct_2507, qwen3_coder_30b, qwen3_vl_2b)
}


def full_config(name: str) -> PreTrainedConfig:
    """The published configuration of the model called `name` (UnknownName for one outside the catalog)."""
    if name not in FULL:
        raise UnknownName(f"no published configuration is called {name!r}; known: {', '.join(FULL)}")
    return FULL[name]()


def model_class(entry: ModelEntry) -> type[PreTrainedModel]:
    """The transformers class of `entry`."""
    return getattr(transformers, entry.architecture)  # type: ignore[no-any-return]


def meta_model(entry: ModelEntry, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory: every parameter and buffer on the meta device, ties made, in eval mode."""
    with torch.device("meta"):
        model = model_class(entry)._from_config(config, dtype=dtype)
    return model.eval()


@cache
def parameter_count(name: str) -> int:
    """Parameters of the published model, tied ones counted once; nothing is allocated."""
    model = meta_model(ENTRIES[name], full_config(name), torch.bfloat16)
    return sum(parameter.numel() for parameter in model.parameters())
