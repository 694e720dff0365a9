"""Learning-rate plan and log shared by the training stages."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOGS = Path(__file__).with_name("logs")


@dataclass(frozen=True)
class Plan:
    """How long and how fast; `soft` is the trigram's share of the text target at full rate."""

    steps: int
    decay: int
    lr: float = 3e-3
    warmup: int = 30
    tokens: int = 3072
    seed: int = 1
    images: int = 16
    soft: float = 0.6

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear to zero over the last `decay` steps."""
        up = min(1.0, (step + 1) / self.warmup)
        down = min(1.0, (self.steps - step) / max(self.decay, 1))
        return self.lr * min(up, down)


def log(name: str, **values: Any) -> None:
    """Appends one line to training/logs/NAME.jsonl."""
    with (LOGS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"time": round(time.time()), **values}) + "\n")
