"""First stage of the vision model: the tower learns to say what each visual token shows, in the text tower's words.

`python -m training.see --dense STATE --steps N`. Every visual token that a shape covers is trained towards the
sum of the embeddings of its shape, colour, row and column words, so that the language stage that follows only has
to learn to read. 64 targets an image and no decoder: an order of magnitude cheaper than learning it from answers.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from pytest_inferencepio.tasks.drawing import (
    COLOURS,
    COLUMNS,
    PIXELS_PER_TOKEN,
    ROWS,
    SHAPES,
    SIDE,
    Thing,
    draw_owned,
    draw_things,
    encode,
)
from training.grow import grow_vision
from training.models import new_model
from training.optim import make_optimizers
from training.save import TOKENIZER, image_processor
from training.schedule import Plan, log

WORDS = (SHAPES, tuple(COLOURS), ROWS, COLUMNS)
LEAST_PIXELS = 20  # of the 256 of a visual token


def labels_of(thing: Thing) -> tuple[int, int, int, int]:
    """Indices of the thing's words in WORDS."""
    return SHAPES.index(thing.shape), list(COLOURS).index(thing.colour), thing.cell // 3, thing.cell % 3


def token_labels(things: list[Thing], owner: np.ndarray) -> np.ndarray:
    """int64 (64, 4): word indices of the thing that covers most of each visual token, -1 where none does."""
    side = SIDE // PIXELS_PER_TOKEN
    blocks = (
        owner.reshape(side, PIXELS_PER_TOKEN, side, PIXELS_PER_TOKEN).swapaxes(1, 2).reshape(side * side, -1)
    )
    counts = np.stack([(blocks == index).sum(1) for index in range(len(things))], 1)
    table = np.array([labels_of(thing) for thing in things])
    return np.where(counts.max(1, keepdims=True) >= LEAST_PIXELS, table[counts.argmax(1)], -1)


class Words:
    """Word embeddings as the text tower has them, centred within each kind."""

    def __init__(self, embedding: Tensor, tokenizer: Any) -> None:
        """Means over each word's tokens (with and without a leading space)."""
        self.ground = embedding.mean(0)
        self.kinds = []
        for words in WORDS:
            means = torch.stack([self._word(embedding, tokenizer, word) for word in words])
            self.kinds.append(means - means.mean(0))

    def _word(self, embedding: Tensor, tokenizer: Any, word: str) -> Tensor:
        return torch.stack([embedding[encode(tokenizer, text)].mean(0) for text in (word, f" {word}")]).mean(
            0
        )

    def target(self, labels: Tensor) -> Tensor:
        """(tokens, hidden): what a visual token should be."""
        seen = (labels[:, :1] >= 0).float()
        parts = [kind[labels[:, index].clamp(min=0)] for index, kind in enumerate(self.kinds)]
        return self.ground + seen * torch.stack(parts).sum(0)

    def loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
        """Squared error to the target plus classification among the words; accuracy per kind."""
        total = 2.0 * (features - self.target(labels)).square().sum(-1).mean()
        seen = labels[:, 0] >= 0
        right = []
        for index, kind in enumerate(self.kinds):
            logits = (features[seen] - self.ground) @ kind.T * (5 / kind.square().sum(-1).mean())
            total = total + nn.functional.cross_entropy(logits, labels[seen, index])
            right.append(round((logits.argmax(-1) == labels[seen, index]).float().mean().item(), 3))
        return total, right


def scene_batch(seed: int, step: int, n_images: int, processor: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Processor outputs and labels (64 n, 4) of drawings with 2 to 9 shapes."""
    rng = random.Random(seed * 3_000_017 + step)
    images, labels = [], []
    for _ in range(n_images):
        things = draw_things(rng, 9)
        image, owner = draw_owned(things, rng)
        images.append(image)
        labels.append(token_labels(things, owner))
    return dict(processor(images=images, return_tensors="pt")), torch.from_numpy(np.concatenate(labels))


def main() -> None:
    """Trains the tower and leaves the model for the language stage; resumes every hundred steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--work", type=Path, default=Path(".cache/training"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(arguments.steps, arguments.steps // 3, arguments.lr)
    model, dense = new_model("qwen3_vl_2b", plan.seed), new_model("qwen3_4b_instruct_2507", plan.seed)
    dense.load_state_dict(torch.load(arguments.dense, weights_only=True)["model"])
    grow_vision(model, dense)
    path = arguments.work / "vision_tower.pt"
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.model.visual.load_state_dict(saved["visual"])
        first = saved["step"]
    words = Words(dense.model.embed_tokens.weight.detach(), AutoTokenizer.from_pretrained(TOKENIZER))
    optimizers, processor = make_optimizers(model.model.visual, plan.lr), image_processor()
    for step in tqdm(range(first, plan.steps), desc="see", mininterval=10):
        inputs, labels = scene_batch(plan.seed, step, arguments.images, processor)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        loss, right = words.loss(features.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.visual.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 19:
            log("vision_tower", step=step + 1, loss=round(loss.item(), 4), shape_colour_row_column=right)
        if (step + 1) % 100 == 0 or step + 1 == plan.steps:
            torch.save({"visual": model.model.visual.state_dict(), "step": step + 1}, path)


if __name__ == "__main__":
    main()
