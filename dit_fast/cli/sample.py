"""`dit-fast sample`: draw images from a checkpoint, lay them out in a labeled grid, and score them.

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

from dit_fast.cli.sample_options import SampleOptions
from dit_fast.cli.sample_request import SampleRequest, load_request
from dit_fast.data import to_pixels
from dit_fast.distributed.world import join_world
from dit_fast.errors import DitFastError, OutputError
from dit_fast.evaluation import Scorer
from dit_fast.sampling import Step, draw_grid, save_grid, short_label, to_pil, to_uint8
from dit_fast.sampling.progress import Progress
from dit_fast.sampling.shards import ARCHIVE, GRID, IMAGES, SCORES
from dit_fast.utils.files import TEMPORARY, write_atomically
from dit_fast.utils.locks import FolderLock
from dit_fast.utils.options import add_options, read_options
from dit_fast.utils.terminal import say

_MOST_ROWS = 20
# A grid shows the first images.
_MOST_SHOWN = 4096
_MOST_FILMED = 16
# Ranks that are done wait this long for a slower one. A rank that ended is noticed at once.
_SLOWEST_RANK_SECONDS = 24 * 3600
_FRAMES = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, SampleOptions)


def run(args: argparse.Namespace) -> int:
    sample(read_options(SampleOptions, args))
    return 0


def sample(options: SampleOptions) -> None:
    """Draw samples and write the results. Everything that can be refused is refused before sampling begins."""
    request = load_request(options)
    sampler, parts = request.sampler, request.parts
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    if request.rank == 0:
        ranks = f" and {request.world - 1} more" if request.world > 1 else ""
        say(
            f"{request.info.summary()}; {parts.num} images, {len(sampler.schedule)} {sampler.config.solver} steps, "
            f"{sampler.config.guidance.summary(request.model.in_channels)}, seed {options.seed}, on "
            f"{request.model.pos_embed.device}{ranks}",
        )
    with FolderLock(options.out, "sample", request.rank):
        # Another process may have finished, and removed its shards, since they were opened.
        parts.open()
        _draw_and_write(request)


def _draw_and_write(request: SampleRequest) -> None:
    parts = request.parts
    try:
        _draw(request)
    except BaseException:
        if request.rank == 0:
            parts.remove_if_empty()
        raise
    if request.rank > 0:
        return

    images = parts.first(_MOST_SHOWN if request.scorer is None else parts.num)
    if images.dtype != np.uint8:
        latents = np.concatenate(list(parts))
        path = request.options.out / "latents.npy"
        write_atomically(path, lambda temporary: np.save(temporary, latents))
        say(f"wrote {path}: {latents.shape[1]} channels, not decoded; the grid shows the first three of them")
        images = to_uint8(torch.from_numpy(images[:, :3]))
    _write_grid(request, images)
    if request.options.save_images:
        _write_images(request)
    if request.options.npz:
        path = request.options.out / ARCHIVE
        parts.write_npz(path)
        say(f"wrote {path} ({parts.num} images)")
    if request.options.gif:
        _write_film(request)
    if request.scorer is not None:
        _score(request, request.scorer, images)
    parts.remove()


def _draw(request: SampleRequest) -> None:
    """Draw the missing shards of this rank, and return when all ranks are done."""
    parts, sampler = request.parts, request.sampler
    there = parts.num - sum(len(parts.numbers(part)) for part in parts.missing())
    if there and request.rank == 0:
        say(f"{there} of {parts.num} images are there already: resuming")
    progress = Progress(parts.num, len(sampler.schedule), there, show=request.rank == 0)
    started = time.perf_counter()
    # Under a graph the trajectory is replayed in pieces between two reports.
    every = 1 if request.model.pos_embed.device.type == "cpu" else max(1, len(sampler.schedule) // 10)

    def draw(shards: Sequence[int]) -> None:
        for part in shards:
            numbers = torch.tensor(list(parts.numbers(part)))
            samples = request.draw(numbers, parts.batch_size, progress.step, every)
            parts.write(part, _as_kept(request, samples))
            progress.finish(parts.finished())

    again = "run the command again, which keeps the finished images"
    with closing(progress), join_world("cpu", work="sampling", remedy=again) as world:
        # Each rank must have seen the same missing shards before any rank draws one.
        missing = world.gather(parts.missing())[0]
        world.set_timeout(_SLOWEST_RANK_SECONDS)
        draw(missing[request.rank :: request.world])
        world.wait(lambda: progress.finish(parts.finished()))
        # A shard of another rank may have been lost or damaged by the file system since.
        if request.rank == 0:
            draw(parts.missing())
    if request.rank == 0:
        seconds = time.perf_counter() - started
        drawn = parts.num - there
        say(f"drew {drawn} images in {seconds:.1f} s ({drawn / seconds:.2f} images/s)")


def _as_kept(request: SampleRequest, samples: Tensor) -> np.ndarray:
    """Samples as a shard stores them: pixels uint8 (n, H, W, C), or latents float32 (n, C, H, W)."""
    if request.decoder is not None:
        samples = request.decode(samples)
    return to_uint8(samples) if request.parts.dtype == np.uint8 else samples.cpu().numpy()


def _write_grid(request: SampleRequest, images: np.ndarray) -> None:
    """OUT/sample.png: a row for each class or prompt, or rows of the only one."""
    labels, names, total = request.labels.first(len(images)), request.names, request.parts.num
    rows: list[tuple[str, np.ndarray]] = []
    classes = list(dict.fromkeys(labels.tolist()))[:_MOST_ROWS]
    for number in classes:
        name = short_label(names[number]) if names else f"class {number}"
        drawn = images[(labels == number).numpy()]
        if len(classes) > 1:
            rows.append((name, drawn[: request.options.columns]))
        else:
            parts = range(0, min(len(drawn), _MOST_ROWS * request.options.columns), request.options.columns)
            rows += [
                ("" if first else name, drawn[first : first + request.options.columns]) for first in parts
            ]
    path = request.options.out / GRID
    picture = draw_grid(rows)
    write_atomically(path, lambda temporary: save_grid(picture, temporary))
    shown = sum(len(tiles) for _, tiles in rows)
    say(f"wrote {path} ({shown} of {total} images)" if shown < total else f"wrote {path}")


def _write_images(request: SampleRequest) -> None:
    """OUT/images/NNNNNN-classC-NAME.png, all of them or none."""
    folder = request.options.out / IMAGES
    for killed in request.options.out.glob(f"{TEMPORARY}images-*"):
        shutil.rmtree(killed, ignore_errors=True)
    partial = request.options.out / f"{TEMPORARY}images-{os.getpid()}"
    try:
        partial.mkdir()
        number = 0
        for array in request.parts:
            images = array if array.dtype == np.uint8 else to_uint8(torch.from_numpy(array[:, :3].copy()))
            for image in images:
                path = (
                    partial
                    / f"{number:06d}-{_tag(int(request.labels.of(torch.tensor([number]))), request.names)}.png"
                )
                to_pil(np.asarray(image)).save(path)
                number += 1
        if folder.exists():  # written by the same command before it was stopped
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
    """A class in a file name: its number, and its name if that differs, as in "class207-golden_retriever"."""
    name = re.sub(r"\W+", "_", names[label].partition(",")[0]).strip("_")[:40] if names else ""
    return f"class{label}-{name}" if name and name != str(label) else f"class{label}"


def _write_film(request: SampleRequest) -> None:
    """OUT/trajectory.gif: the first images on their way from noise, which are drawn again for it."""
    numbers = torch.tensor(list(request.parts.numbers(0)))
    frames: list[np.ndarray] = []

    def keep(step: Step) -> None:
        state = step.state[:_MOST_FILMED].float()
        shown = (
            request.decode(state)
            if request.decoder is not None
            else state[:, : 1 if state.shape[1] == 1 else 3]
        )
        frames.append(to_uint8(shown))

    every = max(1, len(request.sampler.schedule) // _FRAMES)
    request.draw(numbers, len(numbers), keep, every)
    columns = min(4, len(frames[0]))
    pictures = [
        draw_grid([("", frame[i : i + columns]) for i in range(0, len(frame), columns)]) for frame in frames
    ]
    path = request.options.out / "trajectory.gif"
    # The last frame stays for a second.
    durations = [80] * (len(pictures) - 1) + [1000]
    write_atomically(
        path,
        lambda temporary: pictures[0].save(
            temporary, save_all=True, append_images=pictures[1:], duration=durations, loop=0
        ),
    )
    say(f"wrote {path} ({len(pictures)} frames)")


def _score(request: SampleRequest, scorer: Scorer, images: np.ndarray) -> None:
    """Print the scores and write OUT/scores.json. Samples are scored as they were written, in 256 levels."""
    pixels = to_pixels(torch.from_numpy(images).permute(0, 3, 1, 2))
    scores = scorer(pixels, request.labels.first(len(pixels)))
    for line in scores.lines():
        say(line)
    facts = {
        "checkpoint": str(request.info.path),
        "weights": request.info.weights,
        "step": request.info.step,
        "cfg_scale": request.sampler.config.guidance.scale,
        "cfg_channels": request.sampler.config.guidance.guided(request.model.in_channels),
        "steps": len(request.sampler.schedule),
        "solver": request.sampler.config.solver,
        "seed": request.options.seed,
    }
    path = request.options.out / SCORES
    text = json.dumps({**facts, **scores.as_json()}, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    say(f"wrote {path}")
