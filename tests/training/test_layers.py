"""What training swaps in computes what transformers computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from training.attention import CausalAttention, use_training_attention
from training.experts import Balance
from training.grow import grow_coder, grow_glm, grow_vision
from training.models import new_model
from training.optim import Muon, orthogonalize, split_parameters


def randomized(name: str) -> nn.Module:
    """Branch outputs start at zero; give them values so that a difference would show."""
    model = new_model(name, seed=2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "down_proj" in key or "o_proj" in key:
                parameter.normal_(std=0.02)
    return model


def test_attention_and_its_gradient_match_torch() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 33, 16, requires_grad=True) for _ in range(3))
    weight = torch.randn(6, 33, 16)
    ours = torch.autograd.grad((CausalAttention.apply(q * 0.25, k, v) * weight).sum(), (q, k, v))
    reference = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    theirs = torch.autograd.grad((reference * weight).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_coder_30b", "glm_4_7_flash"])
def test_training_layers_leave_logits_and_gradients_alone(name: str) -> None:
    model = randomized(name)
    fast = copy.deepcopy(model)
    balance = Balance(fast)
    use_training_attention(fast)
    ids = torch.randint(0, 1792, (2, 48), generator=torch.Generator().manual_seed(0))
    expected, found = (m(input_ids=ids, use_cache=False).logits for m in (model, fast))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    expected.square().mean().backward()
    found.square().mean().backward()
    layer = "model.layers.2.mlp.experts.gate_up_proj"
    a, b = (dict(m.named_parameters())[layer].grad for m in (model, fast))
    torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-3)
    assert all(ratio >= 1 for ratio in balance.after_step())


def test_the_balance_loss_sees_training_passes_only() -> None:
    model = randomized("qwen3_coder_30b")
    balance = Balance(model)
    ids = torch.randint(0, 1792, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert balance.loss() == 0.0
    model(input_ids=ids, use_cache=False)
    loss = balance.loss()
    assert isinstance(loss, torch.Tensor)
    assert (
        0.009 < loss.item() < 0.04
    )  # 0.01 when every expert is used alike, at most experts / top-k times that


def test_the_glm_bias_moves_against_the_load() -> None:
    model = randomized("glm_4_7_flash")
    balance = Balance(model)
    gate, experts = model.model.layers[1].mlp.gate, model.model.layers[1].mlp.experts
    experts.load += torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1])
    balance.after_step()
    assert gate.e_score_correction_bias[0] < 0 < gate.e_score_correction_bias[1]


def test_orthogonalize_flattens_singular_values() -> None:
    matrices = torch.randn(2, 96, 40, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_muon_descends_and_leaves_embeddings_to_adamw() -> None:
    model = new_model("qwen3_coder_30b", seed=1)
    matrices, rest = split_parameters(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in rest} >= {"embed_tokens", "lm_head", "gate", "norm"}
    assert all(p.ndim in (2, 3) for p in matrices)
    weight = nn.Parameter(torch.zeros(8, 8))
    target = torch.eye(8)
    optimizer = Muon([weight], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).norm() < 0.3 * target.norm()


def test_growing_keeps_what_the_dense_model_says() -> None:
    dense = randomized("qwen3_4b_instruct_2507").eval()
    ids = torch.randint(0, 1792, (1, 64), generator=torch.Generator().manual_seed(3))
    vision, coder, glm = (
        new_model(name, 1).eval() for name in ("qwen3_vl_2b", "qwen3_coder_30b", "glm_4_7_flash")
    )
    grow_vision(vision, dense)
    grow_coder(coder, dense, ids, seed=1)
    grow_glm(glm, dense, ids, seed=1)
    with torch.no_grad():
        expected, seen, sparse = (m(input_ids=ids).logits for m in (dense, vision, coder))
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)
    assert (sparse.argmax(-1) == expected.argmax(-1)).float().mean() > 0.5
    assert torch.equal(glm.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight)
