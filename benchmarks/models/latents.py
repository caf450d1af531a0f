"""How fast a latent set is read, on one core: `python -m benchmarks.models.latents [--data SET] [--json FILE]`.

Without --data a set of the size of ImageNet's latents (4 x 32 x 32, both flips) with random values is written to a
temporary folder and removed again; it is read once before timing, so that the pages are warm. Printed beside the
limit, which is copying the same bytes from one array to another. Two rates: by the clock, and by the CPU time of
the thread, which does not count what other programs on the machine take:

    moments    rows of the shards, at random, with the flip's choice and the check for NaN
    batch      the same, and the posterior's sample: what the read-ahead thread does for a training step
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dit_fast.data import LatentSet, LatentStream, open_data, open_stream
from dit_fast.data.shards import (
    FORMAT,
    LABELS,
    MANIFEST,
    NAMES,
    HashingFile,
    publish,
    shard_name,
    write_npy_header,
    write_sealed,
)

_SHARD = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the reading of a latent set on one core.")
    parser.add_argument("--data", help="a set (default: a made one)")
    parser.add_argument("--images", type=int, default=16384, help="of the made set (default: 16384)")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the made set")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7, help="passes over the set (default: 7)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.data:
        report = _measure(args.data, args.batch_size, args.repeats)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_set(Path(folder), args.images, args.dtype)
            report = _measure(folder, args.batch_size, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def _measure(folder: str, batch_size: int, repeats: int) -> dict[str, object]:
    data = open_data(folder)
    if not isinstance(data, LatentSet):
        raise SystemExit(f"{folder} is a set of images, not of latents")
    stream = open_stream(data, batch_size, seed=0)
    assert isinstance(stream, LatentStream)
    sample = stream.moments(0)[0]
    steps = max(1, len(data.train) // batch_size)
    copies = [torch.empty_like(sample) for _ in range(16)]

    def copy() -> None:
        for step in range(steps):
            copies[step % 16].copy_(copies[(step + 7) % 16])

    passes: dict[str, tuple[Callable[[], None], int]] = {
        "copy": (copy, steps),
        "moments": (lambda: _walk(stream.moments, steps), steps),
        "batch": (lambda: _walk(stream.batch, max(1, steps // 8)), max(1, steps // 8)),
    }
    report: dict[str, object] = {
        "latents": len(data.train),
        "bytes_per_latent": sample[0].nbytes,
        "dtype": str(sample.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in report.items()))
    for run, _ in passes.values():
        run()
    walls: dict[str, list[float]] = {name: [] for name in passes}
    cpus: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, (run, count) in passes.items():
            started, worked = time.perf_counter(), time.thread_time()
            run()
            walls[name].append(count * batch_size / (time.perf_counter() - started))
            cpus[name].append(count * batch_size / (time.thread_time() - worked))
    for name in passes:
        wall, cpu = statistics.median(walls[name]), statistics.median(cpus[name])
        print(
            f"{name:8s} {wall:9.0f} latents/s, {wall * sample[0].nbytes / 1e9:5.2f} GB/s (median of {repeats}, "
            f"{min(walls[name]):.0f} to {max(walls[name]):.0f}); {cpu:9.0f} in a second of the core's own time"
        )
        report[name] = {
            "latents_per_second": sorted(walls[name]),
            "latents_per_cpu_second": sorted(cpus[name]),
        }
    return report


def _walk(read: Callable[[int], object], steps: int) -> None:
    for step in range(steps):
        read(step)


def make_set(folder: Path, images: int, dtype: str, side: int = 32) -> None:
    """A set of random moments of latents (4, side, side) in the layout that `dit-fast encode` writes."""
    generator = np.random.default_rng(0)
    shape = (2, 2, 4, side, side)

    def write(array: np.ndarray, file: HashingFile) -> None:
        write_npy_header(file, array.shape, array.dtype.name)
        file.write(array.data.cast("B"))

    shards = []
    for index, first in enumerate(range(0, images, _SHARD)):
        count = min(_SHARD, images - first)
        array = generator.standard_normal((count, *shape), dtype=np.float32).astype(dtype)
        facts = publish(folder / shard_name(index), partial(write, array))
        shards.append({"file": shard_name(index), "images": count, **facts})
    labels = generator.integers(0, 1000, images)
    write_sealed(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "images": images,
            "class_names": [str(label) for label in range(1000)],
            "sample_shape": list(shape),
            "vae": {
                "name": "none",
                "source": "none",
                "sha256": "",
                "shift": [0.0] * 4,
                "scale": [0.18215] * 4,
            },
            "settings": {"dtype": dtype, "image_size": 8 * side},
            "shards": shards,
            "labels": publish(folder / LABELS, partial(write, labels)),
            "names": publish(folder / NAMES, lambda file: file.write(b"[]")),
        },
    )


if __name__ == "__main__":
    main()
