"""torch's own int4 kernel for CPUs in the place of every linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pytest_inferencepio.peers.contract import Peer, PeerRequest

if TYPE_CHECKING:
    from optimizations.contract import Target
    from pytest_inferencepio.peers.support.transformers_session import TransformersSession


class TorchInt4(Peer):
    """`aten._weight_int4pack_mm_for_cpu` in groups of 32, what torchao's int4 weight-only quantization calls on CPUs."""

    name: ClassVar[str] = "torch_int4"
    summary: ClassVar[str] = (
        "transformers with torch's int4 CPU kernel (group 32) in every linear layer and the head"
    )
    source: ClassVar[str] = "torch: aten._weight_int4pack_mm_for_cpu"
    requires: ClassVar[tuple[str, ...]] = ("torch",)
    install: ClassVar[str] = "pip install torch"
    distribution: ClassVar[str] = "torch"

    def refusal(self, target: Target) -> str | None:
        if target.device != "cpu":
            return f"its kernel is for CPUs, not for {target.device}"
        config = target.config.get_text_config(decoder=True)
        if any(getattr(config, name, None) for name in ("num_experts", "n_routed_experts")):
            return (
                "torch's int4 kernel multiplies by one matrix, and the routed experts are fused 3-D tensors; most of "
                "the model would stay unquantized"
            )
        return None

    def memory(self, request: PeerRequest) -> int:
        from pytest_inferencepio.peers.support.transformers_session import memory_of

        return memory_of(request)

    def open(self, request: PeerRequest) -> TransformersSession:
        from pytest_inferencepio.peers.support import int4_linear
        from pytest_inferencepio.peers.support.transformers_session import TransformersSession

        runner = request.model.load(request.load).runner
        kept = int4_linear.replace_linears(runner.model)
        told = f"{self.name}: {self.version()}, groups of {int4_linear.GROUP}"
        if kept:
            told += f"; {len(kept)} layers kept, whose sizes the kernel does not take: {', '.join(kept[:4])}"
        return TransformersSession(runner, [told])
