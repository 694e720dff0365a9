"""llama.cpp on a random-weight Q4_0 GGUF of the same dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pytest_inferencepio.peers.contract import Peer, PeerRequest

if TYPE_CHECKING:
    from optimizations.contract import Target
    from pytest_inferencepio.machine import Work
    from pytest_inferencepio.measure.latency import Generation

WORKER = "pytest_inferencepio.peers.support.llama_worker"
# GCC 12 built an AMX path that faults: it loads the tile configuration before all of it is stored.
ADVICE = "its build and this processor do not fit: rebuild it, for AMX with another compiler than GCC 12"
WORKING_MEMORY = 1 << 29  # of the library, its cache and its buffers


class LlamaCpp(Peer):
    """llama.cpp through llama-cpp-python's low-level calls, in a process of its own.

    Speed does not depend on the values of weights, so they are random and no checkpoint is needed. Greedy decoding
    token by token with the logits of the last one, as `generate()` does it. Qwen3 and Qwen3-MoE; the reasons why not
    the others are in `support.gguf_plan`.
    """

    name: ClassVar[str] = "llama_cpp"
    summary: ClassVar[str] = "llama.cpp, Q4_0 weights repacked for the CPU, random values, in its own process"
    source: ClassVar[str] = "github.com/ggml-org/llama.cpp through llama-cpp-python"
    requires: ClassVar[tuple[str, ...]] = ("llama_cpp", "gguf")
    install: ClassVar[str] = (
        "CMAKE_ARGS=-DGGML_NATIVE=ON pip install 'pytest-inferencepio[peers]' (builds llama.cpp, some minutes)"
    )
    distribution: ClassVar[str] = "llama-cpp-python"

    def refusal(self, target: Target) -> str | None:
        from pytest_inferencepio.peers.support import gguf_plan

        if target.device != "cpu":
            return f"it is measured on CPUs here, not on {target.device}"
        return gguf_plan.refusal(target.config)

    def memory(self, request: PeerRequest) -> int:
        from pytest_inferencepio.peers.support import gguf_plan

        return gguf_plan.plan(request.model.config(request.load.scale)).nbytes + WORKING_MEMORY

    def open(self, request: PeerRequest) -> LlamaSession:
        from pytest_inferencepio.peers.support import gguf_file, gguf_plan

        plan = gguf_plan.plan(request.model.config(request.load.scale))
        path = gguf_file.file_of(plan)
        told = f"{self.name}: {self.version()}, {plan.architecture}, Q4_0 of {plan.nbytes / 1e9:.3g} GB"
        return LlamaSession(str(path), request, plan.work(), told)


class LlamaSession:
    """A worker with the file loaded."""

    def __init__(self, path: str, request: PeerRequest, work: Work, told: str) -> None:
        from pytest_inferencepio.peers.support.worker import Worker

        self.work = work
        self._worker = Worker(WORKER, "llama.cpp", ADVICE)
        try:
            loaded = {"path": path, "threads": request.threads, "context": request.context}
            info = self._worker.ask(loaded)["info"]
        except BaseException:
            self._worker.close()
            raise
        self.notes: tuple[str, ...] = (f"{told}; {info}",)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Generation:
        """Timed inside the worker: what passes between the processes does not count."""
        from pytest_inferencepio.measure.latency import Generation

        reply = self._worker.ask({"prompt": [int(token) for token in prompt], "new_tokens": new_tokens})
        return Generation(len(prompt), reply["first"], tuple(reply["gaps"]), reply["total"])

    def close(self) -> None:
        self._worker.close()
