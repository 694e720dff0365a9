"""fused_ops on all four families: same logits and tokens, exact gradients, exact undo, every module covered."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from optimizations.compute.fused_ops import REPLACEMENTS, FusedOps
from optimizations.contract import Target
from optimizations.errors import Refusal
from optimizations.runner import Runner
from optimizations.session import apply_all, optimize
from pytest_inferencepio.catalog.tiny import tiny_config

FAMILIES = ["qwen3_4b_instruct_2507", "qwen3_coder_30b", "glm_4_7_flash", "qwen3_vl_2b"]
_made: dict[tuple[str, torch.dtype], Runner] = {}


def build(name: str, dtype: torch.dtype = torch.float32) -> Runner:
    """A random model whose norms differ per channel and whose logits are far from flat."""
    torch.manual_seed(3)
    factory: Any = AutoModelForImageTextToText if "vl" in name else AutoModelForCausalLM
    model = factory.from_config(tiny_config(name)).to(dtype).eval()
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.weight.data.uniform_(0.5, 1.5)
    model.get_decoder().norm.weight.data.mul_(4)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return Runner(model, None)


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Runner:
    """One model per family and dtype."""
    if (name, dtype) not in _made:
        _made[name, dtype] = build(name, dtype)
    return _made[name, dtype]


def padded_prompts() -> dict[str, Tensor]:
    ids = torch.randint(8, 1792, (3, 19), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :6], mask[0, :6] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def image_prompt() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(8, 1792, (12,), generator=generator).tolist()
    ids = torch.tensor([[*words[:5], 3, *[5] * 16, 4, *words[5:]]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(64, 3 * 2 * 8 * 8, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == 5).int(),
    }


def logits(runner: Runner, inputs: dict[str, Tensor]) -> Tensor:
    return runner.forward(**inputs).logits[inputs["attention_mask"].bool()].float()


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_logits_are_those_of_transformers(name: str) -> None:
    runner, inputs = tiny(name), padded_prompts()
    wanted = logits(runner, inputs)
    with optimize(runner, "fused_ops"):
        got = logits(runner, inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_logits_hardly_move(name: str) -> None:
    """The budget is mean KL 2e-3 nats; same roundings at the same places stay a thousandfold below it."""
    runner, inputs = tiny(name, torch.bfloat16), padded_prompts()
    wanted = logits(runner, inputs).log_softmax(-1)
    with optimize(runner, "fused_ops"):
        got = logits(runner, inputs).log_softmax(-1)
    divergence = (wanted.exp() * (wanted - got)).sum(-1).mean().item()
    assert divergence < FusedOps.budget.max_kl_divergence / 10
    assert (got.argmax(-1) == wanted.argmax(-1)).float().mean() >= FusedOps.budget.min_top1_agreement


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_is_token_identical_batched_and_padded(name: str) -> None:
    runner = tiny(name)
    wanted = runner.generate(**padded_prompts(), max_new_tokens=12, do_sample=False)
    with optimize(runner, "fused_ops"):
        got = runner.generate(**padded_prompts(), max_new_tokens=12, do_sample=False)
    assert torch.equal(got, wanted)


def test_images_and_their_positions_pass_through() -> None:
    runner, inputs = tiny("qwen3_vl_2b"), image_prompt()
    wanted, tokens = logits(runner, inputs), runner.generate(**inputs, max_new_tokens=8, do_sample=False)
    with optimize(runner, "fused_ops"):
        torch.testing.assert_close(
            logits(runner, inputs), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item()
        )
        assert torch.equal(runner.generate(**inputs, max_new_tokens=8, do_sample=False), tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_exactly_those_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    """With gradients enabled the modules take their own path.

    On one thread: with two, transformers' expert loop adds up its gradients in an order that varies.
    """
    runner, inputs = tiny(name), padded_prompts()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))

    def gradients() -> list[Tensor | None]:
        runner.model.zero_grad()
        runner.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [p.grad for p in runner.model.parameters()]

    wanted = gradients()
    with optimize(runner, "fused_ops"):
        got = gradients()
    runner.model.zero_grad()
    assert any(g is not None for g in wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_undo_leaves_nothing_behind(name: str) -> None:
    runner = tiny(name)
    before = {module: dict(module.__dict__) for module in runner.model.modules()}
    undo = apply_all(runner, [FusedOps()])
    replaced = [module for module in runner.model.modules() if "forward" in module.__dict__]
    undo()
    assert len(replaced) > 4 * runner.text_config.num_hidden_layers
    for module, attributes in before.items():
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[key] is value for key, value in attributes.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_small_module_of_the_text_model_is_covered(name: str) -> None:
    """Norms, attention, layers and dense feed-forwards; a renamed class must not be left out silently."""
    kinds = {type(module).__name__ for module in tiny(name).model.get_decoder().modules()}
    small = {kind for kind in kinds if kind.endswith(("RMSNorm", "Attention", "DecoderLayer", "MLP"))}
    assert small <= set(REPLACEMENTS)
    assert len(small) >= 3


class Operations(TorchDispatchMode):
    """Counts the torch operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_far_fewer_operations_run(name: str) -> None:
    runner, inputs = tiny(name), padded_prompts()

    def operations() -> int:
        with Operations() as seen, torch.no_grad():
            runner.model(**inputs)
        return sum(seen.count.values())

    before = operations()
    with optimize(runner, "fused_ops"):
        after = operations()
    layers = runner.text_config.num_hidden_layers
    assert before - after > 30 * layers


