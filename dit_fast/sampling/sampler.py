"""`Sampler`: labels or captions in, images (or latents) out, at the speed of the device.

Modulation vectors are made before a trajectory, the adaLN weights stay out of its loop, a whole trajectory is one CUDA
graph where there are any, and sample i has random numbers of its own. Shapes: labels (M,), captions
(M, S, E); states (M, C, H, W).
"""

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_fast.diffusion import GaussianDiffusion
from dit_fast.errors import ConfigError, NonFiniteError
from dit_fast.model.dit import DiT
from dit_fast.sampling.config import BATCH_SIZE, PRECISIONS, SamplerConfig
from dit_fast.sampling.float8 import require_float8, use_float8_linears
from dit_fast.sampling.schedule import Nodes, diffusion_nodes
from dit_fast.sampling.trajectory import (
    CondFn,
    Evaluate,
    KeyedNoise,
    Program,
    ProgramKey,
    ReferenceNoise,
    evaluate,
    loop_parameters,
    modulation_width,
)
from dit_fast.utils.cuda_graphs import CudaGraphs, GraphBackend, GraphCache
from dit_fast.utils.values import SEED, Whole, shown

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _as_tensor(name: str, values: Any) -> Tensor:
    """`values` on the CPU; ConfigError for what is no tensor, array or sequence of numbers."""
    try:
        if not isinstance(values, Tensor):
            array = np.asarray(values if hasattr(values, "__len__") else list(values))
            values = torch.from_numpy(array.astype(np.int64) if array.size == 0 else array)
        return values.cpu()
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ConfigError(f"{name} {shown(values)}: give a tensor or a sequence of integers") from None


class Step(NamedTuple):
    """Where sampling stands: `done` of `total` steps of `images` samples from place `first`; their state."""

    first: int
    images: int
    done: int
    total: int
    state: Tensor


