"""Checkpoints: whole or absent, and every damage found before use."""

import json
import logging
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dit_fast.errors import CheckpointError, OutputError
from dit_fast.models import DiT
from dit_fast.training import checkpoint
from dit_fast.training.checkpoint import (
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    read_manifest,
    remove_leftovers,
    save_checkpoint,
    step_folders,
    verify_files,
    write_manifest,
)

FILES = ("config.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors", "manifest.json")


def model(fill: float = 0.0) -> DiT:
    built = DiT(
        input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3
    )
    torch.nn.init.constant_(built.final_layer.linear.weight, fill)
    return built.eval()


def save(run: Path, step: int, fill: float = 0.0, keep: int = 0) -> Path:
    built = model(fill)
    ema = {name: tensor + 1.0 for name, tensor in built.state_dict().items()}
    moments = {f"exp_avg.{name}": tensor * 2.0 for name, tensor in built.state_dict().items()}
    return save_checkpoint(run, built, ema, moments, {"step": step, "train_config": {}}, keep)


def in_a_child(action: Callable[[], None]) -> int:
    """Exit status of a forked process that runs `action`; it never returns into pytest."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(77)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, 12, fill=0.25)
    assert path == tmp_path / "checkpoints" / "step-0000012"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    loaded = load_checkpoint(path)
    assert loaded.step == 12
    weight = "final_layer.linear.weight"
    assert loaded.model[weight].unique().tolist() == [0.25]
    assert loaded.ema[weight].unique().tolist() == [1.25]
    assert loaded.optimizer[f"exp_avg.{weight}"].unique().tolist() == [0.5]
    assert DiT.from_pretrained(path).final_layer.linear.weight.unique().tolist() == [0.25]
    assert DiT.from_pretrained(path, weights="ema").final_layer.linear.weight.unique().tolist() == [1.25]
    assert find_checkpoint(path) == find_checkpoint(tmp_path) == path


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, name):
    path = save(tmp_path, 1)
    whole = (path / name).read_bytes()
    draw = random.Random(name)
    for _ in range(64):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_checkpoint(path)
    (path / name).write_bytes(whole)
    load_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_found(tmp_path, name, share):
    path = save(tmp_path, 1)
    whole = (path / name).read_bytes()
    kept = int(share * len(whole.rstrip()))
    (path / name).write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        load_checkpoint(path)
    if name != "manifest.json":
        assert f"has {kept} bytes, expected {len(whole)}" in str(caught.value)


def test_every_damaged_file_is_listed(tmp_path):
    path = save(tmp_path, 1)
    (path / "ema.safetensors").unlink()
    (path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json has 2 bytes.*ema\.safetensors is missing"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"damaged: ema\.safetensors is missing$"):
        verify_files(path, read_manifest(path), ["ema.safetensors", "model.safetensors"])


def test_foreign_folders_are_refused(tmp_path):
    model().save_pretrained(tmp_path / "pretrained")
    with pytest.raises(
        CheckpointError, match=r"is not a checkpoint of dit-fast train: it has no manifest\.json"
    ):
        load_checkpoint(tmp_path / "pretrained")
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text('{"format": "pt"}')
    with pytest.raises(CheckpointError, match="not the manifest of a dit-fast checkpoint"):
        load_checkpoint(path)
    write_manifest(path, {"format": "dit_fast checkpoint 2", "step": 1, "files": {}})
    with pytest.raises(CheckpointError, match="has format 'dit_fast checkpoint 2'; this version reads"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such run or checkpoint folder"):
        find_checkpoint(tmp_path / "missing")


def test_an_edited_manifest_is_found(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["step"] = 2
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not match its own SHA-256"):
        read_manifest(path)


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path, caplog):
    older, newer = save(tmp_path, 9), save(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == newer
    (newer / "ema.safetensors").write_bytes(b"short")
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == older
    assert "ema.safetensors has 5 bytes" in caplog.text
    assert "using step-0000009 instead" in caplog.text
    shutil.rmtree(older)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("moment", ["write_pieces", "digest", "write_manifest", "sync", "os.rename"])
def test_a_kill_during_a_save_leaves_the_older_checkpoint(tmp_path, monkeypatch, moment):
    older = save(tmp_path, 1, fill=0.5)

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_save() -> None:
        monkeypatch.setattr(
            checkpoint.os if moment == "os.rename" else checkpoint, moment.split(".")[-1], die
        )
        save(tmp_path, 2)

    assert in_a_child(killed_save) == -signal.SIGKILL
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2, "the killed save left something behind"
    assert step_folders(tmp_path) == [older]
    assert latest_checkpoint(tmp_path) == older
    assert load_checkpoint(older).model["final_layer.linear.weight"].unique().tolist() == [0.5]
    remove_leftovers(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]
    assert load_checkpoint(save(tmp_path, 2)).step == 2


def test_a_file_that_cannot_grow_leaves_nothing_partial(tmp_path):
    older = save(tmp_path, 1)

    def limited_save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save(tmp_path, 2)
        except OutputError as error:
            os._exit(3 if "step-0000002 could not be written" in str(error) else 4)

    assert in_a_child(limited_save) == 3
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_a_full_disk_is_named_with_its_figures(tmp_path, monkeypatch):
    older = save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1 << 19))
    with pytest.raises(OutputError, match=r"it needs 1\.\d MiB, 0\.5 MiB are free"):
        save(tmp_path, 2)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_only_the_newest_are_kept(tmp_path, monkeypatch, caplog):
    for step in (8, 9, 10, 100):
        save(tmp_path, step, keep=2)
    assert [path.name for path in step_folders(tmp_path)] == ["step-0000010", "step-0000100"]
    rmtree = shutil.rmtree

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError("busy")
        rmtree(path, ignore_errors=True)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    save(tmp_path, 101, keep=2)
    assert "step-0000010 could not be removed: busy" in caplog.text
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 101


def test_saving_a_step_again_replaces_it_whole(tmp_path):
    save(tmp_path, 1, fill=0.5)
    assert load_checkpoint(save(tmp_path, 1, fill=0.75)).model["final_layer.linear.weight"][0, 0] == 0.75
