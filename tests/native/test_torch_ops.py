"""The kernels as torch operators: schema, fake versions, gradients, and the same bits as the direct call."""

from __future__ import annotations

import pytest
import torch

from optimizations.native import ops  # noqa: F401  registers torch.ops.pio
from optimizations.native.experts import PackedExperts, pack_experts
from optimizations.native.linear import linear, moe
from optimizations.native.packing import Packed, dequantize, pack


def linear_case(bits: int) -> tuple[torch.Tensor, Packed, torch.Tensor]:
    return torch.randn(3, 64), pack(torch.randn(20, 64), bits=bits), torch.randn(20)


def moe_case(bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PackedExperts]:
    packed = pack_experts(torch.randn(4, 64, 64), torch.randn(4, 64, 32), bits=bits)
    return torch.randn(5, 64), torch.randint(0, 4, (5, 2)), torch.rand(5, 2), packed


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_op(bits: int, with_bias: bool) -> None:
    x, weight, bias = linear_case(bits)
    op = getattr(torch.ops.pio, f"linear_int{bits}")
    arguments = (x, weight.data, weight.scales, bias if with_bias else None, weight.rows)
    torch.library.opcheck(op.default, arguments)
    assert torch.equal(op(*arguments), linear(x, weight, bias if with_bias else None))


@pytest.mark.parametrize("bits", [4, 8])
def test_moe_op(bits: int) -> None:
    x, chosen, weights, packed = moe_case(bits)
    op = getattr(torch.ops.pio, f"moe_int{bits}")
    arguments = (
        x,
        chosen,
        weights,
        packed.gate_up_data,
        packed.gate_up_scales,
        packed.down_data,
        packed.down_scales,
        packed.inner,
    )
    torch.library.opcheck(op.default, arguments)
    assert torch.equal(op(*arguments), moe(x, chosen, weights, packed))


@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_of_linear_is_that_of_the_dequantized_weight(bits: int) -> None:
    x, weight, bias = linear_case(bits)
    x.requires_grad_()
    bias.requires_grad_()
    upstream = torch.randn(3, 20)
    linear(x, weight, bias).backward(upstream)
    assert x.grad is not None and bias.grad is not None
    assert torch.allclose(x.grad, upstream @ dequantize(weight), rtol=1e-5, atol=1e-5)
    assert torch.allclose(bias.grad, upstream.sum(0), rtol=1e-5, atol=1e-5)


def test_moe_has_no_gradient_and_says_so() -> None:
    x, chosen, weights, packed = moe_case(4)
    y = moe(x.requires_grad_(), chosen, weights, packed)
    with pytest.raises(RuntimeError, match="moe_int4"):
        y.sum().backward()


def test_compiled_graph_holds_the_ops_without_a_break() -> None:
    x, weight, bias = linear_case(4)
    tokens, chosen, weights, packed = moe_case(8)

    def both(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return linear(a, weight, bias) + 1, moe(b, chosen, weights, packed) * 2

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    for got, wanted in zip(compiled(x, tokens), both(x, tokens), strict=True):
        assert torch.equal(got, wanted)