class Sampler:
    """Draws samples of a model: `Sampler(model, create_diffusion("250"))(labels, seed=0)`.

    process: a diffusion process, or nodes such as `flow_nodes(50)` for a model of flow matching. cond_fn: classifier
    guidance, see `classifier_cond_fn`. `model`, `nodes` and `config` may be assigned anew between calls; what depends
    on them is captured again. Raises ConfigError, when built or called, where they do not go together. After a call,
    `eager_reason` says why no graph was used (None: one was).
    """

    def __init__(
        self,
        model: DiT,
        process: GaussianDiffusion | Nodes,
        config: SamplerConfig | None = None,
        *,
        cond_fn: CondFn | None = None,
        backend: GraphBackend | None = None,
    ) -> None:
        if not isinstance(model, DiT):
            raise ConfigError(f"model {shown(model)}: give a DiT, as `load_model` or `FastDiT` has it")
        if not isinstance(process, Nodes | GaussianDiffusion):
            raise ConfigError(
                f'process {shown(process)}: give a diffusion process, for example create_diffusion("25"), or '
                "noise schedule nodes, for example flow_nodes(25)"
            )
        if not isinstance(config, SamplerConfig | None):
            raise ConfigError(
                f"config {shown(config)}: give a SamplerConfig, for example SamplerConfig(eta=0.5)"
            )
        self.model = model
        self.nodes = process if isinstance(process, Nodes) else diffusion_nodes(process)
        self.config = config or SamplerConfig()
        self.cond_fn = cond_fn
        self.eager_reason: str | None = None
        self.backend: GraphBackend = backend or CudaGraphs()
        self.programs: GraphCache[Program] = GraphCache()
        self._cast: tuple[object, DiT] | None = None
        self._compiled: Evaluate | None = None
        self._failed: dict[ProgramKey, str] = {}
        self.check_config()

    def check(self, labels: Tensor, seed: int = 0, batch_size: int = 64) -> None:
        """ConfigError when the model cannot draw these labels (M,) or captions (M, S, E) with the present `config`."""
        classes, width = self.model.num_classes, self.model.caption_dim
        if width:
            if labels.ndim != 3 or 0 in labels.shape[1:] or labels.shape[2] != width:
                raise ConfigError(
                    f"captions are {tuple(labels.shape)}, expected (images, tokens, {width}): the model was trained on "
                    "captions"
                )
            if not labels.isfinite().all():
                raise ConfigError("captions hold NaN or infinity: make them again, or in float32")
        elif labels.ndim != 1 or labels.dtype not in _INTEGERS:
            raise ConfigError(
                f"labels are {labels.dtype} {tuple(labels.shape)}, expected one integer per image"
            )
        elif len(labels) == 0:
            pass
        elif (low := int(labels.min())) < 0 or (high := int(labels.max())) >= max(classes, 1):
            known = f"the model has {classes} classes, 0 to {classes - 1}"
            raise ConfigError(
                f"label {low if low < 0 else high} is out of range: "
                + (known if classes else "the model is unconditional, give 0 for each image")
            )
        self.check_config()
        SEED.check("seed", seed)
        BATCH_SIZE.check("batch_size", batch_size)

    def check_config(self) -> None:
        """ConfigError when the present model, nodes and `config` do not go together."""
        classes, width = self.model.num_classes, self.model.caption_dim
        if self.config.guidance.active and not self.model.has_null:
            raise ConfigError(
                f"guidance scale {self.config.guidance.scale} needs a model trained with label dropout, this one was "
                f"trained without {'it (class_dropout_prob 0)' if classes or width else 'classes'}: use scale 1"
            )
        solver, continuous = self.config.solver, self.nodes.rates is not None
        if solver == "ddpm" and continuous:
            raise ConfigError(
                "solver ddpm is of diffusion models: for a model of flow matching use euler, heun or sde-sigma"
            )
        if solver.startswith("sde") and not continuous:
            raise ConfigError(
                f"solver {solver} is of flow matching: for a diffusion model use ddpm, or ddim with eta"
            )
        learned = self.nodes.variance.startswith("learned")
        if solver == "ddpm" and learned and not self.model.learn_sigma:
            raise ConfigError(
                "the process has a learned variance and the model predicts none: "
                "learn_sigma must agree in model and create_diffusion"
            )
        if self.config.precision == "fp8":
            require_float8(self.model)

    def __call__(
        self,
        labels: Tensor | Iterable[int],
        *,
        seed: int = 0,
        numbers: Tensor | None = None,
        batch_size: int = 64,
        on_step: Callable[[Step], None] | None = None,
        every: int = 1,
    ) -> Tensor:
        """One sample for each label or caption: float32 (M, C, H, W) on the model's device, never overwritten later.

        numbers   the samples' numbers, int64 (M,); 0, 1, ... by default
        on_step   called after each `every` steps and after the last; under a graph the trajectory is captured in
                  pieces of `every` steps

        Raises ConfigError for a request that the model cannot meet and NonFiniteError when it answers NaN or
        infinity. The global random generators are not touched.
        """
        labels = _as_tensor("labels", labels)
        self.check(labels, seed, batch_size)
        every = Whole(1).check("every", every)
        numbers = torch.arange(len(labels)) if numbers is None else _as_tensor("numbers", numbers)
        if numbers.shape != labels.shape[:1] or numbers.dtype != torch.int64:
            raise ConfigError(
                f"numbers are {numbers.dtype} {tuple(numbers.shape)}, expected int64 ({len(labels)},)"
            )
        if len(numbers) and int(numbers.min()) < 0:
            raise ConfigError(f"numbers hold {int(numbers.min())}: samples are numbered from 0")
        if not len(labels):
            shape = (0, self.model.in_channels, *self.model.x_embedder.img_size)
            return torch.empty(shape, device=self.model.pos_embed.device)
        # An embedding takes int32 and int64 alone.
        labels = labels if labels.is_floating_point() else labels.long()
        made = []
        with torch.no_grad():
            for first in range(0, len(labels), batch_size):
                part = slice(first, first + batch_size)

                def report(done: int, state: Tensor, first: int = first) -> None:
                    assert on_step is not None
                    on_step(Step(first, len(state), done, len(self.nodes), state))

                notify = None if on_step is None else report
                made.append(self._batch(labels[part], numbers[part], seed, notify, every))
        result = torch.cat(made).float()
        broken = int((~result.isfinite()).flatten(1).any(dim=1).sum())
        if broken:
            raise NonFiniteError(
                f"{broken} of {len(result)} samples have NaN or infinite values: damaged weights or too low a "
                "precision"
            )
        return result

    def _batch(
        self,
        labels: Tensor,
        numbers: Tensor,
        seed: int,
        notify: Callable[[int, Tensor], None] | None,
        every: int,
    ) -> Tensor:
        config, model = self.config, self._loop_model()
        device = model.pos_embed.device
        shape = (model.in_channels, *model.x_embedder.img_size)
        noise: KeyedNoise | ReferenceNoise
        if config.mode == "reference":
            noise = ReferenceNoise(seed, numbers.to(device), shape, doubled=config.guidance.active)
        else:
            noise = KeyedNoise(seed, numbers.to(device), shape)
        rows, slots = self._rows(labels)
        key = self._key(model, labels, len(rows), len(self.nodes) if notify is None else every)
        rows = rows.to(device)

        def begin(program: Program) -> None:
            program.begin(labels.to(device), slots.to(device), noise.start())

        self.eager_reason = self._no_graph(device) or self._failed.get(key)
        if self.eager_reason is None:
            try:
                program = self.programs.get(key, lambda: self._captured(model, key))
            # What cannot be captured, and CUDA's out of memory, are RuntimeErrors.
            except RuntimeError as error:
                self.programs.clear()
                self.eager_reason = (
                    f"capture failed: {(str(error) or type(error).__name__).splitlines()[0][:200]}"
                )
                self._failed[key] = self.eager_reason
        if self.eager_reason is not None:
            program = Program(model, key, self._evaluate(), self.cond_fn)
            states = program.states()

        begin(program)
        for number, (start, stop) in enumerate(key.segments):
            program.load(start, stop, rows, noise)
            if self.eager_reason is None:
                replay, state = program.replays[number]
                replay()
            else:
                for _ in range(start, stop):
                    state = next(states)
            if notify is not None:
                notify(stop, state.clone())
        return state.clone()

    def _captured(self, model: DiT, key: ProgramKey) -> Program:
        program = Program(model, key, self._evaluate())
        program.capture(self.backend)
        return program

    def _no_graph(self, device: torch.device) -> str | None:
        if self.config.graph == "never":
            return "graph is 'never'"
        if self.cond_fn is not None:
            return "a classifier's gradient is not captured"
        return self.backend.unavailable(device)

    def _rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels or captions of the modulation table's rows, and for each of 2n evaluations its row, the null's last.

        The number of rows is a power of two, or the batch's size: batches of random labels then share one capture.
        """
        distinct, slots = torch.unique(labels, return_inverse=True, dim=0)
        count = min(1 << (len(distinct) - 1).bit_length(), len(labels))
        rows = torch.cat([distinct, distinct[:1].expand(count - len(distinct), *labels.shape[1:])])
        if self.config.guidance.active:
            # The null class comes after the last; the null caption is padding alone, zeros.
            rows = torch.cat([rows, torch.full_like(rows[:1], self.model.num_classes)])
        return rows, torch.cat([slots, torch.full_like(slots, len(rows) - 1)])

    def _key(self, model: DiT, labels: Tensor, rows: int, every: int) -> ProgramKey:
        config, steps = self.config, len(self.nodes)
        batch, caption = len(labels), tuple(labels.shape[1:])
        sizes = model.x_embedder.img_size
        bytes_per_step = rows * modulation_width(model, *caption[:1]) * model.pos_embed.itemsize
        if config.solver.startswith(("ddpm", "ddim", "sde")):
            bytes_per_step += 4 * batch * model.in_channels * sizes[0] * sizes[1]
        most = max(1, min(steps, config.table_bytes // bytes_per_step))
        bounds = sorted({*range(0, steps, every), steps})
        segments = [
            (start, min(start + most, stop))
            for begin, stop in itertools.pairwise(bounds)
            for start in range(begin, stop, most)
        ]
        return ProgramKey(
            batch=batch,
            rows=rows,
            caption=caption,
            nodes=self.nodes,
            solver=config.solver,
            eta=config.eta,
            last_step=config.last_step,
            guidance=config.guidance,
            clip=config.clip,
            dtype=model.pos_embed.dtype,
            device=model.pos_embed.device,
            segments=tuple(segments),
            compiled=config.compile,
            offload=config.offload,
            switches=(model.kernels, model.attention),
            weights=tuple(p.data_ptr() for p in loop_parameters(model)),
        )

    def _loop_model(self) -> DiT:
        """The model, or its copy in the precision that is asked for, made again when its weights have changed."""
        precision = self.config.precision
        dtype = PRECISIONS[precision] if precision else self.model.pos_embed.dtype
        if precision != "fp8" and dtype is self.model.pos_embed.dtype:
            return self.model
        state = (precision, id(self.model), *((p.data_ptr(), p._version) for p in self.model.parameters()))
        if self._cast is None or self._cast[0] != state:
            self._cast = None
            cast = copy.deepcopy(self.model).to(dtype)
            if precision == "fp8":
                use_float8_linears(cast)
            self._cast = (state, cast)
            self.programs.clear()
        return self._cast[1]

    def _evaluate(self) -> Evaluate:
        if not self.config.compile:
            return evaluate
        if self._compiled is None:
            self._compiled = torch.compile(evaluate, fullgraph=True, dynamic=False)
        return self._compiled
