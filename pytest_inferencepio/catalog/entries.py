"""The four models: names, aliases, classes, published sizes. Imports neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import difflib

from pytest_inferencepio.errors import UnknownName

SCALES = ("tiny", "full")


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """One model of the catalog. Parameter counts are of the published dimensions (`full`)."""

    name: str
    published_as: str
    architecture: str  # transformers class
    model_type: str
    parameters: int  # exact, asserted on the meta device
    active_parameters: float  # per token, in units of one
    multimodal: bool = False
    mixture_of_experts: bool = False
    aliases: tuple[str, ...] = ()
    special: str = ""


ENTRIES: dict[str, ModelEntry] = {
    entry.name: entry
    for entry in (
        ModelEntry(
            name="glm_4_7_flash",
            published_as="zai-org/GLM-4.7-Flash",
            architecture="Glm4MoeLiteForCausalLM",
            model_type="glm4_moe_lite",
            parameters=29_943_390_976,
            active_parameters=3.57e9,
            mixture_of_experts=True,
            aliases=("glm_4_7", "GLM-4.7-Flash-Flash", "GLM-4.7-Flash"),
            special="MLA latent cache, 64 routed experts (4 active) + 1 shared, sigmoid router",
        ),
        ModelEntry(
            name="qwen3_4b_instruct_2507",
            published_as="Qwen/Qwen3-4B-Instruct-2507",
            architecture="Qwen3ForCausalLM",
            model_type="qwen3",
            parameters=4_022_468_096,
            active_parameters=4.02e9,
            aliases=("Qwen3-4B-Instruct-2507",),
            special="dense GQA with QK-norm, tied embeddings",
        ),
        ModelEntry(
            name="qwen3_coder_30b",
            published_as="Qwen/Qwen3-Coder-30B-A3B-Instruct",
            architecture="Qwen3MoeForCausalLM",
            model_type="qwen3_moe",
            parameters=30_532_122_624,
            active_parameters=3.04e9,
            mixture_of_experts=True,
            aliases=("Qwen3-Coder-30B-A3B-Instruct", "Qwen3-Coder-30B-A3B"),
            special="128 experts (8 active), every layer sparse",
        ),
        ModelEntry(
            name="qwen3_vl_2b",
            published_as="Qwen/Qwen3-VL-2B-Instruct",
            architecture="Qwen3VLForConditionalGeneration",
            model_type="qwen3_vl",
            parameters=2_127_532_032,
            active_parameters=2.13e9,
            multimodal=True,
            aliases=("Qwen3-VL-2B-Instruct", "Qwen3-VL-2B"),
            special="vision tower, DeepStack, interleaved M-RoPE",
        ),
    )
}


def lookup(name: str) -> ModelEntry:
    """The entry called `name` (or an alias or hub id of it, in any case).

    Raises:
        UnknownName: lists the near names and all names.
    """
    for entry in ENTRIES.values():
        if name.lower() in {alias.lower() for alias in (entry.name, entry.published_as, *entry.aliases)}:
            return entry
    near = difflib.get_close_matches(name, ENTRIES, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UnknownName(f"unknown model {name!r}; {hint}known: {', '.join(ENTRIES)} (or all)")
