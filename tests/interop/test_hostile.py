"""Files that want time or memory, are no files at all, or are of another resolution."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_fast.checkpoint.manifest import MANIFEST
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop import load_model
from dit_fast.models import DiT

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"input_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 4, "num_classes": 10}

# One process for all: its peak memory is read before and after each file, whose size is subtracted.
ATTACKS = r"""
import io, json, pickle, resource, struct, sys, zipfile
from pathlib import Path
import torch
from dit_fast.errors import CheckpointError
from dit_fast.interop import load_model

def archive(pickled):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            file.writestr(f"archive/{name}", data)
    return content.getvalue()

def safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data

def tensor(shape, begin, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

files = {
    "many keys.pt": archive(pickle.dumps({i: None for i in range(200000)}, protocol=2)),
    "a deep pickle.pt": archive(b"\x80\x02" + b"]" * 10**5 + b"."),
    "a huge pickle.pt": archive(b"\x80\x02X" + struct.pack("<I", 2**24) + bytes(2**24) + b"."),
    "many tensors.safetensors": safetensors(
        {f"{i}": tensor([1], 4 * i, 4 * i + 4) for i in range(11000)}, bytes(44000)
    ),
    "a long header.safetensors": safetensors(json.dumps({"a": tensor([1], 0, 4)}).encode() + b" " * 2**23, bytes(4)),
    "a deep header.safetensors": safetensors(b'{"a":' + b"[" * 10**6),
    "overlapping.safetensors": safetensors({f"k{i}": tensor([2**20], 0, 2**22) for i in range(5000)}, bytes(2**22)),
    "huge shapes.safetensors": safetensors({"pos_embed": tensor([2**40, 2**20], 0, 2**62)}, bytes(64)),
    "wrapped shapes.safetensors": safetensors({"pos_embed": tensor([2**33, 2**31], 0, 0)}, bytes(64)),
}
load_model  # imported: what it needs is in memory
for name, content in files.items():
    path = Path(sys.argv[1]) / name
    path.write_bytes(content)
torch.zeros(4 * 2**20).add_(1)
for name, content in files.items():
    before = peak()
    try:
        load_model(Path(sys.argv[1]) / name)
    except CheckpointError as error:
        print(json.dumps([name, str(error), peak() - before - len(content)]))
"""


def test_resource_attacks_are_refused_within_memory(tmp_path) -> None:
    """200 MB beyond the file is what a refusal may take; the limits of bytes and tensors are what bounds time."""
    result = subprocess.run(
        [sys.executable, "-c", ATTACKS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = {name: (line, grown) for name, line, grown in map(json.loads, result.stdout.splitlines())}
    reasons = {
        "many keys.pt": "entries that are not named tensors: 0, 1",
        "a deep pickle.pt": "holds a list",
        "a huge pickle.pt": r"data.pkl of 16777224 bytes",
        "many tensors.safetensors": "refused: 11000 tensors",
        "a long header.safetensors": "refused: a header of",
        "a deep header.safetensors": "recursion limit",
        "overlapping.safetensors": "invalid offset",
        "huge shapes.safetensors": "not a valid safetensors file",
        "wrapped shapes.safetensors": "not a valid safetensors file",
    }
    assert found.keys() == reasons.keys()
    for name, (line, grown) in found.items():
        assert reasons[name] in line
        assert "\n" not in line
        assert grown < 200e6, (name, grown)


def test_official_layouts_are_far_within_the_limits(tmp_path) -> None:
    """XL's names and optimiser, with small tensors in its place: 28 blocks, 292 tensors in each of four sets."""
    model = DiT(**{**SMALL, "depth": 28})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = model.state_dict()
    torch.save({"model": state, "ema": state, "opt": optimizer.state_dict()}, tmp_path / "a.pt")
    loaded, _ = load_model(tmp_path / "a.pt", num_heads=4)
    assert len(loaded.blocks) == 28


@pytest.mark.parametrize("name", ["model.safetensors", "a.pt"])
def test_pipes_and_devices_are_not_waited_for(name, tmp_path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        load_model(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a pipe|a device|no such file"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="/dev/zero: neither a file nor a folder"):
        load_model("/dev/zero")


def test_a_distributed_checkpoint_of_torch_is_not_unpickled(tmp_path) -> None:
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "[1]", "{", "\x00"])
def test_config_json_that_is_no_configuration(text, tmp_path) -> None:
    DiT(**SMALL).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"config\.json") as caught:
            load_model(path)
        assert "\n" not in str(caught.value)


def test_a_deep_manifest_is_refused(tmp_path) -> None:
    (tmp_path / MANIFEST).write_text("[" * 10**6)
    with pytest.raises(CheckpointError, match=r"nested deeper than|damaged") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


# Another resolution


def test_another_resolution_is_refused_with_both_sizes_and_what_to_do(tmp_path) -> None:
    DiT(**SMALL).save_pretrained(tmp_path)
    line = (
        "input_size is 8 in the checkpoint, 16 expected; "
        "load_model(..., input_size=SIZE) or model.regrid(SIZE) computes positions for another size"
    )
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path, expected={"input_size": 16})
    assert str(caught.value).endswith(line)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path, expected={"depth": 2})
    assert "regrid" not in str(caught.value)


@pytest.mark.parametrize("size", [16, (8, 12)])
def test_another_resolution_is_regridded_when_asked(size, tmp_path) -> None:
    model = DiT(**SMALL)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded, info = load_model(tmp_path / "a.pt", num_heads=4, input_size=size)
    built = DiT(**{**SMALL, "input_size": size})
    assert torch.equal(loaded.pos_embed, built.pos_embed)  # the table of a model of that size
    assert loaded.config["input_size"] == built.config["input_size"]
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    shown = "16x16" if size == 16 else "8x12"
    assert info.notes == (f"{tmp_path / 'a.pt'}: positions computed for another input size, 8x8 to {shown}",)
    assert load_model(tmp_path / "a.pt", num_heads=4, input_size=8)[1].notes == ()
    with pytest.raises(ConfigError, match="input_size 9x9 is not a positive multiple of patch_size 2"):
        load_model(tmp_path / "a.pt", num_heads=4, input_size=9)
