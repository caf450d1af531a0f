"""Checkpoints: whole or absent, and every damage found before use."""

import json
import logging
import os
import random
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dit_fast.checkpoint import folder as checkpoint
from dit_fast.checkpoint.folder import (
    Retention,
    find_checkpoint,
    is_complete,
    latest_checkpoint,
    load_checkpoint,
    load_into,
    model_config,
    read_manifest,
    remove_leftovers,
    step_folders,
    verify_files,
    write_manifest,
)
from dit_fast.checkpoint.writer import CheckpointWriter
from dit_fast.errors import CheckpointError, OutputError
from dit_fast.models import DiT
from tests.checkpoints import save_checkpoint
from tests.patience import PATIENCE

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


@pytest.mark.parametrize("moment", ["write_pieces", "file_facts", "write_manifest", "sync", "os.rename"])
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
    with pytest.raises(OutputError, match=r"no space in .*: 1\.\d MiB needed, 0\.5 MiB free"):
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


def state_of(built: DiT) -> dict[str, dict[str, torch.Tensor]]:
    whole = dict(built.state_dict())
    return {"model": whole, "ema": dict(whole), "optimizer": {f"exp_avg.{n}": t for n, t in whole.items()}}


def start_save(writer: CheckpointWriter, step: int, fill: float = 0.0) -> None:
    built = model(fill)
    writer.save(model_config(built), state_of(built), {"step": step, "train_config": {}})


def test_a_save_that_failed_in_the_background_is_raised_by_the_next_and_at_the_end(tmp_path, monkeypatch):
    write_pieces = checkpoint.write_pieces

    def full(path, pieces):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "write_pieces", full)
    writer = CheckpointWriter(tmp_path)
    start_save(writer, 1)
    with pytest.raises(OutputError, match="step-0000001 could not be written: No space left on device"):
        start_save(writer, 2)
    assert not writer.failed
    with pytest.raises(OutputError, match="step-0000003"), CheckpointWriter(tmp_path) as another:
        start_save(another, 3)
    monkeypatch.setattr(checkpoint, "write_pieces", write_pieces)
    start_save(writer, 4)
    assert writer.wait() == tmp_path / "checkpoints" / "step-0000004"
    assert list((tmp_path / "checkpoints").iterdir()) == [tmp_path / "checkpoints" / "step-0000004"]


def test_the_end_waits_for_a_save_and_what_ended_the_training_is_kept(tmp_path, monkeypatch):
    write_pieces, may_write = checkpoint.write_pieces, threading.Event()

    def waiting(path, pieces):
        assert may_write.wait(PATIENCE)
        write_pieces(path, pieces)

    monkeypatch.setattr(checkpoint, "write_pieces", waiting)
    with CheckpointWriter(tmp_path) as writer:
        start_save(writer, 1)
        assert step_folders(tmp_path) == [], "save came back while the disk was waited for"
        may_write.set()
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 1

    def fail_in_training() -> None:
        with CheckpointWriter(tmp_path) as writer:
            start_save(writer, 2)
            raise KeyError("training")

    with pytest.raises(KeyError, match="training"):
        fail_in_training()
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 2


def test_what_is_written_in_the_background_is_the_state_of_the_save(tmp_path):
    built = model(0.25)
    files = []
    for name, background in (("beside", True), ("within", False)):
        with CheckpointWriter(tmp_path / name, background=background) as writer:
            writer.save(model_config(built), state_of(built), {"step": 1, "train_config": {}})
            with torch.no_grad():
                built.final_layer.linear.weight.mul_(2.0)
        with torch.no_grad():
            built.final_layer.linear.weight.mul_(0.5)
        files.append(sorted((tmp_path / name).rglob("*.*")))
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True) if a.is_file())


