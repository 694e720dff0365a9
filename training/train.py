"""Trains one tiny model, resumably: `python -m training.train NAME --steps N`.

Everything is a function of the seed and the step: rows, initialisation, schedule (warm-up, constant, linear
decay over the last third; Hu et al. 2024). A checkpoint is written every minute and picked up on restart.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from pytest_inferencepio.tasks.text import read_corpus
from training.attention import use_training_attention
from training.experts import Balance
from training.grow import grow_coder, grow_glm, grow_vision
from training.models import new_model
from training.optim import make_optimizers
from training.rows import RowMaker
from training.save import TOKENIZER
from training.schedule import Plan, log
from training.soft_targets import SoftTargets
from training.validate import validate
from training.vision import ImageRowMaker, image_hidden

SAVE_SECONDS = 60


def body_of(model: nn.Module) -> nn.Module:
    """The decoder without its head (the text tower of the vision model)."""
    return getattr(model.model, "language_model", model.model)


def weighted_loss(
    model: nn.Module,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    soft: SoftTargets | None = None,
    share: float = 0.0,
) -> Tensor:
    """Cross-entropy of the next token, averaged with the weights of the tokens predicted.

    Of text tokens (weight 1), `share` of the target is the trigram's distribution.
    """
    wanted = weights[:, 1:] > 0
    logits = model.get_output_embeddings()(hidden[:, :-1][wanted]).float()
    losses = nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
    weight = weights[:, 1:][wanted]
    if soft is not None and share > 0:
        before = torch.cat([ids[:, :1], ids[:, :-2]], 1)[wanted]
        text = weight == 1
        target = soft(before[text], ids[:, :-1][wanted][text])
        soft_losses = -(target * logits[text].log_softmax(-1)).sum(-1)
        losses = losses.index_put((text,), torch.lerp(losses[text], soft_losses, share))
    return (losses * weight).sum() / weight.sum()


def text_loss(
    model: nn.Module, ids: Tensor, weights: Tensor, soft: SoftTargets | None = None, share: float = 0.0
) -> Tensor:
    """Loss of one batch of rows."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        return weighted_loss(model, hidden, ids, weights, soft, share)


def speed_up(model: nn.Module, eager: bool) -> None:
    """CPU training attention, and each decoder layer compiled (1.5 s to 1.1 s a step on one Zen 4 core)."""
    use_training_attention(model)
    if eager:
        return
    torch._dynamo.config.cache_size_limit = 64
    for layer in body_of(model).layers:
        layer.compile(dynamic=False)


def replan(plan: Plan, path: Path) -> Plan:
    """The plan with what a `NAME.plan.json` in the work directory says of it: ends a run without restarting it."""
    return replace(plan, **json.loads(path.read_text())) if path.exists() else plan


class Trainer:
    """Model, optimizers and step, saved and restored together."""

    def __init__(self, name: str, model: nn.Module, plan: Plan, work: Path) -> None:
        """`work` holds the resumable state; it is not shipped."""
        self.name, self.model, self.plan = name, model, plan
        self.optimizers = make_optimizers(model, plan.lr)
        self.path = work / f"{name}.pt"
        self.balance = Balance(model)
        self.step = self.tokens = 0
        if self.path.exists():
            self.restore()

    def restore(self) -> None:
        """Continues where the last save was."""
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens = state["step"], state["tokens"]

    def save(self) -> None:
        """Writes atomically: a killed run never leaves half a file."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def update(self, loss: Tensor) -> float:
        """Backward, clipping at norm 1, one optimizer step at the planned rate."""
        (loss + self.balance.loss()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.rate(self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.load = self.balance.after_step()
        return float(norm)


def step_loss(
    trainer: Trainer, rows: RowMaker, images: ImageRowMaker | None, step: int
) -> tuple[Tensor, int]:
    """Loss of the step's text rows, plus that of its drawings for the vision model; and the token count."""
    ids, weights = rows.batch(step, trainer.plan.tokens)
    share = trainer.plan.soft * trainer.plan.rate(step) / trainer.plan.lr
    loss = text_loss(trainer.model, ids, weights, rows.soft, share)
    if images is None:
        return loss, ids.numel()
    batch = images.batch(step, trainer.plan.images)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = image_hidden(trainer.model, batch)
        seen = weighted_loss(trainer.model, hidden, batch["input_ids"], batch["weights"])
    return loss + seen, ids.numel() + batch["input_ids"].numel()


def starting_point(arguments: argparse.Namespace, rows: RowMaker) -> nn.Module:
    """A constructed model, grown from the dense one's state where one is given."""
    model = new_model(arguments.name, arguments.seed)
    if arguments.dense is None:
        return model
    dense = new_model("qwen3_4b_instruct_2507", arguments.seed)
    dense.load_state_dict(torch.load(arguments.dense, weights_only=True)["model"])
    if arguments.name == "qwen3_vl_2b":
        grow_vision(model, dense)
        tower = arguments.work / "vision_tower.pt"  # written by training.see
        model.model.visual.load_state_dict(torch.load(tower, weights_only=True)["visual"])
    else:
        grow = {"qwen3_coder_30b": grow_coder, "glm_4_7_flash": grow_glm}[arguments.name]
        grow(model, dense, rows.sample(4096), arguments.seed)
    return model


def run(
    trainer: Trainer, rows: RowMaker, images: ImageRowMaker | None, tokenizer: Any, validate_every: int
) -> None:
    """Trains to the planned step; logs every 10 steps, validates and saves in between."""
    saved, started = time.monotonic(), time.monotonic()
    tokens = 0
    for step in tqdm(range(trainer.step, trainer.plan.steps), desc=trainer.name, mininterval=10):
        plan = trainer.plan = replan(trainer.plan, trainer.path.with_suffix(".plan.json"))
        if step >= plan.steps:
            break
        loss, count = step_loss(trainer, rows, images, step)
        norm = trainer.update(loss)
        tokens += count
        trainer.tokens += count
        if step % 10 == 9:
            rate = tokens / (time.monotonic() - started)
            values = {"loss": round(loss.item(), 4), "norm": round(norm, 3), "tokens_per_second": int(rate)}
            log(trainer.name, step=step + 1, **values, **({"load": trainer.load} if trainer.load else {}))
        if (step + 1) % validate_every == 0 or step + 1 == plan.steps:
            with torch.compiler.set_stance("force_eager"):
                log(trainer.name, step=step + 1, **validate(trainer.model, tokenizer))
        if time.monotonic() - saved > SAVE_SECONDS or step + 1 == plan.steps:
            trainer.save()
            saved = time.monotonic()


def main() -> None:
    """Parses the plan, trains, leaves the state in the work directory for `training.ship`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--decay", type=int)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--dense", type=Path, help="state of the trained dense model to grow from")
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path(".cache/training"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    decay = arguments.decay if arguments.decay is not None else arguments.steps // 3
    plan = Plan(
        arguments.steps,
        decay,
        arguments.lr,
        tokens=arguments.tokens,
        seed=arguments.seed,
        images=arguments.images,
    )
    rows = RowMaker(read_corpus(), tokenizer, arguments.seed)
    model = starting_point(arguments, rows)
    images = ImageRowMaker(tokenizer, arguments.seed) if hasattr(model.config, "vision_config") else None
    trainer = Trainer(arguments.name, model, plan, arguments.work)
    speed_up(model, arguments.eager)
    run(trainer, rows, images, tokenizer, arguments.validate_every)


if __name__ == "__main__":
    main()
