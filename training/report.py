"""Prints the stored figures of the reference checkpoints: `python -m training.report [--measure]`."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from transformers import AutoTokenizer

from pytest_inferencepio.catalog.tiny import TINY, reference_directory
from pytest_inferencepio.tasks.text import read_corpus
from training.models import load_reference
from training.ship import figures_of

WANTED = 0.95


def lines(name: str, figures: dict[str, Any]) -> list[str]:
    """The report of one model: perplexity against the trigram, then each task, by distance where it has one."""
    before = f" after growing from {figures['grown_from']}" if "grown_from" in figures else ""
    out = [
        f"{name}  ({figures['trained_tokens'] / 1e6:.1f} M training tokens{before}, {figures.get('dtype', '-')})"
    ]
    if "heldout" not in figures:
        return [*out, "  not trained yet: constructed initialisation only"]
    text = figures["heldout"]
    out.append(
        f"  held-out perplexity {text['perplexity']:8.2f}   trigram {text['trigram_perplexity']:.2f}   "
        f"({text['tokens']} tokens)"
    )
    for task, found in figures["tasks"].items():
        mark = "" if found["exact_match"] >= WANTED else f"   below {WANTED:.0%}"
        out.append(f"  {task:<18} {found['exact_match']:7.1%}   {found['correct']}/{found['n']}{mark}")
        for distance, (correct, n) in found.get("by_distance", {}).items():
            out.append(f"    {distance:>5} tokens back  {correct / n:7.1%}   {correct}/{n}")
    return out


def stored(name: str) -> dict[str, Any]:
    """The figures.json beside a checkpoint."""
    return dict(json.loads((reference_directory(name) / "figures.json").read_text()))


def measured(name: str) -> dict[str, Any]:
    """The same figures measured now, on the shipped weights."""
    tokenizer = AutoTokenizer.from_pretrained(reference_directory(name))
    kept = {
        key: value for key, value in stored(name).items() if key.startswith(("model", "trained", "grown"))
    }
    return figures_of(load_reference(name), tokenizer, kept)


def main() -> None:
    """One block per model; says when the corpus of this interpreter is another one than the figures'."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure now instead of reading figures.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digest = read_corpus().digest
    for name in sorted(TINY):
        figures = measured(name) if arguments.measure else stored(name)
        print("\n".join(lines(name, figures)))
        if figures.get("corpus_sha256", digest) != digest:
            print("  trained on another interpreter's library: a retraining here would see other text")


if __name__ == "__main__":
    main()
