"""Training on two ranks that is killed, stopped, starved or fed nonsense: it goes on bit for bit, or says why not."""

import json
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dit_fast.checkpoint.folder import latest_checkpoint, load_checkpoint, step_folders
from dit_fast.errors import CheckpointError
from dit_fast.interop import load_model
from dit_fast.training.log import read_log
from tests.distributed.faulty import STAGES
from tests.distributed.ranks import Ended, Ranks, train
from tests.patience import wait_until
from tests.tolerance import assert_close

TINY = [
    *("--data", "digits", "--hidden-size", "16", "--depth", "2", "--num-heads", "2", "--patch-size", "4"),
    *("--batch-size", "8", "--diffusion-steps", "50", "--threads", "1", "--log-every", "1"),
    *("--ckpt-every", "2", "--steps", "8", "--timeout", "600", "--lr", "1e-2"),
]  # fmt: skip
LOGGED = ("loss", "mse", "vb", "grad_norm", "loss_by_timestep", "lr")


@dataclass(frozen=True)
class Finished:
    """What a run came to: numbers of its log by step, and every tensor of its last checkpoint."""

    log: list[list[object]]
    tensors: dict[str, torch.Tensor]
    step: int


def finished(run: Path) -> Finished:
    last = load_checkpoint(latest_checkpoint(run))
    parts = {"model": last.model, "ema": last.ema, "optimizer": last.optimizer}
    tensors = {f"{part}.{name}": t for part, held in parts.items() for name, t in held.items()}
    log = [[line[key] for key in ("step", *LOGGED)] for line in read_log(run / "log.jsonl")]
    return Finished(log, tensors, last.step)


def assert_same(run: Path, clean: Finished) -> None:
    """To the bit: floats in a log are written so that they read back as they were."""
    other = finished(run)
    assert other.step == clean.step
    assert other.log == clean.log
    assert other.tensors.keys() == clean.tensors.keys()
    assert not [name for name, t in clean.tensors.items() if not torch.equal(t, other.tensors[name])]


def start(folder: Path, fault: str = "none", size: int = 2, *more: str) -> Ended:
    return train(folder, size, [*TINY, *more, "--out", folder / "run"], fault)


def go_on(folder: Path, size: int = 2, *more: str) -> Ended:
    ended = train(folder / "resumed", size, ["--resume", folder / "run", *more])
    assert ended.codes == [0] * size, ended.text
    return ended


@pytest.fixture(scope="module")
def clean_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of two ranks, undisturbed, with the checkpoints of steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("clean")
    drawn = folder / "drawn"
    drawn.mkdir()
    ended = start(folder, f"record:0:0:{drawn}", 2, "--keep-checkpoints", "0")
    assert ended.codes == [0, 0], ended.text
    return folder


@pytest.fixture(scope="module")
def clean(clean_run: Path) -> Finished:
    return finished(clean_run / "run")


@pytest.fixture
def stopped(clean_run: Path, tmp_path: Path) -> Path:
    """A copy of the clean run with its checkpoints up to step 4."""
    shutil.copytree(clean_run / "run", tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:07d}")
    return tmp_path


def errors(ended: Ended) -> list[str]:
    """The one line that each rank says at its end."""
    lines = [[line for line in out.splitlines() if "error" in line] for out in ended.outputs]
    assert not any("Traceback" in out for out in ended.outputs), ended.text
    return [line[0] if len(line) == 1 else "" for line in lines]


def test_a_killed_rank_is_named_and_the_run_goes_on_bit_for_bit(tmp_path, clean) -> None:
    ended = start(tmp_path, "kill:1:6")
    assert ended.codes == [1, -9], ended.text
    assert errors(ended)[0].startswith(
        "dit-fast: error: step 6: rank 1 does not answer: it hangs or is gone; continue with --resume"
    )
    go_on(tmp_path)
    assert_same(tmp_path / "run", clean)


def test_a_rank_that_hangs_is_named_at_the_timeout(tmp_path) -> None:
    # The fault keeps the timeout back until the step of the hang: no rank that works is waited for so briefly.
    arguments = [*TINY, "--timeout", "2", "--out", tmp_path / "run"]
    with Ranks(tmp_path, 2, arguments, "hang:1:5") as ranks:
        ended = ranks.wait(ranks=[0])
        said = ranks.outputs[0].stat().st_mtime
    assert ended.codes == [1], ended.text
    assert "step 5: rank 1 does not answer" in errors(ended)[0]
    log = tmp_path / "run" / "log.jsonl"
    assert [line["step"] for line in read_log(log)] == [1, 2, 3, 4]
    # File systems round times; without the option it would be ten minutes, and half an hour in the first step.
    assert 1.9 < said - log.stat().st_mtime < 600


