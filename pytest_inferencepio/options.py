"""The command line and its ini counterparts: declared, read, validated. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from pytest_inferencepio.catalog.entries import SCALES
from pytest_inferencepio.errors import UnknownName
from pytest_inferencepio.naming import (
    CATEGORIES,
    DEVICES,
    DTYPES,
    EXTRA_CATEGORIES,
    pick,
    pick_categories,
    split_list,
)
from pytest_inferencepio.option_values import parse_checkpoint, parse_duration, parse_seed
from pytest_inferencepio.targets import Targets, parse_targets

if TYPE_CHECKING:
    from pytest import Config, Parser

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Option:
    """One `--pio-<name>` option and, unless `ini` is None, its ini key `pio_<name>`."""

    name: str
    help: str
    metavar: str | None = None
    action: str = "store"
    ini: str | None = "string"

    @property
    def flag(self) -> str:
        return f"--pio-{self.name}"

    @property
    def key(self) -> str:
        return f"pio_{self.name.replace('-', '_')}"


OPTIONS = (
    Option(
        "list",
        "Print models, optimizations, categories, scales and this machine's fingerprint, then exit.",
        action="store_true",
        ini=None,
    ),
    Option(
        "model",
        "Measure these models: names, aliases, comma lists, `all`, or `default` (the ini's pio_model, else "
        "all). Runs the shipped suite; the ini key alone never starts it.",
        "MODELS",
        "append",
    ),
    Option(
        "optimization",
        "What to measure: names, a+b, name(key=value), `none`, `all`, `default` (the ini's "
        "pio_optimization, else all). Repeatable, comma separated. Default: default.",
        "SPECS",
        "append",
    ),
    Option(
        "category",
        f"Comma list of {', '.join(CATEGORIES)}, or all (these); {' and '.join(EXTRA_CATEGORIES)} run when they are "
        "named. Default: all.",
        "NAMES",
        "append",
    ),
    Option(
        "peer",
        "Compare with other engines and kernels in the same run: names of --pio-list, comma lists, or all; "
        "what is not installed is reported. Runs the category comparative (which alone means all).",
        "NAMES",
        "append",
    ),
    Option("scale", f"Comma list of {', '.join(SCALES)}. Default: tiny.", "NAMES", "append"),
    Option("device", f"One of {', '.join(DEVICES)}. Default: cpu.", "DEVICE"),
    Option("dtype", f"One of {', '.join(DTYPES)}. Default: bfloat16.", "DTYPE"),
    Option(
        "checkpoint",
        "Load a model's full scale from a directory or hub id; repeatable.",
        "NAME=DIR_OR_HUB_ID",
        "append",
        ini="linelist",
    ),
    Option("report", "Write summary.json, report.md and coverage.json into DIR.", "DIR"),
    Option("seed", "Seed of every random input. Default: 0.", "N"),
    Option(
        "time-budget",
        "Seconds (or 90s, 12m, 1h) after which no further cell is begun; what is left out is reported.",
        "TIME",
    ),
    Option("baseline-dir", "Directory of stored baselines. Default: baselines/ of this project.", "DIR"),
    Option(
        "update-baseline",
        "Write what was measured into the baselines, if the whole run passed.",
        action="store_true",
        ini=None,
    ),
    Option(
        "require-baseline",
        "Fail every cell that has no baseline.",
        action="store_true",
        ini="bool",
    ),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked for, validated as far as names without torch go.

    `models` and `optimizations` are texts; `selection` resolves them. `gate` is true when regressions fail:
    under --benchmark-compare or --pio-require-baseline.
    """

    models: tuple[str, ...]
    optimizations: tuple[str, ...]
    categories: tuple[str, ...]
    peers: tuple[str, ...]
    scales: tuple[str, ...]
    device: str
    dtype: str
    checkpoints: Mapping[str, str]
    report: Path | None
    seed: int
    time_budget: float | None
    baseline_dir: Path | None
    update_baseline: bool
    require_baseline: bool
    gate: bool
    targets: Targets


def add_options(parser: Parser) -> None:
    """Declare every option and ini key."""
    group = parser.getgroup("pio", "inference benchmarks (pytest-inferencepio)")
    for option in OPTIONS:
        extra = {"metavar": option.metavar} if option.metavar else {}
        group.addoption(option.flag, dest=option.key, action=option.action, help=option.help, **extra)
        if option.ini is not None:
            default: Any = {"linelist": [], "bool": False}.get(option.ini)
            kind: Any = option.ini
            parser.addini(option.key, f"Default of {option.flag}.", type=kind, default=default)

    parser.addini(
        "pio_targets",
        "What an optimization has to reach: lines speedup=1.2, memory_saving=0.15, accuracy_loss=0.01.",
        type="linelist",
        default=[],
    )


