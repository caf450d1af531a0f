"""What torchrun does with signals and dead ranks, and that nothing is lost by it."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from dit_fast.checkpoint.folder import latest_checkpoint, load_checkpoint
from dit_fast.training.log import read_log
from tests.distributed.ranks import alive, torchrun, train
from tests.distributed.test_faults import TINY, assert_same, finished
from tests.patience import PATIENCE, wait_until

WORKER = "tests/distributed/faulty.py"
WAITING = """
import os, sys, time
from pathlib import Path
from dit_fast.cli import main
print("pid", os.getpid(), flush=True)
Path({folder!r}, "ready-" + os.environ["RANK"]).touch()
while not Path({folder!r}, "killed").exists():
    time.sleep(0.05)
sys.exit(main())
"""


def pids(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^pid (\d+)$", text, re.MULTILINE)]


def end(process: subprocess.Popen, limit: float = PATIENCE) -> str:
    try:
        return process.communicate(timeout=limit)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def steps_of(run: Path) -> int:
    return len(read_log(run / "log.jsonl"))


def test_max_restarts_goes_on_from_the_last_checkpoint(tmp_path) -> None:
    options = ["--max-restarts", "2"]
    arguments = [WORKER, "kill:1:6", *TINY, "--out", str(tmp_path / "run")]
    text = end(process := torchrun(arguments, 2, options, SLURM_JOB_ID="1"))
    assert process.returncode == 0, text
    assert len(pids(text)) == 4, text
    assert "torchrun does not pass it on: start it with --signals-to-handle SIGTERM,SIGINT,SIGUSR1" in text
    assert text.count("torchrun does not pass it on") == 2, "once an attempt"
    ended = train(tmp_path / "clean", 2, [*TINY, "--out", tmp_path / "clean" / "run"])
    assert ended.codes == [0, 0], ended.text
    assert_same(tmp_path / "run", finished(tmp_path / "clean" / "run"))


@pytest.mark.nightly
def test_ten_of_ten_restarts_go_on(tmp_path) -> None:
    """A worker killed in each of ten attempts, one rank and the other in turn; the eleventh ends the run."""
    faults = ",".join(f"kill:{attempt % 2}:{2 * attempt + 4}" for attempt in range(10))
    options = [*TINY, "--steps", "24"]
    arguments = [WORKER, faults, *options, "--out", str(tmp_path / "run")]
    text = end(process := torchrun(arguments, 2, ["--max-restarts", "10"]), limit=4 * PATIENCE)
    assert process.returncode == 0, text
    assert len(pids(text)) == 22, text
    assert alive(pids(text)) == []
    ended = train(tmp_path / "clean", 2, [*options, "--out", tmp_path / "clean" / "run"])
    assert ended.codes == [0, 0], ended.text
    assert_same(tmp_path / "run", finished(tmp_path / "clean" / "run"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.nightly)])
def test_a_signal_to_torchrun_saves_and_leaves_no_process(tmp_path, number) -> None:
    run = tmp_path / "run"
    options = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    arguments = [WORKER, "none", *TINY, "--steps", "100000", "--ckpt-every", "50", "--out", str(run)]
    process = torchrun(arguments, 2, options, SLURM_JOB_ID="1")
    wait_until(lambda: steps_of(run) >= 3, process, what="step 3")
    process.send_signal(number)
    text = end(process)
    assert process.returncode != 0
    assert "does not pass it on" not in text
    saved = load_checkpoint(latest_checkpoint(run)).step
    assert saved == steps_of(run) >= 3
    assert f"{number.name}: stopped and saved at step {saved} of 100000" in text
    assert len(pids(text)) == 2
    assert alive(pids(text)) == []


@pytest.mark.slow
def test_a_torchrun_killed_during_start_up_leaves_no_rank(tmp_path) -> None:
    """Its ranks have not met: they end long before the time that ranks wait for each other."""
    worker = tmp_path / "worker.py"
    worker.write_text(WAITING.format(folder=str(tmp_path)))
    process = torchrun([str(worker), "train", *TINY, "--out", str(tmp_path / "run")], 2)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, process, what="two ranks")
    process.kill()
    (tmp_path / "killed").touch()
    text = process.communicate(timeout=PATIENCE)[0]
    assert len(pids(text)) == 2, text
    # They let go of the pipe a little before they end.
    wait_until(lambda: not alive(pids(text)), what="their end")
    assert "Traceback" not in text
    for rank in range(2):
        assert text.count(f"rank {rank} did not reach the other ranks at the start") == 1, text
