"""A model, its processor and how they are driven: what optimizations change and measurements drive."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from optimizations.serving import Server, StaticBatchServer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimizations.contract import Optimization


@dataclasses.dataclass
class Runner:
    """Everything a technique may change.

    `generate_kwargs` are defaults merged under the caller's arguments of `generate`. `server` drives request
    loads. `applied` lists the techniques in force, in order.
    """

    model: PreTrainedModel
    processor: Any
    generate_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    server: Server | None = None
    applied: list[Optimization] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.server is None:
            self.server = StaticBatchServer(self)

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    @torch.inference_mode()
    def forward(self, **inputs: Any) -> Any:
        """One forward pass of the model, no gradients."""
        return self.model(**inputs)

    @torch.inference_mode()
    def generate(self, **inputs: Any) -> torch.Tensor:
        """`model.generate` with this runner's settings under the caller's; token ids [B, prompt + new]."""
        return self.model.generate(**{**self.generate_kwargs, **inputs})

    def timed_generate(self, max_new_tokens: int, **inputs: Any) -> tuple[torch.Tensor, list[float]]:
        """Greedy generation of exactly `max_new_tokens`, with the moment each step's token became available.

        Returns:
            Token ids [B, prompt + new] and the step times in seconds on the performance counter. Steps that
            yield several tokens at once (speculative decoding) repeat the moment per token.
        """
        recorder = StepRecorder()
        ids = self.generate(
            **{"do_sample": False, **inputs},
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            streamer=recorder,
        )
        return ids, recorder.moments

    def timed_batch(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[list[list[int]], list[float]]:
        """Greedy generation for several prompts, padded left; new tokens per prompt and step moments."""
        inputs = self.pad_left(prompts)
        recorder = StepRecorder(inputs["input_ids"].shape[1])
        ids = self.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            stopping_criteria=[recorder],
        )
        return ids[:, inputs["input_ids"].shape[1] :].tolist(), recorder.moments

    def pad_left(self, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, both int64 [B, longest prompt], padded on the left."""
        width = max(len(prompt) for prompt in prompts)
        pad = self.pad_token_id()
        ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)


class StepRecorder:
    """Notes when tokens become available, as a streamer (batch 1) or as a stopping criterion (batches)."""

    def __init__(self, prompt_length: int = 0) -> None:
        self.moments: list[float] = []
        self._prompt_seen = False
        self._length = prompt_length

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate() streams the prompt first
            self._prompt_seen = True
            return
        self.moments.extend([time.perf_counter()] * value.numel())

    def end(self) -> None:
        """Part of the streamer protocol; nothing is buffered."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids.shape[1] - self._length
        self._length = input_ids.shape[1]
        self.moments.extend([time.perf_counter()] * new)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