@pytest.mark.parametrize("moment", ["write_pieces", "write_manifest", "first rename", "second rename"])
def test_a_step_saved_again_is_the_old_or_the_new_one(tmp_path, moment):
    older = save(tmp_path, 1, fill=0.5)
    rename, renamed = os.rename, []

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_at_rename(*args):
        renamed.append(args)
        if len(renamed) == (1 if moment == "first rename" else 2):
            die()
        rename(*args)

    def killed_save() -> None:
        if "rename" in moment:
            checkpoint.os.rename = die_at_rename
        else:
            setattr(checkpoint, moment, die)
        save(tmp_path, 1, fill=0.75)

    assert in_a_child(killed_save) == -signal.SIGKILL
    remove_leftovers(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]
    assert load_checkpoint(older).model["final_layer.linear.weight"].unique().tolist() == [0.5]


def test_milestones_stay_and_damaged_steps_do_not_count(tmp_path):
    for step in range(1, 8):
        built = model()
        with CheckpointWriter(tmp_path, Retention(2, 3)) as writer:
            writer.save(model_config(built), state_of(built), {"step": step, "train_config": {}})
        if step == 6:
            (tmp_path / "checkpoints" / "step-0000006" / "ema.safetensors").write_bytes(b"damaged")
        whole = [folder for folder in step_folders(tmp_path) if is_complete(folder)]
        assert len(whole) >= min(2, step)
    names = [int(folder.name.removeprefix("step-")) for folder in step_folders(tmp_path)]
    assert names == [3, 5, 6, 7], "the newest two that are whole are 5 and 7; 3 and 6 are milestones"


def test_a_kill_while_an_old_step_is_removed_leaves_no_half_of_it(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def killed_purge() -> None:
        remove = shutil.rmtree

        def die(path, ignore_errors=False):
            if ignore_errors:
                remove(path, ignore_errors=True)
                return
            (Path(path) / "ema.safetensors").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.shutil.rmtree = die
        save(tmp_path, 3, keep=2)

    assert in_a_child(killed_purge) == -signal.SIGKILL
    assert [folder.name for folder in step_folders(tmp_path)] == ["step-0000002", "step-0000003"]
    assert all(is_complete(folder) for folder in step_folders(tmp_path))
    remove_leftovers(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
    path = save(tmp_path, 1)
    manifest = read_manifest(path)
    state = {"model": {n: t.clone() for n, t in model().state_dict().items()}}
    before = {name: tensor.clone() for name, tensor in state["model"].items()}
    weight = state["model"].pop("final_layer.linear.weight")
    state["model"]["final_layer.linear.gain"] = weight
    state["model"]["pos_embed"] = torch.zeros(1, 9, 16)
    state["model"]["blocks.0.attn.qkv.bias"] = torch.zeros(48, dtype=torch.float64)
    with pytest.raises(CheckpointError) as caught:
        load_into(path, manifest, state)
    message = str(caught.value)
    assert "model lacks final_layer.linear.gain" in message
    assert "model has unexpected final_layer.linear.weight" in message
    assert "pos_embed is (1, 4, 16), expected (1, 9, 16)" in message
    assert "blocks.0.attn.qkv.bias is torch.float32, expected torch.float64" in message
    assert torch.equal(weight, before["final_layer.linear.weight"]), "something was read before the refusal"
    good = {"model": {n: t.double() for n, t in before.items()}}
    load_into(path, manifest, good, cast=True)
    assert torch.equal(good["model"]["pos_embed"], before["pos_embed"].double())
    kept = {name: entry for name, entry in manifest["files"].items() if name != "ema.safetensors"}
    with pytest.raises(CheckpointError, match="has no ema weights"):
        load_into(path, {**manifest, "files": kept}, {"ema": state["model"]})


def test_a_manifest_that_points_elsewhere_is_refused(tmp_path):
    path = save(tmp_path, 1)
    manifest = read_manifest(path)
    manifest["files"]["../secret.safetensors"] = manifest["files"]["ema.safetensors"]
    write_manifest(path, manifest)
    with pytest.raises(CheckpointError, match=r"names files outside its folder: '\.\./secret\.safetensors'"):
        load_checkpoint(path)


def test_a_pickle_in_the_folder_is_never_opened(tmp_path):
    """PyTorch's own format keeps a pickle, `.metadata`, that runs what it likes."""
    path = save(tmp_path, 1)
    canary = tmp_path / "canary"
    (path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    assert load_checkpoint(path).step == 1
    assert DiT.from_pretrained(path, weights="ema") is not None
    assert not canary.exists()
