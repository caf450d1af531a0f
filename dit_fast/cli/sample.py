"""`dit-fast sample`: draw images from a checkpoint, lay them out in a labelled grid, and score them.

Under torchrun the ranks divide the batches among them; the first rank waits for all of them and writes the results.
"""

import argparse
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from dit_fast.cli.sample_options import add_arguments
from dit_fast.cli.sample_plan import Plan, make_plan
from dit_fast.data import to_pixels
from dit_fast.distributed.world import join_world
from dit_fast.errors import DitFastError, OutputError
from dit_fast.evaluation import Scorer
from dit_fast.sampling import Step, draw_grid, save_grid, short_label, to_pil, to_uint8
from dit_fast.sampling.progress import Progress
from dit_fast.sampling.shards import ARCHIVE, GRID, IMAGES, SCORES
from dit_fast.utils.files import TEMPORARY, write_atomically
from dit_fast.utils.locks import FolderLock
from dit_fast.utils.terminal import say

__all__ = ["add_arguments", "run"]

_MOST_ROWS = 20
# A grid is of the first images; no one looks at more of them at once.
_MOST_SHOWN = 4096
_MOST_FILMED = 16
# Ranks that are done wait this long for a slower one. A rank that ended is noticed at once.
_SLOWEST_RANK_SECONDS = 24 * 3600
_FRAMES = 40


def run(args: argparse.Namespace) -> int:
    """Run the command; 0, or a DitFastError. All that can be refused is refused before sampling begins."""
    plan = make_plan(args)
    sampler, parts = plan.sampler, plan.parts
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    if plan.rank == 0:
        ranks = f" and {plan.world - 1} more" if plan.world > 1 else ""
        say(
            f"{plan.info.summary()}; {parts.num} images, {len(sampler.schedule)} {sampler.config.solver} steps, "
            f"guidance {args.cfg_scale:g}, seed {args.seed}, on {plan.model.pos_embed.device}{ranks}",
        )
    with FolderLock(args.out, "sample", plan.rank):
        # Another process may have ended, and taken its shards away, since they were opened.
        parts.open()
        _draw_and_write(args, plan)
    return 0


def _draw_and_write(args: argparse.Namespace, plan: Plan) -> None:
    parts = plan.parts
    try:
        _draw(args, plan)
    except BaseException:
        if plan.rank == 0:
            parts.remove_if_empty()
        raise
    if plan.rank > 0:
        return

    images = parts.first(_MOST_SHOWN if plan.scorer is None else parts.num)
    if images.dtype != np.uint8:
        latents = np.concatenate(list(parts))
        path = args.out / "latents.npy"
        write_atomically(path, lambda temporary: np.save(temporary, latents))
        say(f"wrote {path}: {latents.shape[1]} channels, not decoded; the grid shows the first three of them")
        images = to_uint8(torch.from_numpy(images[:, :3]))
    _write_grid(args, plan, images)
    if args.save_images:
        _write_images(args, plan)
    if args.npz:
        path = args.out / ARCHIVE
        parts.write_npz(path)
        say(f"wrote {path} ({parts.num} images)")
    if args.gif:
        _write_film(args, plan)
    if plan.scorer is not None:
        _score(args, plan, plan.scorer, images)
    parts.remove()


