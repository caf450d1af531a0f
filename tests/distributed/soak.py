"""Twenty random faults in one run: `python -m tests.distributed.soak [--seed N] [--faults N]`, about five minutes.

Each is one of: a rank killed, a SIGTERM to one rank, a kill within a save, a bit of the newest checkpoint flipped, a
file of it truncated. The run must end with the bits of one that nothing happened to, and lose no more than the
steps since the last checkpoint (the last but one, where the newest is damaged).
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from dit_fast.checkpoint.folder import latest_checkpoint, load_checkpoint, step_folders
from dit_fast.training.log import read_log
from tests.distributed.faulty import STAGES
from tests.distributed.ranks import train
from tests.distributed.test_faults import TINY, assert_same, finished

EVERY, STEPS = 5, 200
KINDS = ("kill", "term", "save", "flip", "truncate")


def damage(kind: str, newest: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content if kind == "flip" else content[: draw.randrange(len(content))])


def soak(folder: Path, seed: int, faults: int) -> None:
    draw = random.Random(seed)
    options = [*TINY, "--steps", str(STEPS), "--ckpt-every", str(EVERY), "--keep-checkpoints", "3"]
    ended = train(folder / "clean", 2, [*options, "--out", folder / "clean" / "run"])
    assert ended.codes == [0, 0], ended.text
    run, reached, lost, began = folder / "run", 0, 0, time.monotonic()
    for number in range(faults):
        kind = draw.choice(KINDS)
        rank, step = draw.randrange(2), reached + draw.randint(1, 2 * EVERY)
        fault = f"kill:{rank}:{step}"
        if kind == "term":
            fault = f"term:{rank}:{step}"
        elif kind == "save":
            step = -(-step // EVERY) * EVERY
            fault = f"save:{rank}:{step}:{draw.choice(STAGES)}"
        place = ["--resume", run] if step_folders(run) else [*options, "--out", run]
        if not step_folders(run) and run.exists():
            # Killed before its first checkpoint: there is nothing to go on from.
            run = folder / f"run-{number}"
            place = [*options, "--out", run]
        ended = train(folder / f"fault-{number}", 2, place, fault)
        assert 0 not in ended.codes, f"{fault} did not happen:\n{ended.text}"
        logged = max((line["step"] for line in read_log(run / "log.jsonl")), default=0)
        if kind in ("flip", "truncate") and len(step_folders(run)) > 1:
            damage(kind, step_folders(run)[-1], draw)
        reached = load_checkpoint(latest_checkpoint(run)).step if step_folders(run) else 0
        limit = 2 * EVERY if kind in ("flip", "truncate") else EVERY
        lost += logged - reached
        print(f"{number + 1}/{faults} {kind} {fault}: step {logged} reached, {reached} saved", flush=True)
        assert logged - reached <= limit, ended.text
    ended = train(folder / "last", 2, ["--resume", run])
    assert ended.codes == [0, 0], ended.text
    assert_same(run, finished(folder / "clean" / "run"))
    print(
        f"{faults} faults, {lost} steps done again, equal to the bit after {STEPS} steps; "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), arguments.seed, arguments.faults)
    sys.exit(0)
