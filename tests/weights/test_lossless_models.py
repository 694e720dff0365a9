"""Models whose weights are in 12 bits: the same weights, the same bits under the native decoder, smaller."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimizations.errors import Refusal
from optimizations.native.lossless import pack_lossless
from optimizations.registry import parse
from optimizations.session import apply_all
from optimizations.weights.kept import packed_modules
from optimizations.weights.packed_modules import PackedEmbedding, PackedExperts, PackedLinear
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.memory import weight_bytes

SPEC = "weight_lossless"


def prompt(rows: int = 2, length: int = 24) -> torch.Tensor:
    """Random ids of ordinary text tokens, int64 [rows, length]."""
    return torch.randint(20, 1700, (rows, length), generator=torch.Generator().manual_seed(rows))


@pytest.fixture
def runner(request, new_runner):
    return new_runner(request.param, torch.bfloat16)


ALL = pytest.mark.parametrize("runner", ENTRIES, indirect=True)


@ALL
def test_all_matrices_are_packed_and_hold_the_weights_bit_for_bit(runner):
    dense = {name: value.clone() for name, value in runner.model.named_parameters(remove_duplicate=False)}
    before = weight_bytes(runner.model)
    undo = apply_all(runner, parse(SPEC))
    assert not [path for path, module in runner.model.named_modules() if type(module) is nn.Linear]
    assert isinstance(runner.model.get_input_embeddings(), PackedEmbedding)
    for path, module in packed_modules(runner.model):
        for name, value in module.dequantize().items():
            wanted = dense[f"{path.removesuffix('.table')}.{name}"]
            assert torch.equal(value.view(torch.int16), wanted.view(torch.int16)), path
    assert weight_bytes(runner.model) < 0.85 * before  # heads of 64 columns are padded to 128
    undo()
    after = dict(runner.model.named_parameters(remove_duplicate=False))
    assert after.keys() == dense.keys()
    assert all(torch.equal(after[name], value) for name, value in dense.items())


@ALL
def test_under_the_native_decoder_hidden_states_have_the_same_bits(runner):
    outputs = []
    for spec in ("native_decoder", f"{SPEC}+native_decoder"):
        undo = apply_all(runner, parse(spec))
        with torch.inference_mode():
            decoder = runner.model.get_decoder()
            first = decoder(input_ids=prompt(), use_cache=True)
            one = torch.tensor([[5], [7]])
            next_one = decoder(input_ids=one, past_key_values=first.past_key_values, use_cache=True)
            alone = decoder(input_ids=one[:1], use_cache=True)
            outputs.append([o.last_hidden_state.clone() for o in (first, next_one, alone)])
            assert decoder.forward.fallbacks == set()
        undo()
    for dense, packed in zip(*outputs, strict=True):
        assert torch.equal(dense, packed)


@ALL
def test_without_it_logits_move_by_rounding_alone(runner):
    """bf16 logits of random models; the same weights summed in another order."""
    with torch.inference_mode():
        exact = runner.model.float()(input_ids=prompt()).logits
        runner.model.bfloat16()
        stock = runner.forward(input_ids=prompt()).logits.float()
        undo = apply_all(runner, parse(SPEC))
        got = runner.forward(input_ids=prompt()).logits.float()
        undo()
    # The median of positions: rounding makes some random routers choose other experts.
    errors = [(one - exact).norm(dim=-1).median() / exact.norm(dim=-1).median() for one in (got, stock)]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("runner", ["glm_4_7_flash"], indirect=True)
def test_gradients_flow_through_the_layers(runner):
    undo = apply_all(runner, parse(SPEC))
    layer = next(m for _, m in packed_modules(runner.model) if isinstance(m, PackedLinear))
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    layer(x).square().sum().backward()
    dense = x.detach().clone().requires_grad_()
    nn.functional.linear(dense, layer.dequantize()["weight"]).square().sum().backward()
    assert x.grad.any()
    assert torch.equal(x.grad, dense.grad)
    undo()


@pytest.mark.parametrize("runner", ["glm_4_7_flash", "qwen3_4b_instruct_2507"], indirect=True)
def test_modules_compile_into_one_graph(runner):
    undo = apply_all(runner, parse(SPEC))
    embedding, head = runner.model.get_input_embeddings(), runner.model.get_output_embeddings()
    hidden = head.in_features
    calls = [(embedding, (prompt(),)), (head, (torch.randn(3, hidden).bfloat16(),))]
    experts = [m for _, m in packed_modules(runner.model) if isinstance(m, PackedExperts)][:1]
    routing = (torch.tensor([[0, 1], [1, 2], [0, 3]]), torch.rand(3, 2))
    calls += [(module, (torch.randn(3, hidden).bfloat16(), *routing)) for module in experts]
    for module, arguments in calls:
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
        with torch.inference_mode():
            assert torch.equal(compiled(*arguments), module(*arguments))
    undo()


@pytest.mark.parametrize("runner", ["qwen3_coder_30b"], indirect=True)
def test_state_dicts_carry_everything_that_is_packed(runner, new_runner):
    second = new_runner("qwen3_coder_30b", torch.bfloat16)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.mul_(1.5)
    for one in (runner, second):
        apply_all(one, parse(SPEC))
    assert not torch.equal(
        runner.forward(input_ids=prompt()).logits, second.forward(input_ids=prompt()).logits
    )
    second.model.load_state_dict(runner.model.state_dict())
    assert torch.equal(runner.forward(input_ids=prompt()).logits, second.forward(input_ids=prompt()).logits)


def scatter_exponents(weight):
    """Every exponent there is."""
    bits = torch.randint(-(2**15), 2**15, weight.shape, generator=torch.Generator().manual_seed(0))
    finite = torch.where((bits >> 7 & 255) > 130, bits & ~(0xC0 << 7), bits)
    with torch.no_grad():
        weight.copy_(finite.to(torch.int16).view(torch.bfloat16))


@pytest.mark.parametrize("runner", ["qwen3_4b_instruct_2507", "qwen3_vl_2b"], indirect=True)
def test_matrices_of_other_habits_stay_dense_with_the_reason(runner):
    decoder, [part] = runner.model.get_decoder(), parse(SPEC)
    for weight in (decoder.layers[2].mlp.up_proj.weight, decoder.embed_tokens.weight):
        scatter_exponents(weight)
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    outputs = []
    for spec in ("native_decoder", f"{SPEC}+native_decoder"):
        undo = apply_all(runner, parse(spec))
        with torch.inference_mode():
            outputs.append(decoder(input_ids=prompt(), use_cache=True).last_hidden_state.clone())
        assert decoder.forward.fallbacks == set()
        undo()
    assert torch.equal(*outputs)
    undo = apply_all(runner, [part])
    kept = [one for one in part.kept(runner.model) if "none of the sixteen" in one.reason]
    assert {one.name.rpartition("layers.")[2] for one in kept} >= {"2.mlp.up_proj.weight"}
    assert runner.forward(input_ids=prompt()).logits.shape == (2, 24, 1792)
    undo()
    after = runner.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].view(-1), value.view(-1)) for name, value in before.items())


@pytest.mark.parametrize("runner", ["qwen3_coder_30b"], indirect=True)
def test_experts_of_other_habits_are_refused_and_left_whole(runner):
    logits = runner.forward(input_ids=prompt()).logits
    experts = runner.model.model.layers[1].mlp.experts.down_proj
    kept = experts.detach().clone()
    scatter_exponents(experts)
    with pytest.raises(
        Refusal,
        match=r"^weight_lossless: model.layers.1.mlp.experts: expert 0 of down_proj: .*none of the sixteen",
    ):
        apply_all(runner, parse(SPEC))
    with torch.no_grad():
        experts.copy_(kept)
    assert torch.equal(runner.forward(input_ids=prompt()).logits, logits)


@pytest.mark.parametrize("runner", ["qwen3_4b_instruct_2507"], indirect=True)
def test_float32_matrices_are_refused(runner):
    with pytest.raises(
        Refusal, match="12 bits hold bfloat16 weights without loss; this matrix is torch.float32"
    ):
        part = parse(SPEC)[0]
        fmt = part.weight_format()
        fmt.encode(torch.zeros(8, 8), {})


def test_the_packed_size_is_what_the_shapes_say():
    packed = pack_lossless(torch.zeros(16, 128, dtype=torch.bfloat16))
    assert packed.data.shape == (16, 192)


@pytest.mark.parametrize("runner", ["qwen3_4b_instruct_2507", "qwen3_coder_30b"], indirect=True)
def test_a_model_made_float32_afterwards_is_refused_by_the_native_decoder(runner):
    apply_all(runner, parse(SPEC))
    runner.model.float()
    with pytest.raises(
        Refusal, match="holds bfloat16 weights in 12 bits, which multiply bfloat16 and not torch.float32"
    ):
        apply_all(runner, parse("native_decoder"))
