"""llama.cpp in a process of its own: one JSON request per line of standard input, one reply per line.

Its own process, because a failed assertion inside ggml aborts the process it is in, and because two pools of threads
that spin in one process measure each other.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np

LEAST_CONTEXT = 256


class Engine:
    """A GGUF file loaded with `threads` threads, for contexts of up to `context` tokens.

    Raises:
        RuntimeError: llama.cpp cannot load the file or make the context.
    """

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp

        self._lc: Any = llama_cpp
        self._lc.llama_backend_init()
        parameters = self._lc.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = self._lc.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._context = self._lc.llama_init_from_model(self._model, self._settings(threads, context))
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._vocabulary = self._lc.llama_vocab_n_tokens(self._lc.llama_model_get_vocab(self._model))

    def info(self) -> str:
        """llama.cpp's own line about the instruction sets it was built for."""
        return str(self._lc.llama_print_system_info().decode()).strip()

    def generate(
        self, prompt: Sequence[int], new_tokens: int, clock: Callable[[], float] = time.perf_counter
    ) -> dict[str, Any]:
        """Greedy generation from an empty cache: seconds to the first token, gaps between the others, total."""
        self._lc.llama_memory_clear(self._lc.llama_get_memory(self._context), True)
        start = clock()
        token = self._step(prompt)
        moments = [clock()]
        for _ in range(new_tokens - 1):
            token = self._step([token])
            moments.append(clock())
        gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
        return {"first": moments[0] - start, "gaps": gaps, "total": moments[-1] - start}

    def _settings(self, threads: int, context: int) -> Any:
        settings = self._lc.llama_context_default_params()
        settings.n_ctx = settings.n_batch = max(context, LEAST_CONTEXT)
        settings.n_threads = settings.n_threads_batch = threads
        return settings

    def _step(self, tokens: Sequence[int]) -> int:
        """Pass `tokens` through the model and take the likeliest next one."""
        array = (self._lc.llama_token * len(tokens))(*tokens)
        status = self._lc.llama_decode(self._context, self._lc.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens returned {status}")
        logits = self._lc.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until the other side closes: first the file to load, then generations."""
    engine: Engine | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if engine is None:
                engine = Engine(**request)
                reply: dict[str, Any] = {"info": engine.info()}
            else:
                reply = engine.generate(**request)
        except (RuntimeError, ImportError, AttributeError, OSError, TypeError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Replies go where standard output went; what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
