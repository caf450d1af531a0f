"""SIGKILLs at random moments: `python -m tests.distributed.kills [--seed N] [--kills N]`, ten of each configuration.

A run is killed as soon as it has logged a random step and a random fraction of a second more, wherever it is then: in
a step, in a save beside it, while it draws. It is then resumed, and killed again, until it ends; after that the next
run begins. Each must end with the files of a run that nothing happened to: weights, optimizer, averages, every line of
log.jsonl and spikes.jsonl but for times, snapshots, and grids of samples.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dit_fast.checkpoint.folder import read_part, step_folders
from dit_fast.checkpoint.manifest import read_manifest
from dit_fast.checkpoint.power_ema import SIGMAS, SNAPSHOTS
from tests.distributed.ranks import Ranks, train
from tests.patience import PATIENCE

STEPS, EVERY = 60, 4
TIMES = ("images_per_second", "data_wait", "peak_memory", "seconds")
TINY = [
    *("--data", "digits", "--hidden-size", "16", "--depth", "1", "--num-heads", "2", "--patch-size", "4"),
    *("--batch-size", "8", "--diffusion-steps", "50", "--threads", "1", "--log-every", "3", "--lr", "1e-2"),
    *("--ckpt-every", str(EVERY), "--steps", str(STEPS), "--timeout", "600"),
]  # fmt: skip
CONFIGURATIONS: dict[str, tuple[int, list[str]]] = {
    "plain": (1, []),
    "snapshots and grids": (
        1, ["--ema-snapshot-every", "5", "--sample-every", "6", "--sample-steps", "2"],
    ),
    "two ranks": (2, []),
}  # fmt: skip


def contents(run: Path) -> dict[str, Any]:
    """All that a run leaves, by name, without what is a time."""
    found: dict[str, Any] = {}
    for name in ("log.jsonl", "spikes.jsonl"):
        text = (run / name).read_text() if (run / name).exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        found[name] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    parts = [(step_folders(run)[-1], ("model", "ema", "optimizer"))]
    parts += [(folder, tuple(SIGMAS)) for folder in step_folders(run / SNAPSHOTS)]
    for folder, names in parts:
        manifest = read_manifest(folder)
        for part in names:
            place = f"{folder.relative_to(run)}/{part}"
            found |= {f"{place}/{name}": t for name, t in read_part(folder, manifest, part).items()}
    found |= {path.name: path.read_bytes() for path in (run / "samples").glob("*")}
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not equal to the bit."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if not _equal(one.get(name), other.get(name))]


def _equal(one: Any, other: Any) -> bool:
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return torch.equal(one, other) if tensors else type(one) is type(other) and one == other


def logged(run: Path) -> int:
    """The step of the last line, as far as it is written in full."""
    log = run / "log.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def kill_one(folder: Path, size: int, arguments: list[str | Path], run: Path, draw: random.Random) -> bool:
    """Start or resume a run and kill a rank of it, or all, at a random moment; False if it had ended before."""
    target = logged(run) + draw.randint(0, 2 * EVERY)
    victims = draw.choice([[rank] for rank in range(size)] + [list(range(size))])
    with Ranks(folder, size, arguments) as ranks:
        deadline = time.monotonic() + PATIENCE
        while logged(run) < target and ranks.processes[0].exitcode is None:
            assert time.monotonic() < deadline, f"no step {target} in the time"
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        alive = all(ranks.processes[rank].exitcode is None for rank in victims)
        for rank in victims:
            ranks.processes[rank].kill()
        ended = ranks.wait()
    killed = [code for code in ended.codes if code == -9]
    assert not alive or killed or set(ended.codes) == {0}, ended.text
    assert "Traceback" not in ended.text, ended.text
    return bool(killed)


def kills(folder: Path, name: str, count: int, seed: int) -> int:
    """Kill runs of a configuration `count` times and compare each that ends; the number of steps done again."""
    size, options = CONFIGURATIONS[name]
    draw = random.Random(f"{seed} {name}")
    clean = folder / "clean" / "run"
    ended = train(folder / "clean", size, [*TINY, *options, "--out", clean])
    assert ended.codes == [0] * size, ended.text
    expected = contents(clean)
    done = again = number = 0
    while done < count:
        run, number = folder / f"run-{number}", number + 1
        while done < count:
            begun = bool(step_folders(run))
            if not begun:
                # Nothing is saved yet that could be resumed.
                shutil.rmtree(run, ignore_errors=True)
            start: list[str | Path] = ["--resume", run] if begun else [*TINY, *options, "--out", run]
            if not kill_one(folder / "killed", size, start, run, draw):
                break
            done += 1
            saved = max((int(path.name[5:]) for path in step_folders(run)), default=0)
            again += max(0, logged(run) - saved)
            if saved == STEPS:
                break
        if not step_folders(run) or int(step_folders(run)[-1].name[5:]) < STEPS:
            place: list[str | Path] = (
                ["--resume", run] if step_folders(run) else [*TINY, *options, "--out", run]
            )
            if not step_folders(run):
                shutil.rmtree(run, ignore_errors=True)
            ended = train(folder / "last", size, place)
            assert ended.codes == [0] * size, ended.text
        found = contents(run)
        if run.joinpath("samples", f"step-{STEPS:07d}.png").exists() or "--sample-every" not in options:
            assert not differences(found, expected), f"{name}, {run.name}: {differences(found, expected)}"
        else:
            # Killed after the last checkpoint: nothing is left to resume, and its grid is not drawn.
            left = differences(found, expected)
            assert left == [f"step-{STEPS:07d}.png"], f"{name}, {run.name}: {left}"
    return again


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=10, help="of each configuration (default: 10)")
    arguments = parser.parse_args()
    for name in CONFIGURATIONS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            steps = kills(Path(place), name, arguments.kills, arguments.seed)
        print(
            f"{name}: {arguments.kills} kills, {steps} steps done again, equal to the bit; "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    sys.exit(0)
