"""One process writes to a folder at a time; the kernel releases the lock of one that dies."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dit_fast.data import encode as encode_module
from dit_fast.errors import OutputError
from dit_fast.training import TrainConfig, resume, train
from dit_fast.training import run as training_run
from dit_fast.training.log import read_log
from dit_fast.utils import locks
from dit_fast.utils.locks import FolderLock
from tests.patience import PATIENCE
from tests.training.test_step import TINY, image_set

HOLD = """
import sys, time
from dit_fast.utils.locks import FolderLock
lock = FolderLock(sys.argv[1], "train")
lock.acquire()
print("locked", flush=True)
sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of training in `folder`, until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "open_set", lambda config: image_set())


def test_another_process_is_named_and_its_death_releases_the_lock(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(OutputError) as caught:
            FolderLock(tmp_path, "train").acquire()
        assert str(caught.value).startswith(
            f"{tmp_path} is in use: dit-fast train, process {process.pid} on "
        )
        assert "\n" not in str(caught.value)
        # Another purpose and another part write other files.
        for other in (FolderLock(tmp_path, "sample"), FolderLock(tmp_path, "train", 1)):
            with other:
                pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with FolderLock(tmp_path, "train"):
        assert json.loads((tmp_path / ".train.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{}", '{"since": 1e300, "command": 0}', "[" * 4096])
def test_a_holder_that_cannot_be_read_is_one_line_too(content, tmp_path):
    with FolderLock(tmp_path, "train"):
        (tmp_path / ".train.lock").write_text(content)
        with pytest.raises(OutputError, match="is in use: another process is writing to it"):
            FolderLock(tmp_path, "train").acquire()


def test_within_a_process_too(tmp_path):
    with FolderLock(tmp_path, "train"), pytest.raises(OutputError, match=f"process {os.getpid()} on "):
        FolderLock(tmp_path, "train").acquire()


def forked(folder: str, ready: Any, done: Any) -> None:
    ready.set()
    done.wait(PATIENCE)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_outlives_its_parent_keeps_no_lock(tmp_path):
    """Neither a fork, such as a data worker, nor a program that was started."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    lock = FolderLock(tmp_path, "train")
    lock.acquire()
    child = context.Process(target=forked, args=(str(tmp_path), ready, done))
    child.start()
    program = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,
    )
    assert program.stdout is not None
    # Before its first line it may still have what it closes.
    assert program.stdout.readline() == b"\n"
    try:
        assert ready.wait(PATIENCE)
        # The parent has it still, and nobody does once the parent's descriptor is closed, as by its death.
        with pytest.raises(OutputError):
            FolderLock(tmp_path, "train").acquire()
        lock._close()
        with FolderLock(tmp_path, "train"):
            pass
    finally:
        done.set()
        child.join()
        program.communicate(b"\n")


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b'{"pid": 1}', b'{"pid":1,"host":"\\u001b[2J","since":1e99}']
)
def test_a_lock_whose_words_are_damaged_is_a_lock(content, tmp_path):
    with FolderLock(tmp_path, "train"):
        (tmp_path / ".train.lock").write_bytes(content)
        with pytest.raises(OutputError, match="is in use: another process is writing to it; wait for it"):
            FolderLock(tmp_path, "train").acquire()


def test_a_file_that_its_last_holder_removes_is_not_locked_in_its_place(tmp_path, monkeypatch):
    """Opened before the removal, locked after it: the lock would be of a file that nobody else can find."""
    first, second = FolderLock(tmp_path, "train"), FolderLock(tmp_path, "train")
    first.acquire()
    opened = FolderLock._open

    def late(self: FolderLock) -> int:
        descriptor = opened(self)
        first.release()
        return descriptor

    monkeypatch.setattr(FolderLock, "_open", late)
    second.acquire()
    with pytest.raises(OutputError):
        FolderLock(tmp_path, "train").acquire()


def test_a_link_or_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / ".train.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="cannot be locked"):
        FolderLock(tmp_path, "train").acquire()
    assert (tmp_path / "elsewhere").read_text() == "kept"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with FolderLock(tmp_path, "train"):
        assert f"{tmp_path}: the file system does not support locks: do not write to it" in caplog.text


MOUNTS = """22 27 0:21 / /proc rw - proc proc rw
30 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
31 30 0:50 / /home rw - nfs4 server:/home rw,vers=4.2,local_lock=none,addr=10.0.0.1
32 30 0:51 / /old rw - nfs server:/old rw,vers=3,nolock,local_lock=all
33 30 0:52 / /scratch rw - lustre mgs:/scratch rw,flock,lazystatfs
34 30 0:53 / /work rw - lustre mgs:/work rw,lazystatfs
35 30 0:54 / /far\\040away rw - fuse.sshfs me@there:/ rw,user_id=0
damaged
"""


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ((8, 1), ""),
        ((0, 50), ""),
        ((0, 51), "mounted by NFS with local_lock=all, nolock, its lock works only within this machine"),
        ((0, 52), ""),
        ((0, 53), "mounted by Lustre without flock, its lock works only within this machine"),
        ((0, 54), "its lock may work only within this machine, the file system is fuse.sshfs"),
        ((9, 9), ""),
    ],
)
def test_where_a_lock_does_not_reach_other_machines_that_is_said(device, words):
    found = next(locks._weakness(*mount) for mount in locks._mounts(MOUNTS, os.makedev(*device)))
    assert found == words


@pytest.mark.usefixtures("data")
def test_a_run_is_trained_by_one_process(tmp_path):
    """A second one is refused, by train and by --resume, and changes nothing; readers are not."""
    run = tmp_path / "run"
    train(TrainConfig(**TINY, steps=2, log_every=1), run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    process = holder(run)
    try:
        for again in (
            lambda: resume(run, {"steps": 4}),
            lambda: train(TrainConfig(**TINY, steps=2), run),
        ):
            with pytest.raises(
                OutputError, match=f"{run} is in use: dit-fast train, process {process.pid} on"
            ):
                again()
        assert [line["step"] for line in read_log(run / "log.jsonl")] == [1, 2]
    finally:
        process.communicate("")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert resume(run, {"steps": 4}).step == 4
    assert not (run / ".train.lock").exists()


@pytest.mark.usefixtures("data")
def test_a_run_that_began_while_the_data_were_read_is_left_alone(tmp_path, monkeypatch):
    """Two that are started at once: the folder is not there when either looks first."""
    run, begun = tmp_path / "run", []

    def late(config: TrainConfig) -> Any:
        if not begun:
            begun.append(True)
            train(TrainConfig(**TINY, steps=2), run)
        return image_set()

    monkeypatch.setattr(training_run, "open_set", late)
    with pytest.raises(OutputError, match="already holds a run"):
        train(TrainConfig(**TINY, steps=9), run)
    assert resume(run, {"steps": 3}).step == 3


def test_an_encoding_and_its_ranks(tmp_path, monkeypatch):
    """Ranks of one encoding work side by side; a second process of the same rank is refused."""
    out = tmp_path / "latents"
    out.mkdir()
    seen: list[int] = []
    monkeypatch.setattr(encode_module, "_encode", lambda run, rank, size: seen.append(rank))
    for name in ("open_encoder", "list_images", "LatentEncoder"):
        monkeypatch.setattr(
            encode_module, name, lambda *args: type("Fake", (), {"factor": 8, "shards": lambda self: 2})()
        )
    config = encode_module.EncodeConfig(data=str(tmp_path), out=str(out))
    with FolderLock(out, "encode"):
        encode_module.encode(config, 1, 2)
        with pytest.raises(OutputError, match="latents is in use: dit-fast encode, process"):
            encode_module.encode(config, 0, 2)
    encode_module.encode(config, 0, 2)
    assert seen == [1, 0]
