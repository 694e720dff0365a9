"""Finding peers, choosing them by name, and what each says about itself."""

from __future__ import annotations

import pytest

from optimizations.contract import Target
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.tiny import tiny_config
from pytest_inferencepio.errors import UnknownName
from pytest_inferencepio.peers import registry
from pytest_inferencepio.peers.contract import Peer
from pytest_inferencepio.peers.torch_int4 import TorchInt4

NAMES = ("bitsandbytes", "llama_cpp", "torch_int4")


def test_the_shipped_peers_are_found() -> None:
    assert set(NAMES) <= set(registry.peers())


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([], ()),
        (["torch_int4", "llama_cpp"], ("llama_cpp", "torch_int4")),
        (["torch_int4"] * 2, ("torch_int4",)),
    ],
)
def test_names_are_chosen_once_in_order(wanted: list[str], found: tuple[str, ...]) -> None:
    assert registry.choose(wanted) == found


def test_all_are_all() -> None:
    assert registry.choose(["all"]) == tuple(registry.peers())


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(UnknownName, match="unknown peer 'lama_cpp'; did you mean llama_cpp"):
        registry.choose(["lama_cpp"])


def test_a_name_is_taken_once() -> None:
    class Other(TorchInt4):
        pass

    assert registry.register(TorchInt4) is TorchInt4
    with pytest.raises(ValueError, match="two peers are named 'torch_int4'"):
        registry.register(Other)


def test_what_is_registered_can_be_forgotten() -> None:
    class Mine(TorchInt4):
        name = "mine"

    registry.register(Mine)
    assert "mine" in registry.peers()
    registry.unregister("mine")
    assert "mine" not in registry.peers()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_module_is_said_with_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = registry.peers()[name]
    monkeypatch.setattr(type(peer), "requires", ("torch", "no_such_module"))
    reason = peer.missing()
    assert reason is not None
    assert reason.startswith(f"{name} is not installed here (no_such_module not found): ")
    assert "pip install" in reason


def test_an_installed_peer_tells_its_version() -> None:
    import torch

    assert TorchInt4().missing() is None
    assert TorchInt4().version() == f"torch {torch.__version__}"


def refusals(peer: Peer, device: str = "cpu") -> dict[str, str | None]:
    return {name: peer.refusal(Target(tiny_config(name), device)) for name in ENTRIES}


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("llama_cpp", {"glm_4_7_flash", "qwen3_vl_2b"}),
        ("torch_int4", {"glm_4_7_flash", "qwen3_coder_30b"}),
        ("bitsandbytes", set()),
    ],
)
def test_which_models_a_peer_refuses(name: str, refused: set[str]) -> None:
    told = refusals(registry.peers()[name])
    assert {model for model, reason in told.items() if reason} == refused


def test_experts_are_refused_in_words() -> None:
    assert "the routed experts are fused 3-D tensors" in (refusals(TorchInt4())["qwen3_coder_30b"] or "")


@pytest.mark.parametrize("name", ["llama_cpp", "torch_int4"])
def test_a_gpu_is_refused_in_words(name: str) -> None:
    told = refusals(registry.peers()[name], device="cuda")
    assert all(
        "not on cuda" in (reason or "") or "not for cuda" in (reason or "") for reason in told.values()
    )
