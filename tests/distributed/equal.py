"""Run by test_parallel.py in two ranks: every way of sharing a model gives the model of one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dit_fast.checkpoint.folder import (
    Retention,
    latest_checkpoint,
    load_checkpoint,
    load_into,
    model_config,
    read_part,
)
from dit_fast.checkpoint.manifest import read_manifest
from dit_fast.checkpoint.power_ema import EVERY, SIGMAS, PowerAverages
from dit_fast.checkpoint.writer import CheckpointWriter
from dit_fast.distributed.sharding import groups_of, micro_batch, parallelize, rank_rows, whole
from dit_fast.distributed.world import World, join_world
from dit_fast.errors import CheckpointError
from dit_fast.models import DiT
from dit_fast.training.optimizer import AdamWEma
from tests.patience import PATIENCE
from tests.tolerance import rounding

STEPS, BATCH = 4, 8
State = dict[str, dict[str, Tensor]]


def build() -> DiT:
    torch.manual_seed(0)
    # 27 rows of labels do not divide by two, and a patch projection of one channel leaves small shards.
    model = DiT(8, 4, 1, hidden_size=16, depth=2, num_heads=2, num_classes=26).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    x, target = torch.randn(2, BATCH, 1, 8, 8, generator=draw)
    t = torch.randint(0, 1000, (BATCH,), generator=draw)
    return x, t, torch.randint(0, 26, (BATCH,), generator=draw), target


class Run:
    """A model in training, as the trainer has it."""

    def __init__(self, world: World, mode: str, accumulate: int = 1, recompute: str | None = None, **options):
        self.world, self.accumulate = world, accumulate
        self.model = build()
        self.module = parallelize(self.model, world, mode, recompute=recompute, **options)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        # A large eps: Adam divides gradients that are rounding noise by themselves otherwise.
        self.optimizer = AdamWEma(self.trained.values(), lr=1e-2, eps=1e-3, ema_decay=0.9, max_grad_norm=0.5)
        self.averages = PowerAverages(self.trained)
        self.rows = rank_rows(BATCH, accumulate, world)
        self.step = 0

    def train(self, steps: int = STEPS) -> list[float]:
        losses = []
        for _ in range(steps):
            mine = [tensor[self.rows].chunk(self.accumulate) for tensor in batch(self.step)]
            self.optimizer.zero_grad()
            total = torch.zeros(())
            for number, (x, t, y, target) in enumerate(zip(*mine, strict=True), 1):
                with micro_batch(self.module, number == self.accumulate):
                    loss = (self.module(x, t, y)[:, :1] - target).square().mean() / self.accumulate
                    loss.backward()
                total += loss.detach()
            self.optimizer.step()
            losses.append(self.world.mean(total).item())
            self.step += 1
            self.averages.update(self.step * EVERY)
        return losses

    def state(self) -> State:
        model = self.model.state_dict()
        averages = {name: self.optimizer.average(p) for name, p in self.trained.items()}
        moments = {
            f"{moment}.{name}": self.optimizer.state[p][moment]
            for name, p in self.trained.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        power = self.averages.state(model)
        return {"model": model, "ema": {**model, **averages}, "optimizer": moments, **power}

    def whole_state(self) -> State:
        return {
            part: {n: whole(t).clone() for n, t in tensors.items()} for part, tensors in self.state().items()
        }


def furthest(one: State, other: State) -> float:
    assert {part: sorted(tensors) for part, tensors in one.items()} == {
        part: sorted(tensors) for part, tensors in other.items()
    }
    return max(
        ((tensor - other[part][name]).abs().max() / tensor.abs().max().clamp(min=1)).item()
        for part, tensors in one.items()
        for name, tensor in tensors.items()
    )


def modes(world: World) -> None:
    alone = Run(World(), "none")
    expected = alone.train()
    states = {}
    for mode, accumulate, options in (
        ("ddp", 1, {}),
        ("ddp", 2, {}),
        ("fsdp", 1, {}),
        ("fsdp", 2, {}),
        ("fsdp", 1, {"recompute": "blocks"}),
        ("hsdp", 1, {}),
        ("hsdp", 2, {}),
    ):
        machines = World(world.rank, 0, 2, 1, store=world.store) if mode == "hsdp" else world
        run = Run(machines, mode, accumulate, **options)
        losses = run.train()
        state = states[mode, accumulate] = run.whole_state()
        error = max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True))
        distance = furthest(alone.whole_state(), state)
        if world.is_first:
            print(f"{mode} x{accumulate} {options}: loss {error:.1e}, state {distance:.1e}", flush=True)
        assert error <= rounding(), (mode, accumulate, losses, expected)
        assert distance <= rounding(), (mode, accumulate, distance)
        assert len(groups_of(run.module)) == {"ddp": 0, "fsdp": 1, "hsdp": 2}[mode]
    # One addition of two numbers is the same in whatever order, so that sharding changes no bit.
    assert furthest(states["ddp", 1], states["fsdp", 1]) == 0.0
    low = Run(world, "fsdp", param_dtype=torch.bfloat16)
    assert abs(low.train()[-1] - expected[-1]) < 2e-2 * expected[-1]
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


def checkpoints(world: World, folder: Path) -> None:
    run = Run(world, "fsdp")
    run.train()
    expected = run.whole_state()
    for name, background in (("beside", True), ("within", False)):
        with CheckpointWriter(folder / name, Retention(2), world, background) as writer:
            writer.save(model_config(run.model), run.state(), {"step": STEPS, "train_config": {}})
            # What is trained on while the copy is written is not in it.
            with torch.no_grad():
                for p in run.trained.values():
                    p.mul_(2.0)
            path = writer.wait()
        with torch.no_grad():
            for p in run.trained.values():
                p.mul_(0.5)
        load_into(path, read_manifest(path), run.state())
        assert latest_checkpoint(folder / name, world) == path
    files = [sorted(p for p in (folder / name).rglob("*") if p.is_file()) for name in ("beside", "within")]
    assert [p.name for p in files[0]] == [p.name for p in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))

    loaded = load_checkpoint(path)
    power = {part: read_part(path, loaded.manifest, part) for part in SIGMAS}
    whole_parts = {"model": loaded.model, "ema": loaded.ema, "optimizer": loaded.optimizer, **power}
    assert furthest(expected, whole_parts) == 0.0
    for mode in ("fsdp", "ddp"):
        other = Run(world, mode)
        other.train(1)
        load_into(path, read_manifest(path), other.state())
        assert furthest(expected, other.whole_state()) == 0.0, mode
    alone = Run(World(), "none")
    alone.train(1)
    load_into(path, read_manifest(path), alone.state())
    assert furthest(expected, alone.whole_state()) == 0.0

    # PyTorch's own reader understands the files of a part.
    if world.is_first:
        part = folder / "part"
        part.mkdir()
        for file in path.glob("ema-*.safetensors"):
            (part / file.name).write_bytes(file.read_bytes())
        read = {name: torch.zeros_like(tensor) for name, tensor in expected["ema"].items()}
        dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(part)), no_dist=True)
        assert furthest({"ema": expected["ema"]}, {"ema": read}) == 0.0

    # A lost shard is said by name, on every rank, before anything is changed.
    world.gather("here")
    manifest = read_manifest(path)
    kept = {
        name: entry for name, entry in manifest["files"].items() if name != "model-00001-of-00002.safetensors"
    }
    with pytest.raises(
        CheckpointError, match=r"model is missing pieces of blocks\.0\.adaLN_modulation\.1\.bias"
    ):
        load_into(path, {**manifest, "files": kept}, run.state())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with join_world("cpu", start_timeout=PATIENCE) as world:
        modes(world)
        checkpoints(world, folder)
        print("all equal", flush=True)