@pytest.mark.parametrize("step", [1, 2, 6])
def test_what_one_rank_cannot_read_ends_all_saved_with_its_reason(tmp_path, clean, step) -> None:
    """Every rank stops before the step whose batch one of them cannot read; mended, the run is the undisturbed one."""
    ended = start(tmp_path, f"fail:1:{step}")
    assert ended.codes == [1, 1], ended.text
    reason = f"step {step}: rank 1: shard 7, image 3: cannot be read; step {step - 1} is saved"
    assert all(said.startswith(f"dit-fast: error: {reason}") for said in errors(ended)), ended.text
    assert latest_checkpoint(tmp_path / "run").name == f"step-{step - 1:07d}"
    go_on(tmp_path)
    assert_same(tmp_path / "run", clean)


def test_a_rank_without_its_data_ends_all_before_the_first_step(tmp_path) -> None:
    ended = start(tmp_path, "open:1:0")
    assert ended.codes == [1, 1], ended.text
    said = errors(ended)
    assert "outside of the steps: rank 1 failed: --data digits: cannot be opened" in said[0]
    assert said[1] == "dit-fast: error: --data digits: cannot be opened"
    assert step_folders(tmp_path / "run") == []


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(tmp_path, clean_run) -> None:
    ended = start(tmp_path, "nan:1:5")
    assert ended.codes == [1, 1], ended.text
    for said in errors(ended):
        assert said.startswith(
            "dit-fast: error: step 5, rank 1: the loss or the gradient norm is not finite; the update was not made"
        )
    # Four samples are rank 1's; steps count from 0 in the stream.
    assert len(errors(ended)[0].split("samples ")[1].split(")")[0].split(", ")) == 4
    assert [path.name for path in step_folders(tmp_path / "run")] == ["step-0000002", "step-0000004"]
    saved, undisturbed = (
        load_checkpoint(folder / "run" / "checkpoints" / "step-0000004") for folder in (tmp_path, clean_run)
    )
    assert not [n for n in saved.model if not torch.equal(saved.model[n], undisturbed.model[n])]


def test_a_signal_to_one_rank_saves_all_at_the_same_step(tmp_path, clean) -> None:
    ended = start(tmp_path, "term:1:3")
    assert ended.codes == [143, 143], ended.text
    assert (
        "SIGTERM: stopped and saved at step 3 of 8; continue with: dit-fast train --resume"
        in ended.outputs[0]
    )
    assert ended.outputs[1].strip() == ""
    assert latest_checkpoint(tmp_path / "run").name == "step-0000003"
    go_on(tmp_path)
    assert_same(tmp_path / "run", clean)


def test_further_signals_do_not_disturb_the_save(tmp_path, clean) -> None:
    import os
    import signal

    signalled = tmp_path / "signalled"
    with Ranks(tmp_path, 2, [*TINY, "--out", tmp_path / "run"], f"slow:0:2:{signalled}") as ranks:
        saving = tmp_path / "run" / "checkpoints"
        wait_until(lambda: list(saving.glob(".tmp-step-*")), what="a checkpoint that is being written")
        for _ in range(3):
            for process in ranks.processes:
                os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.1)
        signalled.touch()
        ended = ranks.wait()
    assert ended.codes == [143, 143], ended.text
    assert latest_checkpoint(tmp_path / "run") == step_folders(tmp_path / "run")[-1]
    go_on(tmp_path)
    assert_same(tmp_path / "run", clean)


def test_any_number_of_ranks_goes_on_with_the_same_samples_and_draws(clean_run, stopped, clean) -> None:
    """2 -> 1 -> 4 ranks, another accumulation and another way of sharing."""
    drawn = stopped / "drawn"
    drawn.mkdir()
    for size, steps, more in ((1, "6", []), (4, "8", ["--accumulate", "2", "--parallel", "ddp"])):
        arguments = ["--resume", stopped / "run", "--steps", steps, *more]
        ended = train(stopped / str(size), size, arguments, f"record:0:0:{drawn}")
        assert ended.codes == [0] * size, ended.text
    losses = [line[1] for line in finished(stopped / "run").log]
    expected = [line[1] for line in clean.log]
    assert len(losses) == len(expected) == 8
    assert_close(losses, expected)
    digests = []
    for folder in (clean_run / "drawn", drawn):
        lines = [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]
        assert max(Counter(number for number, _ in lines).values()) == 1
        digests.append(dict(lines))
    assert len(digests[0]) == 64
    assert digests[1] == {number: digest for number, digest in digests[0].items() if number >= 32}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_stage_of_a_save_loses_nothing_else(tmp_path, clean, rank, stage) -> None:
    ended = start(tmp_path, f"save:{rank}:4:{stage}")
    assert ended.codes[rank] == -9, ended.text
    assert ended.codes[1 - rank] == 1, ended.text
    newest = latest_checkpoint(tmp_path / "run")
    # Rank 1 may be gone before rank 0 has heard that all is written, or after.
    possible = {"write": {2}, "written": {2}, "publish": {2, 4}, "published": {4}}[stage]
    assert load_checkpoint(newest).step in possible
    go_on(tmp_path)
    assert_same(tmp_path / "run", clean)
    assert all(path.name.startswith("step-") for path in (tmp_path / "run" / "checkpoints").iterdir())


