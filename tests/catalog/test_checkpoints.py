"""One clear error for each way in which a checkpoint can be unusable, before any tensor is read."""

from __future__ import annotations

import json
import shutil
import struct

import pytest

from pytest_inferencepio.catalog.checkpoints import read_header, resolve_checkpoint
from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.catalog.loading import load
from pytest_inferencepio.errors import CheckpointError

DENSE = ENTRIES["qwen3_4b_instruct_2507"]
VISION = ENTRIES["qwen3_vl_2b"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sharded and a plain checkpoint of the dense tiny model, written by save_pretrained."""
    runner = load(DENSE, "tiny").runner
    plain, sharded = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("sharded")
    runner.model.save_pretrained(plain)
    runner.model.save_pretrained(sharded, max_shard_size="2MB")
    for directory in (plain, sharded):
        runner.processor.save_pretrained(directory)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    return {"plain": plain, "sharded": sharded}


@pytest.fixture
def plain(written, tmp_path):
    return shutil.copytree(written["plain"], tmp_path / "plain")


@pytest.fixture
def sharded(written, tmp_path):
    return shutil.copytree(written["sharded"], tmp_path / "sharded")


def refused(directory, entry=DENSE) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(entry, "full", checkpoint=str(directory))
    return str(caught.value)


def edit(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_both_forms_load(plain, sharded):
    for directory in (plain, sharded):
        assert load(DENSE, "full", checkpoint=str(directory)).runner.model.config.model_type == "qwen3"


def test_checkpoint_of_another_model(plain):
    message = refused(plain, ENTRIES["qwen3_coder_30b"])
    assert f"{plain} is a Qwen3ForCausalLM checkpoint, not Qwen3MoeForCausalLM" in message
    assert "name a checkpoint of Qwen/Qwen3-Coder-30B-A3B-Instruct" in message


def test_model_type_alone_is_enough_to_tell(plain):
    edit(plain / "config.json", model_type="llama", architectures=None)
    assert "is a model_type 'llama' checkpoint, not Qwen3ForCausalLM" in refused(plain)


def test_already_quantized(plain):
    edit(plain / "config.json", quantization_config={"quant_method": "fp8"})
    assert "is already quantized (fp8); name the unquantized checkpoint" in refused(plain)


def test_no_config(plain):
    (plain / "config.json").unlink()
    assert f"{plain} is not a checkpoint: it has no config.json" in refused(plain)


def test_broken_config(plain):
    (plain / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(plain)


def test_config_that_is_no_object(plain):
    (plain / "config.json").write_text("[]")
    assert "config.json holds a list where a JSON object belongs" in refused(plain)


def test_truncated_weights(plain):
    path = plain / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1000)
    assert f"{path} is truncated: {size - 1000} bytes instead of {size}" in refused(plain)


def test_trailing_bytes(plain):
    with (plain / "model.safetensors").open("ab") as file:
        file.write(b"xyz")
    assert "is longer than its header says" in refused(plain)


def test_truncated_header(plain):
    path = plain / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(100)
    assert "is truncated inside its header: 100 of at least" in refused(plain)


def test_corrupt_header(plain):
    path = plain / "model.safetensors"
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"#" * min(64, length))
    assert "has a corrupt header" in refused(plain)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64], ids=["empty", "noise"])
def test_not_a_safetensors_file(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_header(path)


def test_missing_shard(sharded):
    shard = max(sharded.glob("*.safetensors"))
    shard.unlink()
    assert f"lacks {shard.name}, one of the " in refused(sharded)


def test_shard_without_a_tensor_that_the_index_places_there(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first, last = min(sharded.glob("*.safetensors")), max(sharded.glob("*.safetensors"))
    name = next(name for name, place in index["weight_map"].items() if place == first.name)
    index["weight_map"][name] = last.name
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"lacks tensors that model.safetensors.index.json places there: {name}" in refused(sharded)


def test_index_without_a_map(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refused(sharded)


def test_no_weights_names_the_other_formats_found(plain):
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    message = refused(plain)
    assert "has no weights: neither model.safetensors nor model.safetensors.index.json" in message
    assert "it has pytorch_model.bin, but only safetensors are read" in message


def test_missing_tokenizer(plain):
    (plain / "tokenizer.json").unlink()
    message = refused(plain)
    assert (
        f"{plain} has no tokenizer: none of tokenizer.json, vocab.json with merges.txt, tokenizer.model"
        in message
    )
    assert "copy the tokenizer files of Qwen/Qwen3-4B-Instruct-2507 into it" in message


def test_missing_image_processor(tmp_path):
    runner = load(VISION, "tiny").runner
    runner.model.save_pretrained(tmp_path)
    runner.tokenizer.save_pretrained(tmp_path)
    assert "has no image processor: none of preprocessor_config.json, processor_config.json" in refused(
        tmp_path, VISION
    )


def test_tensors_that_the_config_calls_for_are_missing(plain):
    edit(plain / "config.json", num_hidden_layers=5, layer_types=["full_attention"] * 5)
    message = refused(plain)
    assert "lacks 11 tensors that its config.json calls for: model.layers.4.input_layernorm.weight" in message


def test_tensors_of_another_shape(plain):
    edit(plain / "config.json", intermediate_size=640)
    assert (
        "have another shape than config.json says: model.layers.0.mlp.down_proj.weight (256, 512) instead"
        in refused(plain)
    )


def test_a_file_is_no_directory(plain):
    message = refused(plain / "model.safetensors")
    assert "is a file; name the directory that holds config.json and the weights" in message


def test_what_is_neither_directory_nor_hub_id():
    with pytest.raises(CheckpointError, match="'/no/such/place' is no directory, and no hub id either"):
        resolve_checkpoint("/no/such/place")


def test_hub_id_offline(monkeypatch, tmp_path):
    # This user may have the model.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint("Qwen/Qwen3-4B-Instruct-2507")
    assert "as a hub id it cannot be had" in str(caught.value)
    assert "hf download Qwen/Qwen3-4B-Instruct-2507 --local-dir DIR" in str(caught.value)
