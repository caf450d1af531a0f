"""Manifest of a checkpoint: manifest.json, with the SHA-256 of every other file and of its own content."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_fast.errors import CheckpointError
from dit_fast.utils.files import digest_json, file_facts, read_object
from dit_fast.utils.schema import (
    anything,
    array,
    fields,
    flag,
    integer,
    maybe,
    number,
    one_of,
    require,
    table,
    text,
)

FORMAT = "dit_fast checkpoint 1"
MANIFEST = "manifest.json"
# Without separators, and not starting with a dot: a manifest must not name files outside its folder.
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*")
_STEP_FOLDER = re.compile(r"step-(\d+)")
_DIGEST = fields({"bytes": integer(), "sha256": text(r"[0-9a-f]{64}")})
_DATA = fields(
    {},
    {
        "name": text(),
        "image_size": maybe(integer(1, 1 << 16)),
        "latent_size": integer(1, 1 << 16),
        "channels": integer(1, 1 << 16),
        "num_classes": integer(),
        "num_train": integer(),
        "num_heldout": integer(),
        "holdout": number(0, 1),
        "fingerprint": text(),
        "posterior": text(),
        "shift": array(number(-1e9, 1e9)),
        "scale": array(number(-1e9, 1e9)),
        "vae": fields({}, {"name": maybe(text()), "source": maybe(text()), "sha256": maybe(text())}),
        "buckets": array(array(integer(1, 1 << 16), 2)),
        "bucket_images": array(integer()),
        "captions": table(anything),
        "pixels": fields({"background": text(), "raw_pixels": flag}),
    },
)
_DIFFUSION = fields(
    {},
    {
        **{name: text() for name in ("prediction", "path", "loss_weighting", "noise_schedule")},
        **{
            name: flag
            for name in ("learn_sigma", "learned_range", "sigma_small", "use_kl", "rescale_learned_sigmas")
            + ("predict_xstart", "direction_loss")
        },
        "objective": one_of("diffusion", "flow"),
        "min_snr_gamma": maybe(number(0)),
        "diffusion_steps": integer(1, 1 << 20),
    },
)
_LOG = fields(
    {},
    {
        "line_step": integer(),
        "skipped": integer(),
        "averages": fields({"count": integer(), "sums": array(number()), "loss_scale": number(0)}),
        "spikes": fields({"recent": array(number()), "sums": array(number()), "counts": array(number(0))}),
    },
)
_SCHEMA = fields(
    {
        "step": integer(),
        "files": table(_DIGEST),
    },
    {
        "ranks": integer(1),
        "samples_seen": integer(),
        "seconds": number(0),
        "seed": integer(0, 2**63 - 1),
        "train_config": fields({}, {"buckets": maybe(text()), "flip": maybe(flag), "device": text()}),
        "working_directory": maybe(text()),
        "data": _DATA,
        "class_names": maybe(array(text())),
        "diffusion": _DIFFUSION,
        "ema_decay": number(0, 1),
        "power_averages": maybe(fields({"step": integer(), "sigma_rel": table(number(0, 1), r"\w+")})),
        "updates": integer(),
        "skipped": integer(),
        "loss_scale": maybe(fields({"scale": number(0), "growth": number(0)})),
        "log": maybe(_LOG),
        "init_from": maybe(
            fields({"path": text(), "weights": text(), "sha256": text()}, {"step": maybe(integer())})
        ),
        "adapter": maybe(fields({"config": fields({}), "base_sha256": text()})),
        "unreadable": fields({"files": table(text())}, {"fingerprint_without": text()}),
    },
)


def working_directory() -> str | None:
    """Current working directory for JSON; None where it was deleted, or its name is not UTF-8."""
    try:
        folder = os.getcwd()
        folder.encode()
    except (OSError, UnicodeEncodeError):
        return None
    return folder


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json to `folder`, with the digest of its own content."""
    sealed = {**manifest, "manifest_sha256": digest_json(manifest)}
    (folder / MANIFEST).write_text(json.dumps(sealed, indent=2) + "\n")


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and verify it against its own digest.

    Args:
        path: Checkpoint folder.

    Returns:
        The manifest. Keys: step, samples_seen, seed, train_config, data (name, image_size, channels, num_classes,
        fingerprint, ...), class_names, diffusion (arguments of `create_objective`), ema_decay, files.

    Raises:
        CheckpointError: The manifest is missing, damaged, of another format, or contradicts itself.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not os.path.lexists(file):
        raise CheckpointError(f"{path} is not a checkpoint of dit-fast train: it has no {MANIFEST}")
    manifest = read_object(file, CheckpointError, what="a manifest")
    if not str(manifest.get("format", "")).startswith("dit_fast checkpoint"):
        raise CheckpointError(f"{file} is not the manifest of a dit-fast checkpoint")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {manifest['format']!r}; this version reads {FORMAT!r}")
    # Verified before the schema: damage is reported as damage.
    if manifest.pop("manifest_sha256", None) != digest_json(manifest):
        raise CheckpointError(f"{file} is damaged: its content does not match its own SHA-256")
    require(manifest, _SCHEMA, file, CheckpointError)
    if foreign := [name for name in manifest["files"] if not _PLAIN_NAME.fullmatch(name)]:
        raise CheckpointError(f"{file} names files outside its folder: {', '.join(map(repr, foreign))}")
    _cross_check(folder, manifest)
    return manifest