def test_a_disk_that_is_full_on_one_rank_costs_a_checkpoint_and_no_step(tmp_path, clean) -> None:
    ended = start(tmp_path, "fsize:1:4")
    assert ended.codes == [0, 0], ended.text
    (warning,) = [line for line in ended.outputs[0].splitlines() if "training continues" in line]
    assert "step-0000004 could not be written: rank 1: " in warning
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-0000006", "step-0000008"]
    assert_same(tmp_path / "run", clean)


def test_a_disk_that_is_full_ends_the_run_where_that_was_asked_for(tmp_path, clean) -> None:
    ended = start(tmp_path, "fsize:1:4", 2, "--stop-on-save-failure")
    assert ended.codes == [1, 1], ended.text
    for said in errors(ended):
        assert "step-0000004 could not be written: rank 1: " in said
        assert said.endswith("--stop-on-save-failure ends the run, --resume continues it")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002"]
    go_on(tmp_path)
    assert_same(tmp_path / "run", clean)


def test_a_flipped_bit_in_any_file_is_found(stopped, caplog) -> None:
    older, newest = step_folders(stopped / "run")
    files = sorted(newest.iterdir())
    assert len(files) == 8
    draw = random.Random(0)
    caught = 0
    for index in range(64):
        file = files[index % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        caplog.clear()
        assert latest_checkpoint(stopped / "run") == older
        assert file.name in caplog.text
        assert "using step-0000002 instead" in caplog.text
        caught += 1
        file.write_bytes(whole)
    assert caught == 64
    assert latest_checkpoint(stopped / "run") == newest


def test_two_ranks_fall_back_together(stopped, clean) -> None:
    newest = step_folders(stopped / "run")[-1]
    file = newest / "ema-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    ended = go_on(stopped)
    (warning,) = [line for line in ended.text.splitlines() if "instead" in line]
    size = file.stat().st_size if file.exists() else None
    assert "ema-00002-of-00002.safetensors has" in warning
    assert "expected" in warning
    assert "using step-0000002 instead" in warning
    assert size is None or size > 0
    assert_same(stopped / "run", clean)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_shard_is_found(stopped, share) -> None:
    newest = step_folders(stopped / "run")[-1]
    file = newest / "optimizer-00001-of-00002.safetensors"
    whole = file.read_bytes()
    kept = int(share * len(whole))
    file.write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=f"{file.name} has {kept} bytes, expected {len(whole)}"):
        load_checkpoint(newest)


def test_a_missing_and_a_foreign_shard_are_found(stopped) -> None:
    newest = step_folders(stopped / "run")[-1]
    (newest / "model-00001-of-00002.safetensors").rename(newest / "model-00003-of-00002.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(newest)
    assert "model-00001-of-00002.safetensors is missing" in str(caught.value)
    assert "model-00003-of-00002.safetensors is not listed in the manifest" in str(caught.value)


def test_a_run_of_two_ranks_is_loaded_as_one_model(clean_run, clean) -> None:
    for weights in ("ema", "model"):
        model, info = load_model(clean_run / "run", weights=weights)
        assert (info.weights, info.step) == (weights, 8)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, clean.tensors[f"{weights}.{name}"])


@pytest.mark.nightly
def test_twenty_random_faults_end_in_the_bits_of_a_run_without(tmp_path) -> None:
    from tests.distributed.soak import soak

    soak(tmp_path, seed=0, faults=20)


def test_a_batch_that_does_not_divide_is_refused_by_every_rank(tmp_path) -> None:
    ended = start(tmp_path, "none", 2, "--batch-size", "9", "--accumulate", "3")
    assert ended.codes == [1, 1], ended.text
    expected = "--batch-size 9 does not divide by 2 ranks x --accumulate 3; give --batch-size 12"
    assert all(said == f"dit-fast: error: {expected}" for said in errors(ended)), ended.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["plain", "snapshots and grids", "two ranks"])
def test_a_kill_at_a_random_moment_leaves_the_bits_of_an_undisturbed_run(tmp_path, name) -> None:
    from tests.distributed.kills import kills

    kills(tmp_path, name, count=1, seed=1)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["plain", "snapshots and grids", "two ranks"])
def test_ten_kills_at_random_moments_leave_the_bits_of_an_undisturbed_run(tmp_path, name) -> None:
    from tests.distributed.kills import kills

    kills(tmp_path, name, count=10, seed=0)
