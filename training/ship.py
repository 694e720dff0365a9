"""Measures a trained state and writes it as the shipped checkpoint: `python -m training.ship NAME`."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from pytest_inferencepio.catalog.tiny import reference_directory
from pytest_inferencepio.tasks.evaluate import TaskScore, evaluate_exact, tasks_for
from pytest_inferencepio.tasks.ngram import Trigram
from pytest_inferencepio.tasks.text import Corpus, heldout_tokens, read_corpus
from training.models import new_model
from training.save import TOKENIZER, image_processor, save_reference
from training.validate import perplexity

EXAMPLES, SEED, HELDOUT = 64, 0, 12 * 1024
DENSE = "qwen3_4b_instruct_2507"


def score_figures(score: TaskScore) -> dict[str, Any]:
    """A score as JSON."""
    figures = {"exact_match": score.exact_match, "correct": score.correct, "n": len(score.outcomes)}
    distances = {str(distance): list(counts) for distance, counts in score.by_distance().items()}
    return {**figures, "by_distance": distances} if distances else figures


def measure_tasks(model: nn.Module, tokenizer: Any, n: int = EXAMPLES) -> dict[str, Any]:
    """Exact match of every task through `generate`, as the suite measures it."""
    image_token = getattr(model.config, "image_token_id", None)
    scores = evaluate_exact(
        model.generate,
        tokenizer,
        tasks_for(model.config),
        n,
        SEED,
        image_processor=image_processor(),
        image_token_id=image_token,
    )
    return {name: score_figures(score) for name, score in scores.items()}


def trigram_perplexity(corpus: Corpus, tokenizer: Any) -> float:
    """Of the shipped excerpt, for a trigram counted on all training text."""
    pieces = tokenizer([source for _, source in corpus.train], add_special_tokens=False)["input_ids"]
    tokens = [token for piece in pieces for token in [tokenizer.eos_token_id, *piece]]
    return Trigram(tokens, len(tokenizer)).perplexity(heldout_tokens(tokenizer, HELDOUT))


def figures_of(model: nn.Module, tokenizer: Any, origin: dict[str, Any]) -> dict[str, Any]:
    """Everything that is stored beside a checkpoint, measured on its bf16 weights in bf16."""
    corpus = read_corpus()
    with torch.no_grad():
        text = perplexity(model, tokenizer, HELDOUT // 1024, 1024)
    heldout = {
        "tokens": HELDOUT,
        "perplexity": text,
        "trigram_perplexity": trigram_perplexity(corpus, tokenizer),
    }
    source = {"corpus_sha256": corpus.digest, "python": platform.python_version(), "torch": torch.__version__}
    tasks = measure_tasks(model, tokenizer)
    return {**origin, **source, "dtype": "bfloat16", "heldout": heldout, "tasks": tasks}


def main() -> None:
    """Ships the state in the work directory, or the one named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--work", type=Path, default=Path(".cache/training"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    state = torch.load(arguments.work / f"{arguments.name}.pt", weights_only=True)
    model = new_model(arguments.name, seed=1)
    model.load_state_dict(state["model"])
    model = model.to(torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    grown = {} if arguments.name == DENSE else {"grown_from": DENSE}
    origin = {
        "model": arguments.name,
        **grown,
        "trained_steps": state["step"],
        "trained_tokens": state["tokens"],
    }
    save_reference(model, reference_directory(arguments.name), figures_of(model, tokenizer, origin))


if __name__ == "__main__":
    main()