class Opaque(nn.Module):
    """A linear layer that can only be called, as packed ones."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.hidden = [linear]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x)


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_layers_are_called_and_never_read(name: str) -> None:
    runner, inputs = tiny(name), padded_prompts()
    wanted = logits(runner, inputs)
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for layer in runner.model.get_decoder().layers:
        for parent in layer.modules():
            swapped += [
                (parent, key, child) for key, child in parent.named_children() if type(child) is nn.Linear
            ]
    try:
        for parent, key, child in swapped:
            setattr(parent, key, Opaque(child))  # type: ignore[arg-type]
        with optimize(runner, "fused_ops"):
            got = logits(runner, inputs)
    finally:
        for parent, key, child in swapped:
            setattr(parent, key, child)
    assert len(swapped) >= 4 * runner.text_config.num_hidden_layers
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_eager_attention_maps_are_still_recorded(name: str) -> None:
    runner, inputs = tiny(name), padded_prompts()
    config = runner.text_config
    before = config._attn_implementation_internal
    config._attn_implementation_internal = "eager"
    wanted_outputs = {"output_hidden_states": True, "output_attentions": True}
    try:
        wanted = runner.forward(**inputs, **wanted_outputs)
        with optimize(runner, "fused_ops"):
            got = runner.forward(**inputs, **wanted_outputs)
    finally:
        config._attn_implementation_internal = before
    assert len(got.hidden_states) == len(wanted.hidden_states) == config.num_hidden_layers + 1
    real = inputs["attention_mask"].bool()
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-3, atol=1e-3)
    for a, b in zip(got.attentions, wanted.attentions, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_compiles_into_one_graph(name: str) -> None:
    """torch.compile sees the kernels as operators: no graph break in a layer.

    A fresh model, because the hooks that transformers installs for output_attentions do break graphs, and stay.
    """
    runner = build(name)
    layer = runner.model.get_decoder().layers[0]
    hidden = torch.randn(1, 6, runner.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = (
        torch.arange(6).expand(3 if "vl" in name else 1, 1, 6) if "vl" in name else torch.arange(6)[None]
    )
    angles = runner.model.get_decoder().rotary_emb(hidden, positions)
    with optimize(runner, "fused_ops"), torch.no_grad():
        wanted = layer(hidden, position_embeddings=angles, attention_mask=None)
        compiled = torch.compile(layer.forward, backend="eager", fullgraph=True)
        got = compiled(hidden, position_embeddings=angles, attention_mask=None)
    torch._dynamo.reset()
    torch.testing.assert_close(got, wanted)


def test_two_at_once_are_refused_and_leave_nothing_half_done() -> None:
    runner = tiny(FAMILIES[0])
    undo = FusedOps().apply(runner)
    try:
        with pytest.raises(Refusal, match="forward of .* has already been replaced by something else"):
            FusedOps().apply(runner)
        assert all(
            "forward" not in m.__dict__ or type(m).__name__ in REPLACEMENTS for m in runner.model.modules()
        )
    finally:
        undo()
    assert not any("forward" in module.__dict__ for module in runner.model.modules())


def test_a_late_failure_undoes_what_was_done() -> None:
    runner = tiny(FAMILIES[0])
    last = runner.model.get_decoder().norm
    last.__dict__["forward"] = last.forward
    try:
        with pytest.raises(Refusal, match=r"model\.norm"):
            FusedOps().apply(runner)
        assert [m for m in runner.model.modules() if "forward" in m.__dict__] == [last]
    finally:
        del last.__dict__["forward"]


def test_refusals_name_the_reason() -> None:
    config = tiny_config(FAMILIES[0])
    part = FusedOps()
    assert part.refusal(Target(config)) is None
    assert "use torch_compile there" in str(part.refusal(Target(config, device="cuda")))
    assert "the model is in float16" in str(part.refusal(Target(config, dtype="float16")))
    config.hidden_act = "gelu"
    assert part.refusal(Target(config)) == "its activation is gelu, SwiGLU needs silu"
    config.model_type = "llama"
    assert "its layers are not known; known: qwen3" in str(part.refusal(Target(config)))