def _cross_check(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError where fields of a manifest, or the name of its folder, contradict each other."""
    data, step = manifest.get("data", {}), manifest["step"]
    named = _STEP_FOLDER.fullmatch(folder.name)
    problems = []
    if named and int(named[1]) != step:
        problems.append(f"its step is {step}, its folder is named {folder.name}")
    if "config.json" not in manifest["files"]:
        problems.append("config.json is not listed")
    if manifest.get("updates", 0) > step:
        problems.append(f"{manifest['updates']} updates in {step} steps")
    if (manifest.get("power_averages") or {"step": 0})["step"] > step:
        problems.append(f"averages up to step {manifest['power_averages']['step']} at step {step}")
    per_channel = [len(data[name]) for name in ("shift", "scale") if name in data]
    if per_channel and per_channel != [data.get("channels", per_channel[0])] * 2:
        problems.append(
            f"{per_channel} shifts and scales for {data.get('channels', per_channel[0])} channels"
        )
    if not all(data.get("scale", [1])):
        problems.append("a scale of 0")
    buckets = (manifest.get("train_config", {}).get("buckets") or "").count(",") + 1
    if "bucket_images" in data and not len(data.get("buckets", ())) == len(data["bucket_images"]) == buckets:
        problems.append(f"images of {len(data['bucket_images'])} buckets in a run with {buckets}")
    if (names := manifest.get("class_names")) and len(names) != data.get("num_classes", len(names)):
        problems.append(f"{len(names)} class_names for {data['num_classes']} classes")
    if problems:
        raise CheckpointError(f"{folder / MANIFEST} contradicts itself: {'; '.join(problems)}")


def verify_files(path: str | Path, manifest: dict[str, Any], names: Sequence[str] | None = None) -> None:
    """Compare files with the size and SHA-256 in the manifest.

    Args:
        path: Checkpoint folder.
        manifest: Its manifest.
        names: Files to compare; None compares all, and reports unlisted safetensors files.

    Raises:
        CheckpointError: Lists every difference.
    """
    problems = []
    for name in manifest["files"] if names is None else names:
        expected = manifest["files"][name]
        file = Path(path) / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}")
        elif file_facts(file, CheckpointError) != expected:
            problems.append(f"{name} does not match its SHA-256")
    if names is None:
        present = (file.name for file in Path(path).glob("*.safetensors"))
        problems += [
            f"{name} is not listed in the manifest" for name in sorted(set(present) - set(manifest["files"]))
        ]
    if problems:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)}")
