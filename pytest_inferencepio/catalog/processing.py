"""The vision model's processor where torchvision is missing.

`AutoProcessor` refuses Qwen3-VL without torchvision although only its video processor needs it (transformers
5.23). `image_text_processor` builds the same `Qwen3VLProcessor` from the PIL image processor and the
tokenizer; with videos it fails the way a processor without a video processor does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor


class ImageTextProcessor(Qwen3VLProcessor):
    """Qwen3VLProcessor for images and text alone."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts this processor consists of: no video processor."""
        return ["image_processor", "tokenizer"]

    def __init__(
        self, image_processor: Qwen2VLImageProcessorPil, tokenizer: Any, chat_template: str | None = None
    ):
        """Sets the visual token ids from the tokenizer, as the parent does, and leaves videos out."""
        for token in ("image", "video"):
            self._set_token(tokenizer, token, f"<|{token}_pad|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self._set_token(tokenizer, "vision_start", "<|vision_start|>")
        self._set_token(tokenizer, "vision_end", "<|vision_end|>")

    def _set_token(self, tokenizer: Any, name: str, default: str) -> None:
        token = getattr(tokenizer, f"{name}_token", default)
        setattr(self, f"{name}_token", token)
        setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))


def image_text_processor(directory: str | Path) -> ImageTextProcessor:
    """Loads image processor (PIL), tokenizer and chat template of a Qwen3-VL directory; needs no torchvision."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    images = Qwen2VLImageProcessorPil.from_pretrained(directory)
    return ImageTextProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
