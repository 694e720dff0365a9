"""The four models at `tiny` scale: the same transformers classes, a few million parameters, trained.

All four share one vocabulary of 1,792 tokens and a width of 256, so that the dense model can seed the
others (sparse upcycling, the text tower of the vision model). Every matrix dimension but GLM's rotary rows
(32 a head) is a multiple of 64, every reduction dimension of 128: groupwise quantization needs no padding.
`rope_theta` 1e6 leaves 14 of 32 rotary pairs below half a turn at 1,024 tokens, which retrieval uses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import Glm4MoeLiteConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig, Qwen3VLConfig

VOCABULARY = 1792
HIDDEN = 256
POSITIONS = 4096
ROPE_THETA = 1e6
END_ID = 0
VISION_START_ID, VISION_END_ID, IMAGE_ID, VIDEO_ID = 3, 4, 5, 6
REFERENCE = Path(__file__).with_name("reference")

_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": HIDDEN**-0.5,
    "rms_norm_eps": 1e-6,
    "pad_token_id": END_ID,
    "dtype": "bfloat16",
}
_ENDS = {"bos_token_id": END_ID, "eos_token_id": END_ID}
_GQA = {"num_key_value_heads": 2, "head_dim": 64}


def _rope(theta: float = ROPE_THETA, **more: object) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def qwen3_4b_instruct_2507() -> Qwen3Config:
    """Dense, grouped-query attention with QK-norm, tied embeddings: 2.8 M parameters."""
    return Qwen3Config(
        **_SHARED,
        **_ENDS,
        **_GQA,
        intermediate_size=512,
        tie_word_embeddings=True,
        rope_parameters=_rope(),
    )


def qwen3_coder_30b() -> Qwen3MoeConfig:
    """Every layer sparse, 8 experts of 128 channels, 4 a token, normalized: 4.9 M parameters."""
    return Qwen3MoeConfig(
        **_SHARED,
        **_ENDS,
        **_GQA,
        intermediate_size=512,
        num_experts=8,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        tie_word_embeddings=False,
        rope_parameters=_rope(),
    )


def glm_4_7_flash() -> Glm4MoeLiteConfig:
    """Latent attention, a dense first layer, then 8 routed experts (2 a token) and 1 shared: 5.1 M."""
    return Glm4MoeLiteConfig(
        **{**_SHARED, "rms_norm_eps": 1e-5},
        **_ENDS,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.8,
        tie_word_embeddings=False,
        rope_parameters=_rope(1e3),  # its 16 pairs are the 16 fastest of the others
        rope_interleave=True,
    )


def qwen3_vl_2b() -> Qwen3VLConfig:
    """Vision tower of 4 layers with DeepStack on three, interleaved M-RoPE text tower: 4.2 M.

    A 128 × 128 image is 16 × 16 patches of 8 pixels, merged 2 × 2 into 64 visual tokens.
    """
    text = {
        **_SHARED,
        **_GQA,
        "intermediate_size": 512,
        "rope_parameters": _rope(mrope_section=[12, 10, 10], mrope_interleaved=True),
        "tie_word_embeddings": True,
        **_ENDS,
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "num_heads": 2,
        "intermediate_size": 256,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1, 2],
        "initializer_range": 128**-0.5 / 2,
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


TINY: dict[str, Callable[[], PreTrainedConfig]] = {
    function.__name__: function
    for function in (glm_4_7_flash, qwen3_4b_instruct_2507, qwen3_coder_30b, qwen3_vl_2b)
}


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of the model's tiny scale; KeyError in words for a name that is not one of the four."""
    if name not in TINY:
        raise KeyError(f"No tiny configuration is called {name!r}; there are: {', '.join(sorted(TINY))}.")
    return TINY[name]()


def reference_directory(name: str) -> Path:
    """Where the model's trained tiny checkpoint lies: config, weights (bf16), tokenizer, figures."""
    tiny_config(name)
    return REFERENCE / name
