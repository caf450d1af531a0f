"""Configurations and manifests with seeded faults: each is refused in one line, or read as a file without the fault is.

Each kind of file is mutated 200 times: types changed, keys dropped, numbers huge, negative or not finite, values nested
deeply, bytes that are not UTF-8, the end cut off. Files that carry a digest of themselves are sealed again, so that
the fault and not the digest is found. What a mutation leaves readable must hold values that a sound file can have.
"""

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_fast.data import open_latents
from dit_fast.data.encode import encode
from dit_fast.encoders.autoencoder import LatentDecoder
from dit_fast.errors import DitFastError
from dit_fast.interop import load_model
from dit_fast.interop.diffusers import DIFFUSERS, save_diffusers
from dit_fast.interop.objective import pipeline_facts
from dit_fast.models import DiT
from dit_fast.sampling.shards import SampleShards
from dit_fast.training.config import TrainConfig
from dit_fast.utils.files import digest_json
from tests import latent_sets
from tests.checkpoints import save_checkpoint
from tests.interop import test_misfits as test_misfits

MUTATIONS = 200
MODEL = {"input_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3, "patch_size": 2}


def places(content: Any, at: tuple = ()) -> Iterator[tuple]:
    """Paths to all values in nested objects and lists."""
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


ODD: tuple[Any, ...] = (
    None, True, False, "", "x", "\x1b[31m\n", "x" * 100_000, -1, 0, 1, 7, 0.5, -0.5, 2**31, 2**63, 10**30, 10**400,
    1e308, 1e-308, math.nan, math.inf, -math.inf, [], {}, [1], {"a": 1}, [[]], [None] * 3, "nan", "../../x", "\ud800",
)  # fmt: skip


def mutated(content: dict[str, Any], seed: int) -> tuple[dict[str, Any] | bytes, str]:
    """A changed copy, or bytes that are no JSON; and what was done."""
    draw = random.Random(seed)
    if draw.random() < 0.15:
        text = json.dumps(content).encode()
        cut = draw.randrange(len(text))
        kind = draw.choice(("cut", "bytes", "deep", "flip", "empty", "array"))
        changed = {
            "cut": text[:cut],
            "bytes": text[:cut] + b"\xff\xfe" + text[cut:],
            "deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
            "flip": text[:cut] + bytes([text[cut] ^ 0x80]) + text[cut + 1 :],
            "empty": b"",
            "array": b"[" + text + b"]",
        }
        return changed[kind], kind
    changed = copy.deepcopy(content)
    *outer, last = draw.choice(list(places(changed)))
    inner = changed
    for key in outer:
        inner = inner[key]
    action = draw.choice(("drop", "replace", "replace", "replace", "deep", "scale", "add"))
    if action == "drop":
        del inner[last]
    elif action == "deep":
        value: Any = inner[last]
        for _ in range(draw.choice((1, 10, 60, 200))):
            value = draw.choice(([value], {"a": value}))
        inner[last] = value
    elif action == "scale" and type(inner[last]) in (int, float):
        inner[last] *= draw.choice((-1, 0, 2, 10**6, 1e-9))
    elif action == "add" and isinstance(inner, dict):
        inner["unknown\n" * draw.choice((1, 50))] = draw.choice(ODD)
    else:
        inner[last] = draw.choice(ODD)
    return (
        changed,
        f"{action} {[*outer, last]} {str(inner.get(last) if isinstance(inner, dict) else '')[:40]!r}",
    )


@dataclass(frozen=True)
class Kind:
    """A file, how it is sealed after a change, and what reads it and returns what it believes."""

    path: Path
    read: Callable[[], Any]
    seal: Callable[[dict[str, Any]], dict[str, Any]] = lambda content: content


def sealed_manifest(content: dict[str, Any]) -> dict[str, Any]:
    body = {key: value for key, value in content.items() if key != "manifest_sha256"}
    return {**body, "manifest_sha256": digest_json(body)}


def sealed_json(content: dict[str, Any]) -> dict[str, Any]:
    body = {key: value for key, value in content.items() if key != "own_sha256"}
    return {**body, "own_sha256": digest_json(body)}


def loaded(path: Path) -> Any:
    """A forward pass, so that a model of nonsense would show; and all that is known of it."""
    model, info = load_model(path)
    side = model.x_embedder.img_size
    assert math.prod(side) <= 4096
    with torch.no_grad():
        answer = model(
            torch.zeros(1, model.in_channels, *side), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        )
    assert answer.isfinite().all()
    assert info.step is None or 0 <= info.step < 2**53
    return info


def checkpoint(folder: Path) -> Path:
    model = DiT(**MODEL)
    zeros = {
        f"{m}.{n}": torch.zeros_like(p)
        for m in ("exp_avg", "exp_avg_sq")
        for n, p in model.named_parameters()
    }
    config = TrainConfig(data="digits", model="DiT-S/2")
    data = {
        "name": "digits", "image_size": 32, "latent_size": 4, "channels": 4, "num_classes": 3, "num_train": 10,
        "num_heldout": 0, "holdout": 0.0, "fingerprint": "ab", "posterior": "logvar", "shift": [0.0] * 4,
        "scale": [0.5] * 4, "vae": {"name": "ema", "source": "a", "sha256": "b"},
    }  # fmt: skip
    manifest = {
        "step": 3, "ranks": 1, "samples_seen": 30, "seconds": 1.5, "seed": 0, "data": data,
        "train_config": {name: getattr(config, name) for name in ("data", "flip", "buckets", "device", "batch_size")},
        "class_names": ["a", "b", "c"], "diffusion": config.objective_arguments(), "ema_decay": 0.9999,
        "power_averages": {"step": 2, "sigma_rel": {"short": 0.05}}, "updates": 3, "skipped": 0, "loss_scale": None,
    }  # fmt: skip
    return save_checkpoint(folder, model, model.state_dict(), zeros, manifest)


def kinds(folder: Path, name: str) -> Kind:
    if name == "manifest of a checkpoint":
        step = checkpoint(folder / "run")
        return Kind(step / "manifest.json", lambda: loaded(step), sealed_manifest)
    if name == "config of a model":
        DiT(**MODEL).save_pretrained(folder / "model")
        return Kind(folder / "model" / "config.json", lambda: loaded(folder / "model"))
    if name == "config of a transformer":
        save_diffusers(DiT(**MODEL, in_channels=4), folder, conventions=DIFFUSERS)
        return Kind(folder / "config.json", lambda: loaded(folder))
    if name == "config of an autoencoder":
        import diffusers

        diffusers.logging.set_verbosity_error()
        test_misfits.write_vae(folder / "vae")

        def decode() -> Any:
            decoder = LatentDecoder(str(folder / "vae"), 4)
            assert all(map(math.isfinite, (*decoder.shift, *decoder.scale)))
            assert decoder(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 2 * decoder.factor, 2 * decoder.factor)
            return decoder.scale

        return Kind(folder / "vae" / "config.json", decode)
    if name in ("config of a scheduler", "index of a pipeline"):
        test_misfits.write_scheduler(folder / "p", {"_class_name": "DDIMScheduler", **test_misfits.DDPM})
        file = "model_index.json" if name == "index of a pipeline" else "scheduler/scheduler_config.json"

        def facts() -> Any:
            found = pipeline_facts(folder / "p", 3)
            assert found.diffusion["noise_schedule"] in ("linear", "squaredcos_cap_v2")
            assert 0 < found.diffusion["diffusion_steps"] <= 10**6
            return found

        return Kind(folder / "p" / file, facts)
    if name == "request of samples":
        parts = SampleShards(
            folder / "s", {"weights": "a", "guidance": [4.0, 3], "vae": None}, 8, 4, (2, 2, 1), "uint8"
        )
        parts.open()
        parts.write(0, np.zeros((4, 2, 2, 1), np.uint8))
        return Kind(folder / "s" / "parts" / "request.json", parts.open)
    latent_sets.write_images(folder / "images")
    latent_sets.write_vae(folder / "vae")
    assert encode(latent_sets.settings(folder)).complete
    if name == "manifest of latents":

        def opened() -> Any:
            data = open_latents(folder / "set", holdout=0.3)
            assert data.train.batch(torch.arange(2)).isfinite().all()
            return data.describe()

        return Kind(folder / "set" / "manifest.json", opened, sealed_json)
    file = {"settings of latents": "encoding.json", "record of a shard": "shard-00000.json"}[name]

    def continued() -> Any:
        assert encode(latent_sets.settings(folder)).complete
        return open_latents(folder / "set", verify=True).describe()

    return Kind(folder / "set" / file, continued, sealed_json)


NAMES = (
    "manifest of a checkpoint", "config of a model", "config of a transformer", "config of an autoencoder",
    "config of a scheduler", "index of a pipeline", "request of samples", "manifest of latents", "settings of latents",
    "record of a shard",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_fault_in_a_file_is_a_traceback_or_believed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "latents" in name or "shard" in name:
        latent_sets.install(monkeypatch)
    torch.manual_seed(0)
    kind = kinds(tmp_path, name)
    original = kind.path.read_bytes()
    content = json.loads(original)
    kind.read()
    messages, read = [], 0
    for seed in range(MUTATIONS):
        changed, done = mutated(content, seed)
        text = changed if isinstance(changed, bytes) else json.dumps(kind.seal(changed)).encode()
        kind.path.write_bytes(text)
        try:
            kind.read()
            read += 1
        except DitFastError as error:
            messages.append((str(error), done))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {done}: {type(error).__name__}: {error}") from error
        kind.path.write_bytes(original)
    print(f"{name}: {len(messages)} refused, {read} read")
    for message, done in messages:
        assert "\n" not in message, done
        assert len(message) < 2000, done
    # A shard whose record is odd is encoded again.
    assert messages or name == "record of a shard"
