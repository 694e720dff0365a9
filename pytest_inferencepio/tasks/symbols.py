"""The tokens that tasks are written in; the tokenizer gives each of them one id.

Symbols never occur in text, so a key, a value or a string to copy is one token a piece and is never met
by accident in the filler around it: a wrong answer is the model's error, not the task's ambiguity.
"""

from __future__ import annotations

END = "<|endoftext|>"
RECALL = "<|recall|>"
COPY = "<|copy|>"
CALCULATE = "<|calculate|>"
LOOK = "<|look|>"
CONTROL_TOKENS = (
    END,
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    RECALL,
    COPY,
    CALCULATE,
    LOOK,
)
SYMBOLS = tuple(f"<sym{index:03d}>" for index in range(128))
