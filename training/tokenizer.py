"""Trains the shared byte-level BPE tokenizer: `python -m training.tokenizer DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pytest_inferencepio.tasks.symbols import CONTROL_TOKENS, END, SYMBOLS
from pytest_inferencepio.tasks.text import read_corpus

VOCABULARY = 1792
# Digits singly, words with one leading space, runs of spaces as one piece (indentation).
SPLIT = r" ?[A-Za-z_]+|\d| ?[^\sA-Za-z_\d]+|\r?\n+| +(?= )|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'text' %}{{ part['text'] }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE over `texts` with the control tokens first and the task symbols next."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    symbols = [AddedToken(token, special=False, normalized=False) for token in SYMBOLS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials + symbols,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens(symbols)
    return tokenizer


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The transformers face of it: end of text ends, pads and starts; small ChatML-like template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main(directory: str) -> None:
    """Trains on the training files of the running interpreter's library and saves to `directory`."""
    corpus = read_corpus()
    fast = wrap(train_tokenizer([source for _, source in corpus.train]))
    if len(fast) != VOCABULARY:
        raise ValueError(
            f"The tokenizer has {len(fast)} tokens instead of {VOCABULARY}; the corpus is too small."
        )
    fast.save_pretrained(Path(directory))


if __name__ == "__main__":
    main(sys.argv[1])
