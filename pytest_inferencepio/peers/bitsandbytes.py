"""bitsandbytes' NF4 kernels, as the optimization weight_nf4 applies them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from pytest_inferencepio.peers.contract import Peer, PeerRequest

if TYPE_CHECKING:
    from optimizations.contract import Optimization, Target
    from pytest_inferencepio.peers.support.transformers_session import TransformersSession


class Bitsandbytes(Peer):
    """NF4 in blocks of 64. Fused experts, which bitsandbytes itself leaves in bf16, are packed too, expert by expert."""

    name: ClassVar[str] = "bitsandbytes"
    summary: ClassVar[str] = (
        "transformers with bitsandbytes' NF4 layers (block 64), experts and head included"
    )
    source: ClassVar[str] = "QLoRA arXiv:2305.14314, bitsandbytes"
    requires: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    install: ClassVar[str] = "pip install bitsandbytes"
    distribution: ClassVar[str] = "bitsandbytes"

    def refusal(self, target: Target) -> str | None:
        return _technique().refusal(target)

    def memory(self, request: PeerRequest) -> int:
        from pytest_inferencepio.peers.support.transformers_session import memory_of

        return memory_of(request, converted=(_technique(),))

    def open(self, request: PeerRequest) -> TransformersSession:
        from optimizations.session import apply_all
        from pytest_inferencepio.peers.support.transformers_session import TransformersSession

        part = _technique()
        converting = (part,) if request.load.scale == "full" and part.converts_while_loading() else ()
        runner = request.model.load(dataclasses.replace(request.load, optimizations=converting)).runner
        undo = apply_all(runner, (part,))
        return TransformersSession(runner, [f"{self.name}: {self.version()}, {part.spec()}"], undo)


def _technique() -> Optimization:
    from optimizations.registry import lookup

    return lookup("weight_nf4").from_settings({})
