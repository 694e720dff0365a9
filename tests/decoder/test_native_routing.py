"""The choice of experts is transformers' own: softmax or sigmoids, groups, ties, normalization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Glm4MoeLiteConfig, Qwen3MoeConfig
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import Glm4MoeLiteTopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from optimizations.native.checks import DTYPE_CODES
from optimizations.native.loader import native


def choose(
    logits: Tensor,
    top_k: int,
    *,
    correction: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Experts and weights [rows, top_k]; sigmoids where there is a correction, else softmax."""
    rows, count = logits.shape
    experts, weights = torch.empty(rows, top_k, dtype=torch.int64), torch.empty(rows, top_k)
    router = native().decoder.Router(
        weight=0,
        correction=0 if correction is None else correction.data_ptr(),
        top_k=top_k,
        groups=groups,
        top_groups=top_groups,
        softmax=correction is None,
        normalize=normalize,
        scale=scale,
    )
    addresses = experts.data_ptr(), weights.data_ptr()
    native().decoder.choose_experts(
        router, logits.data_ptr(), rows, count, DTYPE_CODES[logits.dtype], *addresses, 2
    )
    return experts, weights


def by_expert(experts: Tensor, weights: Tensor, count: int) -> Tensor:
    """float32 [rows, count]: the weight of each expert, 0 where it was not chosen."""
    return torch.zeros(experts.shape[0], count).scatter_(1, experts, weights.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_router(dtype: torch.dtype, normalize: bool) -> None:
    torch.manual_seed(3)
    config = Qwen3MoeConfig(hidden_size=64, num_experts=16, num_experts_per_tok=4, norm_topk_prob=normalize)
    router = Qwen3MoeTopKRouter(config).to(dtype)
    router.weight.data.normal_()
    with torch.no_grad():
        logits, wanted, chosen = router(torch.randn(50, 64).to(dtype))
    experts, weights = choose(logits.contiguous(), 4, normalize=normalize)
    clear = (
        logits.float().sort(descending=True).values[:, 3:5].diff().squeeze(1) != 0
    )  # no tie at the last place
    got, stock = by_expert(experts, weights, 16), by_expert(chosen, wanted, 16)
    assert clear.sum() > 40
    # A unit in the last place where the sum was rounded the other way.
    torch.testing.assert_close(
        got[clear], stock[clear], rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0
    )


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (8, 3)])
def test_sigmoid_router_with_correction_and_groups(groups: int, top_groups: int) -> None:
    torch.manual_seed(4)
    config = Glm4MoeLiteConfig(
        hidden_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=True,
        routed_scaling_factor=1.8,
    )
    router = Glm4MoeLiteTopkRouter(config)
    router.weight.data.normal_(std=0.2)
    router.e_score_correction_bias.uniform_(-0.5, 0.5)
    with torch.no_grad():
        logits, wanted, chosen = router(torch.randn(50, 64))
    experts, weights = choose(
        logits.contiguous(),
        4,
        correction=router.e_score_correction_bias,
        groups=groups,
        top_groups=top_groups,
        scale=1.8,
    )
    got, stock = by_expert(experts, weights, 16), by_expert(chosen, wanted, 16)
    torch.testing.assert_close(got, stock, rtol=1e-5, atol=1e-7)


def test_among_equals_the_first_expert_is_chosen() -> None:
    experts, weights = choose(torch.zeros(1, 8), 3)
    assert experts.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3))


def test_a_nan_poisons_its_row_alone() -> None:
    logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    logits[0, 5] = float("nan")
    experts, weights = choose(logits, 2)
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()
    assert ((experts >= 0) & (experts < 8)).all()


def test_more_experts_than_there_are_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="top_k must be 1 to the number of experts"):
        choose(torch.zeros(1, 4), 5)
    with pytest.raises(ValueError, match="groups must be of equal size"):
        choose(torch.zeros(1, 9), 2, correction=torch.zeros(9), groups=2)
