"""What is wrong with a checkpoint, found before any weight is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import AutoConfig

from pytest_inferencepio.catalog.entries import ModelEntry
from pytest_inferencepio.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
_IMAGE_PROCESSORS = (("preprocessor_config.json",), ("processor_config.json",))
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_HEADER_LIMIT = 100_000_000  # bytes; the format's own bound


def resolve_checkpoint(checkpoint: str) -> Path:
    """The directory of `checkpoint`: itself, or a snapshot of the hub id (downloaded unless cached or offline).

    Raises:
        CheckpointError: neither a directory nor a hub id that can be had.
    """
    directory = Path(checkpoint).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise CheckpointError(
            f"{checkpoint} is a file; name the directory that holds config.json and the weights"
        )
    try:
        return Path(huggingface_hub.snapshot_download(checkpoint, allow_patterns=list(_WANTED)))
    except HFValidationError as error:
        raise CheckpointError(
            f"checkpoint {checkpoint!r} is no directory, and no hub id either (those read owner/name)"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint!r} is no directory, and as a hub id it cannot be had "
            f"({type(error).__name__}: {_first_line(error)}); download it where there is a network "
            f"(hf download {checkpoint} --local-dir DIR) and name that directory"
        ) from error


def validate_checkpoint(entry: ModelEntry, directory: Path) -> Any:
    """Check that `directory` holds `entry`, complete, and return its configuration. No tensor is read.

    Raises:
        CheckpointError: another model, already quantized, missing or truncated weights, no tokenizer.
    """
    _check_identity(entry, directory, _read_json(directory / "config.json"))
    _check_weights(directory)
    _check_processor(entry, directory)
    return AutoConfig.from_pretrained(directory, local_files_only=True)


def check_loaded(directory: Path, info: Mapping[str, Any]) -> None:
    """Judge the loading report of `from_pretrained`: no tensor may be missing or of another shape.

    Raises:
        CheckpointError: names the first tensors; transformers would initialize them at random and only warn.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} tensors that its config.json calls for: {_some(missing)}; "
            "save or download the checkpoint again"
        )
    mismatched = sorted(
        f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]
    )
    if mismatched:
        raise CheckpointError(
            f"in {directory} {len(mismatched)} tensors have another shape than config.json says: {_some(mismatched)}"
        )


def _check_identity(entry: ModelEntry, directory: Path, config: Mapping[str, Any]) -> None:
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if model_type != entry.model_type or (architectures and entry.architecture not in architectures):
        found = ", ".join(architectures) or f"model_type {model_type!r}"
        raise CheckpointError(
            f"{directory} is a {found} checkpoint, not {entry.architecture}; name a checkpoint of {entry.published_as}"
        )
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise CheckpointError(
            f"{directory} is already quantized ({method}); name the unquantized checkpoint and choose a weight "
            "optimization instead"
        )


def _check_weights(directory: Path) -> None:
    if (directory / INDEX).is_file():
        _check_shards(directory, _read_json(directory / INDEX))
    elif (directory / WEIGHTS).is_file():
        read_header(directory / WEIGHTS)
    else:
        others = sorted(
            path.name for pattern in ("*.bin", "*.gguf", "*.pt", "*.pth") for path in directory.glob(pattern)
        )
        hint = f"; it has {_some(others)}, but only safetensors are read" if others else ""
        raise CheckpointError(f"{directory} has no weights: neither {WEIGHTS} nor {INDEX}{hint}")


def _check_shards(directory: Path, index: Mapping[str, Any]) -> None:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX} has no weight_map; download the file again")
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if not path.is_file():
            total = len(set(weight_map.values()))
            raise CheckpointError(
                f"{directory} lacks {shard}, one of the {total} files that {INDEX} names; download it"
            )
        lost = {name for name, place in weight_map.items() if place == shard} - set(read_header(path))
        if lost:
            raise CheckpointError(f"{path} lacks tensors that {INDEX} places there: {_some(sorted(lost))}")


def read_header(path: Path) -> dict[str, Any]:
    """Tensor names of a safetensors file -> dtype, shape, data_offsets, checked against the size of the file.

    Raises:
        CheckpointError: truncated, with the bytes that are missing, or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _HEADER_LIMIT:
            raise CheckpointError(f"{path} is not a safetensors file: {size} bytes without a valid header")
        raw = file.read(length)
    if len(raw) < length:
        raise CheckpointError(f"{path} is truncated inside its header: {size} of at least {8 + length} bytes")
    try:
        header = json.loads(raw)
        entries = {name: value for name, value in header.items() if name != "__metadata__"}
        end = max((value["data_offsets"][1] for value in entries.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{path} has a corrupt header ({_first_line(error)}); download it again"
        ) from error
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "longer than its header says"
        raise CheckpointError(
            f"{path} is {what}: {size} bytes instead of {8 + length + end}; download it again"
        )
    return entries


def _check_processor(entry: ModelEntry, directory: Path) -> None:
    if not _has_any(directory, _TOKENIZERS):
        raise CheckpointError(
            f"{directory} has no tokenizer: none of {_names(_TOKENIZERS)}; copy the tokenizer files of "
            f"{entry.published_as} into it (tokenizer.save_pretrained writes them)"
        )
    if entry.multimodal and not _has_any(directory, _IMAGE_PROCESSORS):
        raise CheckpointError(
            f"{directory} has no image processor: none of {_names(_IMAGE_PROCESSORS)}; copy the processor files of "
            f"{entry.published_as} into it (processor.save_pretrained writes them)"
        )


def _has_any(directory: Path, alternatives: Iterable[tuple[str, ...]]) -> bool:
    return any(all((directory / name).is_file() for name in names) for names in alternatives)


def _names(alternatives: Iterable[tuple[str, ...]]) -> str:
    return ", ".join(" with ".join(names) for names in alternatives)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a checkpoint: it has no {path.name}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({_first_line(error)}); download it again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__} where a JSON object belongs")
    return data


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
