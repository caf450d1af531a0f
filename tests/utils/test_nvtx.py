"""NVTX ranges: which stand around what, in which order and nesting; and that there are none when they are off."""

import functools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import triton
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from dit_fast.distributed.world import World
from dit_fast.errors import MissingExtraError
from dit_fast.training import TrainConfig, Trainer, train
from dit_fast.training import run as training_run
from dit_fast.utils import nvtx as ranges
from tests.tolerance import assert_close
from tests.training.test_step import TINY, image_set, run, trainer

# What the nvtx package knows without matplotlib.
NVTX_COLORS = {
    "green", "blue", "yellow", "purple", "rapids", "cyan", "red", "white", "darkgreen", "orange",
}  # fmt: skip


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """NVTX ranges as they open, each after those that it is nested in, by a stand-in for the nvtx package."""
    seen: list[str] = []
    around: list[str] = []

    @contextmanager
    def annotate(name: str, domain: str, color: str) -> Iterator[None]:
        assert domain == "dit_fast"
        inner = "darkgreen" if name.startswith("block_") else "rapids"
        assert color == ranges.COLORS.get(name, inner)
        assert color in NVTX_COLORS
        around.append(name)
        seen.append("/".join(around))
        try:
            yield
        finally:
            assert around.pop() == name

    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=annotate))
    return seen


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, "depth": 2, "nvtx": True, **changes})


def test_ranges_stand_around_the_parts_of_a_run(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(training_run, "open_set", lambda config: image_set())
    train(config(steps=2, ckpt_every=1), tmp_path / "run")
    step = [
        "run/step",
        "run/step/data",
        "run/step/draw",
        "run/step/forward",
        "run/step/forward/block_0",
        "run/step/forward/block_1",
        "run/step/backward",
        "run/step/optimizer_ema",
    ]
    assert opened == ["run", *step, "run/step/checkpoint", *step, "run/checkpoint"]
    assert triton.knobs.runtime.launch_enter_hook.calls == []


def test_a_launch_is_a_range_in_its_block(opened):
    """Triton calls its hooks around each launch, here by hand; the name is that of the launch's metadata."""
    each = trainer(nvtx=True)
    metadata = types.SimpleNamespace(get=lambda: {"name": "adaln_fwd[8x4x16 float32]"})

    def launch(module: nn.Module, arguments: Any) -> None:
        triton.knobs.runtime.launch_enter_hook(metadata)
        triton.knobs.runtime.launch_exit_hook(metadata)

    each.model.blocks[0].attn.register_forward_pre_hook(launch)
    run(each, 1)
    assert not any("adaln_fwd" in name for name in opened)
    with ranges.mark_launches(each.ranges):
        run(each, 1)
    assert opened[-3:] == ["forward/block_0/adaln_fwd[8x4x16 float32]", "backward", "optimizer_ema"]


@contextmanager
def two_ranks() -> Iterator[World]:
    """Two ranks of which this is one, with collectives that do nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield World(rank=0, size=2, local_size=2)
    finally:
        dist.destroy_process_group()


def test_communication_stands_where_it_is_started(opened):
    for mode in ("ddp", "fsdp"):
        with two_ranks() as world:
            each = Trainer(config(depth=1, parallel=mode), image_set(), world=world)
            # Flags that were not exchanged cannot be read, and the group has no timeouts.
            each.checks_every_step, each._patience = False, each.config.timeout
            opened.clear()
            each.train_step(*each.stream.stored(0, each.rows))
        where = [name.removesuffix("/communication") for name in opened if name.endswith("/communication")]
        expected = {
            "ddp": ["backward", "optimizer_ema"],
            # Weights of the root, then of the block; gradients of the block, then of the root.
            "fsdp": ["forward", "forward", "backward", "backward", "optimizer_ema"],
        }
        assert where == expected[mode], (mode, opened)


def test_ranges_do_not_break_the_graph_of_a_compiled_block(monkeypatch, opened):
    """Blocks are compiled whole (fullgraph), which fails where there is a range inside."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled, eager = trainer(nvtx=True, compile=True), trainer()
    for each in (compiled, eager):
        run(each, 2)
    assert_close([value.loss for value in compiled.values()], [value.loss for value in eager.values()])
    assert opened.count("forward/block_0") == 2


def test_ranges_that_are_off_are_one_empty_context(opened):
    assert ranges.OFF("forward") is ranges.OFF("backward")
    each = trainer(depth=2)
    assert each.ranges is ranges.OFF
    with ranges.mark_launches(each.ranges):
        assert triton.knobs.runtime.launch_enter_hook.calls == []
        run(each, 1)
    assert opened == []
    assert not each.model.blocks[0]._forward_pre_hooks


def test_a_range_is_closed_when_its_block_fails(opened):
    each = trainer(nvtx=True)

    def fail(module: nn.Module, arguments: Any) -> None:
        raise RuntimeError("out of memory")

    handle = each.model.blocks[0].attn.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        each.train_step(*each.stream.stored(0))
    handle.remove()
    opened.clear()
    run(each, 1)
    assert opened == ["draw", "forward", "forward/block_0", "backward", "optimizer_ema"]


def test_without_nvtx_a_cpu_build_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(MissingExtraError, match=r"nvtx is not installed; pip install .*\[profile\]'"):
        trainer(nvtx=True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert ranges.nvtx_ranges() is torch.cuda.nvtx.range