def _draw(args: argparse.Namespace, plan: Plan) -> None:
    """Draw this rank's part of the missing shards, and return when all ranks have drawn theirs."""
    parts, sampler = plan.parts, plan.sampler
    there = parts.num - sum(len(parts.numbers(part)) for part in parts.missing())
    if there and plan.rank == 0:
        say(f"{there} of {parts.num} images are there already: resuming")
    progress = Progress(parts.num, len(sampler.schedule), there, show=plan.rank == 0)
    started = time.perf_counter()
    # Under a graph the trajectory is replayed in pieces between two reports.
    every = 1 if plan.model.pos_embed.device.type == "cpu" else max(1, len(sampler.schedule) // 10)

    def draw(shards: Sequence[int]) -> None:
        for part in shards:
            numbers = torch.tensor(list(parts.numbers(part)))
            samples = sampler(
                plan.told(plan.labels.of(numbers)),
                seed=args.seed,
                numbers=numbers,
                batch_size=parts.batch_size,
                on_step=progress.step,
                every=every,
            )
            parts.write(part, _as_kept(plan, samples))
            progress.finish(parts.finished())

    again = "run the command again, which keeps the finished images"
    with closing(progress), join_world("cpu", work="sampling", remedy=again) as world:
        # Each rank must have seen the same missing shards before any rank draws one.
        missing = world.gather(parts.missing())[0]
        world.set_timeout(_SLOWEST_RANK_SECONDS)
        draw(missing[plan.rank :: plan.world])
        world.wait(lambda: progress.finish(parts.finished()))
        # A shard of another rank that a file system lost or damaged since.
        if plan.rank == 0:
            draw(parts.missing())
    if plan.rank == 0:
        seconds = time.perf_counter() - started
        drawn = parts.num - there
        say(f"drew {drawn} images in {seconds:.1f} s ({drawn / seconds:.2f} images/s)")


def _as_kept(plan: Plan, samples: Tensor) -> np.ndarray:
    """Samples as a part keeps them: pixels uint8 (n, H, W, C), or latents float32 (n, C, H, W)."""
    if plan.decoder is not None:
        samples = plan.decode(samples)
    return to_uint8(samples) if plan.parts.dtype == np.uint8 else samples.cpu().numpy()


def _write_grid(args: argparse.Namespace, plan: Plan, images: np.ndarray) -> None:
    """OUT/sample.png: a row for each class or prompt, or rows of the only one."""
    labels, names, total = plan.labels.first(len(images)), plan.names, plan.parts.num
    rows: list[tuple[str, np.ndarray]] = []
    classes = list(dict.fromkeys(labels.tolist()))[:_MOST_ROWS]
    for number in classes:
        name = short_label(names[number]) if names else f"class {number}"
        drawn = images[(labels == number).numpy()]
        if len(classes) > 1:
            rows.append((name, drawn[: args.columns]))
        else:
            parts = range(0, min(len(drawn), _MOST_ROWS * args.columns), args.columns)
            rows += [("" if first else name, drawn[first : first + args.columns]) for first in parts]
    path = args.out / GRID
    picture = draw_grid(rows)
    write_atomically(path, lambda temporary: save_grid(picture, temporary))
    shown = sum(len(tiles) for _, tiles in rows)
    say(f"wrote {path} ({shown} of {total} images)" if shown < total else f"wrote {path}")


def _write_images(args: argparse.Namespace, plan: Plan) -> None:
    """OUT/images/NNNNNN-classC-NAME.png, all of them or none."""
    folder = args.out / IMAGES
    for killed in args.out.glob(f"{TEMPORARY}images-*"):
        shutil.rmtree(killed, ignore_errors=True)
    partial = args.out / f"{TEMPORARY}images-{os.getpid()}"
    try:
        partial.mkdir()
        number = 0
        for array in plan.parts:
            images = array if array.dtype == np.uint8 else to_uint8(torch.from_numpy(array[:, :3].copy()))
            for image in images:
                path = (
                    partial
                    / f"{number:06d}-{_tag(int(plan.labels.of(torch.tensor([number]))), plan.names)}.png"
                )
                to_pil(np.asarray(image)).save(path)
                number += 1
        if folder.exists():  # the same command's, which was stopped after it had written them
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        if isinstance(error, DitFastError):
            raise
        raise OutputError(f"cannot write {folder} ({error.strerror or error}); free space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"wrote {number} images to {folder}")


def _tag(label: int, names: Sequence[str] | None) -> str:
    """A class in a file's name: its number, and its name where that says more, "class207-golden_retriever"."""
    name = re.sub(r"\W+", "_", names[label].partition(",")[0]).strip("_")[:40] if names else ""
    return f"class{label}-{name}" if name and name != str(label) else f"class{label}"


def _write_film(args: argparse.Namespace, plan: Plan) -> None:
    """OUT/trajectory.gif: the first images on their way from noise, drawn once more to be looked at."""
    numbers = torch.tensor(list(plan.parts.numbers(0)))
    frames: list[np.ndarray] = []

    def keep(step: Step) -> None:
        state = step.state[:_MOST_FILMED].float()
        shown = (
            plan.decode(state) if plan.decoder is not None else state[:, : 1 if state.shape[1] == 1 else 3]
        )
        frames.append(to_uint8(shown))

    every = max(1, len(plan.sampler.schedule) // _FRAMES)
    plan.sampler(
        plan.told(plan.labels.of(numbers)),
        seed=args.seed,
        numbers=numbers,
        batch_size=len(numbers),
        on_step=keep,
        every=every,
    )
    columns = min(4, len(frames[0]))
    pictures = [
        draw_grid([("", frame[i : i + columns]) for i in range(0, len(frame), columns)]) for frame in frames
    ]
    path = args.out / "trajectory.gif"
    # The last frame stays for a second.
    durations = [80] * (len(pictures) - 1) + [1000]
    write_atomically(
        path,
        lambda temporary: pictures[0].save(
            temporary, save_all=True, append_images=pictures[1:], duration=durations, loop=0
        ),
    )
    say(f"wrote {path} ({len(pictures)} frames)")


def _score(args: argparse.Namespace, plan: Plan, scorer: Scorer, images: np.ndarray) -> None:
    """Print the scores and write OUT/scores.json. The samples are scored as they were written, in 256
    levels.
    """
    pixels = to_pixels(torch.from_numpy(images).permute(0, 3, 1, 2))
    scores = scorer(pixels, plan.labels.first(len(pixels)))
    for line in scores.lines():
        say(line)
    request = {
        "checkpoint": str(plan.info.path),
        "weights": plan.info.weights,
        "step": plan.info.step,
        "cfg_scale": args.cfg_scale,
        "steps": len(plan.sampler.schedule),
        "solver": plan.sampler.config.solver,
        "seed": args.seed,
    }
    path = args.out / SCORES
    text = json.dumps({**request, **scores.as_json()}, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    say(f"wrote {path}")
