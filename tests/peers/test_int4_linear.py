"""torch's int4 kernel behind a linear layer: dequantize-then-multiply within rounding; whole models replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pytest_inferencepio.models import CustomModel, LoadRequest, catalog_models, choose
from pytest_inferencepio.peers.bitsandbytes import Bitsandbytes
from pytest_inferencepio.peers.contract import Peer, PeerRequest
from pytest_inferencepio.peers.support import int4_linear
from pytest_inferencepio.peers.support.int4_linear import Int4Linear, quantized, replace_linears
from pytest_inferencepio.peers.torch_int4 import TorchInt4


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    levels, scales, zeros = quantized(weight)
    spread = [part.bfloat16().float().repeat_interleave(int4_linear.GROUP, dim=1) for part in (scales, zeros)]
    return (levels.float() - 8) * spread[0] + spread[1]


@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (48, 64), (64, 128), (1792, 256)])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_multiplies_by_the_dequantized_weight(
    rows: int, cols: int, shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(rows + cols)
    linear = nn.Linear(cols, rows, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(*shape, cols, dtype=torch.bfloat16)
    with torch.no_grad():
        y = Int4Linear(linear)(x)
        wanted = x.double() @ dequantized(linear.weight).double().T
        if bias:
            wanted += linear.bias.double()
    assert y.shape == (*shape, rows) and y.dtype is torch.bfloat16
    assert (y.double() - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_levels_span_their_group_and_lie_within_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    levels, scales, zeros = quantized(weight)
    assert levels.min() == 0 and levels.max() == 15 and levels.dtype is torch.int32
    spread = [part.repeat_interleave(int4_linear.GROUP, dim=1) for part in (scales, zeros)]
    error = ((levels - 8) * spread[0] + spread[1] - weight).abs()
    assert (error <= 0.5001 * spread[0]).all()


def test_a_constant_group_keeps_its_value() -> None:
    levels, scales, zeros = quantized(torch.full((16, 32), 0.25))
    assert torch.allclose((levels - 8) * scales + zeros, torch.full((16, 32), 0.25), atol=1e-5)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(32, 32))
        self.body = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 10))


def test_text_layers_are_replaced_and_what_does_not_fit_is_named() -> None:
    model = Tower()
    assert replace_linears(model) == ["body.1"]
    assert isinstance(model.visual[0], nn.Linear)
    assert isinstance(model.body[0], Int4Linear) and isinstance(model.body[1], nn.Linear)


def request_for(name: str) -> PeerRequest:
    (model,) = choose([name], catalog_models())
    return PeerRequest(model, LoadRequest("tiny"), threads=1, context=32)


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        (TorchInt4(), "qwen3_4b_instruct_2507"),
        (TorchInt4(), "qwen3_vl_2b"),
        (Bitsandbytes(), "qwen3_coder_30b"),
    ],
)
def test_a_session_generates_and_says_what_it_runs(peer: Peer, name: str) -> None:
    session = peer.open(request_for(name))
    found = session.generate([5, 6, 7, 8], 3)
    assert found.prompt_tokens == 4 and len(found.gaps) == 2 and found.time_to_first_token > 0
    assert session.work.bytes_per_step > 0
    assert session.notes[0].startswith(f"{peer.name}: {peer.version()}")
    session.close()
    session.close()


def test_int4_reads_a_third_of_the_bytes() -> None:
    from pytest_inferencepio.measure import memory

    request = request_for("qwen3_4b_instruct_2507")
    plain = memory.bytes_read_per_step(request.model.load(request.load).runner)
    session = TorchInt4().open(request)
    assert session.work.bytes_per_step < plain / 3  # 5 of 16 bits, norms besides
    session.close()


def test_sizes_are_known_for_the_catalog_at_full_scale_only() -> None:
    (model,) = choose(["qwen3_4b_instruct_2507"], catalog_models())
    full = PeerRequest(model, LoadRequest("full"), threads=1, context=32)
    assert 8e9 < TorchInt4().memory(full) < 11e9
    assert Bitsandbytes().memory(full) < 6e9
    assert TorchInt4().memory(request_for("qwen3_4b_instruct_2507")) == 0
    mine = CustomModel("mine", lambda scale: None, lambda request: None, scales=("full",))  # type: ignore[arg-type, return-value]
    assert TorchInt4().memory(PeerRequest(mine, LoadRequest("full"), 1, 32)) == 0