def mode(config: Config) -> str | None:
    """`list`, `run`, or None when the command line asks nothing of this plugin.

    Raises:
        pytest.UsageError: an option that only means something with --pio-model.
    """
    if config.getoption("pio_list"):
        return "list"
    if config.getoption("pio_model"):
        return "run"
    for option in OPTIONS:
        if config.getoption(option.key):
            raise pytest.UsageError(
                f"{option.flag} says how to measure, but nothing says which models: add --pio-model=all, or "
                f"names from `pytest --pio-list`; for a default that every run uses write {option.key} into "
                "the ini file"
            )
    return None


def read(config: Config) -> Settings:
    """The settings of this run: command line over ini over built-in defaults.

    Raises:
        pytest.UsageError: a value that cannot be read, an unknown name (the near ones are listed).
    """
    defaults = {"model": "all", "optimization": "all"}
    peers = _checked("--pio-peer", _known_peers, _listed(config, "peer"))
    categories = _checked(
        "--pio-category", functools.partial(pick_categories, peers=bool(peers)), _listed(config, "category")
    )
    return Settings(
        models=_texts(config, "model", defaults),
        optimizations=_texts(config, "optimization", defaults),
        categories=categories,
        peers=peers or (_known_peers(["all"]) if "comparative" in categories else ()),
        scales=_checked("--pio-scale", pick, _listed(config, "scale") or ["tiny"], SCALES, "scale"),
        device=_one(config, "device", "cpu", DEVICES),
        dtype=_one(config, "dtype", "bfloat16", DTYPES),
        checkpoints=_checkpoints(config),
        report=_directory(config, "report"),
        seed=_checked("--pio-seed", parse_seed, _scalar(config, "seed") or "0"),
        time_budget=_optional("--pio-time-budget", parse_duration, _scalar(config, "time-budget")),
        baseline_dir=_directory(config, "baseline-dir"),
        update_baseline=bool(config.getoption("pio_update_baseline")),
        require_baseline=_require_baseline(config),
        targets=_checked("pio_targets", parse_targets, config.getini("pio_targets")),
        gate=bool(config.getoption("benchmark_compare", None)) or _require_baseline(config),
    )


def _known_peers(names: list[str]) -> tuple[str, ...]:
    """Imported only for the runs that name peers."""
    if not names:
        return ()
    from pytest_inferencepio.peers.registry import choose

    return choose(names)


def _texts(config: Config, name: str, defaults: Mapping[str, str]) -> tuple[str, ...]:
    """List items of an option, with `default` replaced by what the ini says (else `all`)."""
    key = f"pio_{name}"
    fallback = split_list(config.getini(key) or defaults[name])
    given = [item for text in config.getoption(key) or ["default"] for item in split_list(text)]
    return tuple(
        found for item in given for found in ([item] if item != "default" else fallback) if found != "default"
    )


def _listed(config: Config, name: str) -> list[str]:
    given = config.getoption(f"pio_{name}") or [config.getini(f"pio_{name}") or ""]
    return [item for text in given for item in split_list(text)]


def _scalar(config: Config, name: str) -> str | None:
    key = f"pio_{name.replace('-', '_')}"
    return config.getoption(key) or config.getini(key) or None


def _one(config: Config, name: str, default: str, known: tuple[str, ...]) -> str:
    found = _checked(f"--pio-{name}", pick, [_scalar(config, name) or default], known, name)
    if len(found) != 1:
        raise pytest.UsageError(f"--pio-{name}: one of {', '.join(known)}; run pytest once for each")
    return found[0]


def _directory(config: Config, name: str) -> Path | None:
    """A directory given relative to the working directory (option) or to the ini file's root."""
    key = f"pio_{name.replace('-', '_')}"
    if given := config.getoption(key):
        return Path(config.invocation_params.dir, given)
    ini = config.getini(key)
    return Path(config.rootpath, ini) if ini else None


def _checkpoints(config: Config) -> dict[str, str]:
    """Ini first, so that the command line wins; directories relative as in `_directory`."""
    found: dict[str, str] = {}
    sources = (
        (config.getini("pio_checkpoint"), config.rootpath),
        (config.getoption("pio_checkpoint") or [], config.invocation_params.dir),
    )
    for texts, base in sources:
        for text in texts:
            name, place = _checked("--pio-checkpoint", parse_checkpoint, text)
            directory = Path(base, place).expanduser()
            found[name] = str(directory) if directory.exists() else place
    return found


def _require_baseline(config: Config) -> bool:
    return bool(config.getoption("pio_require_baseline") or config.getini("pio_require_baseline"))


def _optional(flag: str, parse: Callable[[str], Value], text: str | None) -> Value | None:
    return None if text is None else _checked(flag, parse, text)


def _checked(flag: str, parse: Callable[..., Value], *arguments: Any) -> Value:
    try:
        return parse(*arguments)
    except (ValueError, UnknownName) as error:
        raise pytest.UsageError(f"{flag}: {error}") from error
