"""A training step on every rung: the reference's with PyTorch's optimizer, and dit_fast's as its trainer makes it."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.models.ladder.rungs import Case, Climber, Rung
from benchmarks.models.latents import make_set
from benchmarks.models.plain_dit import plain_twin
from dit_fast.data import LatentSet, Posterior, open_data, open_stream
from dit_fast.diffusion import create_diffusion
from dit_fast.distributed.sharding import parallelize
from dit_fast.distributed.world import World
from dit_fast.interop import to_diffusers
from dit_fast.models import DiT
from dit_fast.training.graphs import CudaGraphs, GraphedStep, compile_step
from dit_fast.training.optimizer import AdamWEma
from dit_fast.training.precision import on_copies, use_float8
from dit_fast.training.run import prefetch
from dit_fast.training.step import StepOptions, StepState, TrainStep

DECAY = 0.9999
LEARNING_RATE = 1e-4
OTHER_DRAWS = 0.2
"""Draws of noise and timesteps differ between plain and ours: a bound for another batch's loss, not for rounding."""
BATCHES_ON_DISK = 8

Batch = tuple[Tensor, Tensor]


class Feed(NamedTuple):
    """Batches on the device: latents (B, C, H, W), or moments (B, 2, C, H, W) of `posterior`, and labels (B,)."""

    batches: Iterator[Batch]
    posterior: Posterior | None


def others_model(model: DiT, rung: Rung, device: torch.device) -> Any:
    """The plain or diffusers' model with copies of the weights of `model`: a module called with (x, t, y)."""
    made = _Peer(to_diffusers(model)) if rung.model == "diffusers" else plain_twin(model)
    called = made.to(device)
    return torch.compile(called, dynamic=False) if rung.compile else called


class _Peer(nn.Module):
    """diffusers' model, called as the others are."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, timestep=t, class_labels=y, return_dict=False)[0]


class Training:
    """The rungs of a case of training on `device`; `folder`: for the set on disk."""

    def __init__(self, case: Case, model: DiT, device: torch.device, folder: Path):
        self.case, self.model, self.device = case, model.train(), device
        self.data: LatentSet | None = None
        if case.kind == "train-disk":
            make_set(folder, BATCHES_ON_DISK * case.batch, "float16", case.image_size // 8)
            found = open_data(folder)
            assert isinstance(found, LatentSet)
            self.data = found
        self.expected = self._plain_loss()

    def build(self, rung: Rung) -> Climber:
        """A step that has been made until it is compiled and captured. Raises what the rung raises."""
        torch.manual_seed(0)
        feed = self._feed()
        step, graphed = (self._ours if rung.model == "ours" else self._others)(rung, feed)

        def run() -> Tensor:
            return step(*next(feed.batches))

        loss = float(run())
        for _ in range(2):
            run()
        while graphed is not None and not graphed.captures and graphed.refused is None:
            run()
        if graphed is not None and graphed.refused is not None:
            raise RuntimeError(f"no CUDA graph: {graphed.refused}")
        return Climber(run, 1, abs(loss / self.expected - 1), OTHER_DRAWS)

    def _feed(self) -> Feed:
        if self.data is not None:
            stream = open_stream(self.data, self.case.batch, seed=0)
            return Feed(prefetch(stream.read(0, 2**31), self.device), self.data.posterior)
        x = torch.randn(self.case.batch, 4, *self.model.config["input_size"], device=self.device)
        y = torch.randint(self.model.config["num_classes"], (self.case.batch,), device=self.device)
        return Feed(itertools.repeat((x, y)), None)

    def _plain_loss(self) -> float:
        """The first loss of the plain model in float32."""
        torch.manual_seed(0)
        loss = self._loss(plain_twin(self.model).to(self.device), Rung("plain"))
        feed = self._feed()
        with torch.no_grad():
            return float(loss(*_latents(next(feed.batches), feed.posterior)))

    def _loss(self, called: Callable[..., Tensor], rung: Rung) -> Callable[[Tensor, Tensor], Tensor]:
        diffusion = create_diffusion("")

        def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=rung.bf16):
                return called(x, t, y).float()

        def loss(x: Tensor, y: Tensor) -> Tensor:
            t = torch.randint(0, diffusion.num_timesteps, (len(x),), device=self.device)
            return diffusion.training_losses(denoise, x, t, {"y": y})["loss"].mean()

        return loss

    def _others(self, rung: Rung, feed: Feed) -> tuple[Callable[..., Tensor], None]:
        """The reference's step: fused AdamW, and an average by a foreach pass."""
        called = others_model(self.model, rung, self.device).train()
        parameters: list[Tensor] = [p for p in called.parameters() if p.requires_grad]
        averages = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0, fused=True)
        loss_of = self._loss(called, rung)

        def step(samples: Tensor, y: Tensor) -> Tensor:
            x, y = _latents((samples, y), feed.posterior)
            # Without a fused kernel, scores and probabilities are tensors of their own, as the reference's are.
            with nullcontext() if rung.sdpa else sdpa_kernel(SDPBackend.MATH):
                loss = loss_of(x, y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - DECAY)
            return loss.detach()

        return step, None

    def _ours(self, rung: Rung, feed: Feed) -> tuple[Callable[..., Tensor], GraphedStep | None]:
        device, batch = self.device, self.case.batch
        ours = DiT(
            **self.model.config,
            recompute=rung.recompute,
            attention=rung.attention,
            mlp_epilogue=rung.epilogue,
        )
        ours = ours.to(device).eval()
        ours.load_state_dict(self.model.state_dict())
        if rung.fp8:
            use_float8(ours, device)
        parameters = [p for p in ours.parameters() if p.requires_grad]
        state = StepState(device, 16, torch.float64)
        state.lr.fill_(LEARNING_RATE)
        copies = torch.bfloat16 if rung.bf16 and not rung.fp8 else None
        optimizer = AdamWEma(
            parameters, lr=state.lr, ema_decay=DECAY, ema_warmup=True, low_precision_copy=copies
        )
        run_model = ours if copies is None else on_copies(ours, optimizer)
        called = parallelize(run_model, World(device=device), "none", compile=rung.compile)

        options = StepOptions(
            seed=0,
            batch_size=batch,
            num_classes=self.model.config["num_classes"],
            class_dropout_prob=self.model.config["class_dropout_prob"],
            autocast=torch.bfloat16 if rung.bf16 else None,
        )
        rows = torch.arange(batch, device=device)
        step = TrainStep(
            called, optimizer, create_diffusion(""), options, state, rows, posterior=feed.posterior
        )
        if rung.compile:
            compile_step(step)
        work = GraphedStep(step, CudaGraphs()) if rung.graph else step

        def run(samples: Tensor, y: Tensor) -> Tensor:
            work(samples, y)
            return state.history[(state.step - 1) % len(state.history), 0]

        return run, work if isinstance(work, GraphedStep) else None


def _latents(batch: Batch, posterior: Posterior | None) -> Batch:
    """The batch with latents drawn from its moments."""
    if posterior is None:
        return batch
    moments, y = batch
    return posterior.sample(moments, torch.randn_like(moments[:, 0], dtype=torch.float32)), y
