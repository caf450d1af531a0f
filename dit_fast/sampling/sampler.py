"""`Sampler`: labels or captions in, images or latents out.

Modulation vectors are computed before a trajectory, so that its loop does not read the adaLN weights. A whole
trajectory is one CUDA graph where the device supports it, and each sample has random numbers of its own. Shapes: labels
(M,), captions (M, S, E), states (M, C, H, W).
"""

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_fast.diffusion import GaussianDiffusion
from dit_fast.diffusion.adaptive import require_torchdiffeq
from dit_fast.errors import ConfigError, NonFiniteError
from dit_fast.model.dit import DiT
from dit_fast.model.layers import behavior_of, is_seen
from dit_fast.sampling.config import BATCH_SIZE, PRECISIONS, SamplerConfig
from dit_fast.sampling.float8 import require_float8, use_float8_linears
from dit_fast.sampling.schedule import VELOCITY_SOLVERS, NoiseSchedule, diffusion_schedule
from dit_fast.sampling.trajectory import (
    CondFn,
    Evaluate,
    GraphCapture,
    KeyedNoise,
    ReferenceNoise,
    Trajectory,
    TrajectoryCache,
    TrajectoryKey,
    draws_noise,
    evaluate,
    evaluations,
    evaluations_per_step,
    loop_parameters,
    modulation_width,
)
from dit_fast.utils.terminal import one_line
from dit_fast.utils.values import SEED, Whole, shown

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Step(NamedTuple):
    """Progress of a batch, for `on_step`.

    Attributes:
        first: Position of its first sample among all samples of the call.
        images: Number of samples in the batch.
        done: Steps completed.
        total: Steps of the trajectory.
        state: State after `done` steps (images, C, H, W).
    """

    first: int
    images: int
    done: int
    total: int
    state: Tensor


class Sampler:
    """Draws samples from a model: `Sampler(model, create_diffusion("250"))(labels, seed=0)`.

    `model`, `schedule` and `config` may be reassigned between calls; what depends on them is captured again. After a
    call, `eager_reason` is None where a CUDA graph was used, and otherwise the reason why none was.

    Args:
        model: The model.
        process: A diffusion process, or a noise schedule such as `flow_schedule(50)` for flow matching.
        config: Solver, guidance and precision.
        cond_fn: Classifier guidance, see `classifier_cond_fn`.
        graphs: Capture of CUDA graphs; tests replace it.

    Raises:
        ConfigError: The arguments do not fit each other.
    """

    def __init__(
        self,
        model: DiT,
        process: GaussianDiffusion | NoiseSchedule,
        config: SamplerConfig | None = None,
        *,
        cond_fn: CondFn | None = None,
        graphs: GraphCapture | None = None,
    ) -> None:
        if not isinstance(model, DiT):
            raise ConfigError(
                f"model {shown(model)}: give a DiT, such as `load_model` returns or `FastDiT.dit`"
            )
        if not isinstance(process, NoiseSchedule | GaussianDiffusion):
            raise ConfigError(
                f'process {shown(process)}: give a diffusion process, for example create_diffusion("25"), or '
                "a noise schedule, for example flow_schedule(25)"
            )
        if not isinstance(config, SamplerConfig | None):
            raise ConfigError(
                f"config {shown(config)}: give a SamplerConfig, for example SamplerConfig(eta=0.5)"
            )
        self.model = model
        self.schedule = process if isinstance(process, NoiseSchedule) else diffusion_schedule(process)
        self.config = config or SamplerConfig()
        self.cond_fn = cond_fn
        self.eager_reason: str | None = None
        self.graphs = graphs or GraphCapture()
        self.trajectories = TrajectoryCache()
        self._cast: tuple[object, DiT] | None = None
        self._compiled: Evaluate | None = None
        self._failed: dict[TrajectoryKey, str] = {}
        self.check_config()

    def __call__(
        self,
        labels: Tensor | Iterable[int],
        *,
        seed: int = 0,
        numbers: Tensor | None = None,
        batch_size: int = 64,
        on_step: Callable[[Step], None] | None = None,
        every: int = 1,
        start: Tensor | None = None,
    ) -> Tensor:
        """Draw one sample for each label or caption. The global random generators are not used.

        Args:
            labels: Labels, integers (M,), or captions (M, S, E).
            seed: Random seed.
            numbers: Sample numbers, int64 (M,); 0, 1, ... by default. Equal numbers give equal noise.
            batch_size: Samples per batch.
            on_step: Called after every `every` steps and after the last one. With a CUDA graph, the trajectory is
                captured in pieces of `every` steps.
            every: Steps between two calls of `on_step`.
            start: State from which each trajectory starts, (M, C, H, W); None: noise. With a schedule from data to
                noise, the images to encode.

        Returns:
            Samples, float32 (M, C, H, W) on the device of the model. Later calls do not overwrite them.

        Raises:
            ConfigError: The model cannot draw these samples.
            NonFiniteError: A sample has NaN or infinite values.
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
            raise ConfigError(f"numbers contain {int(numbers.min())}: samples are numbered from 0")
        if start is None and self.schedule.reverse and len(labels):
            raise ConfigError(
                "the noise schedule leads from data to noise: give the images to encode as start"
            )
        if start is not None:
            start, wanted = _as_tensor("start", start), (len(labels), *self._shape())
            if tuple(start.shape) != wanted:
                raise ConfigError(f"start is {tuple(start.shape)}, expected {wanted}")
        if not len(labels):
            return torch.empty((0, *self._shape()), device=self.model.pos_embed.device)
        # Embedding layers accept only int32 and int64.
        labels = labels if labels.is_floating_point() else labels.long()
        batches = []
        with torch.no_grad():
            for first in range(0, len(labels), batch_size):
                # The last batch is smaller: sample i keeps its number, and with it its noise.
                batch = slice(first, first + batch_size)

                def report(done: int, state: Tensor, first: int = first) -> None:
                    assert on_step is not None
                    on_step(Step(first, len(state), done, len(self.schedule), state))

                notify = None if on_step is None else report
                given = None if start is None else start[batch]
                batches.append(self._batch(labels[batch], numbers[batch], seed, notify, every, given))
        result = torch.cat(batches).float()
        broken = int((~result.isfinite()).flatten(1).any(dim=1).sum())
        if broken:
            raise NonFiniteError(
                f"{broken} of {len(result)} samples have NaN or infinite values: the weights are damaged, or the "
                "precision is too low"
            )
        return result

    def check(self, labels: Tensor, seed: int = 0, batch_size: int = 64) -> None:
        """Check a request before any computation.

        Args:
            labels: Labels (M,) or captions (M, S, E).
            seed: Random seed.
            batch_size: Samples per batch.

        Raises:
            ConfigError: The model cannot draw these samples with the current `config`.
        """
        classes, width = self.model.num_classes, self.model.caption_dim
        if width:
            if labels.ndim != 3 or 0 in labels.shape[1:] or labels.shape[2] != width:
                raise ConfigError(
                    f"captions are {tuple(labels.shape)}, expected (images, tokens, {width}): the model was trained on "
                    "captions"
                )
            if not labels.isfinite().all():
                raise ConfigError("captions contain NaN or infinity: encode them again, or in float32")
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
        """Raise ConfigError where the current `model`, `schedule` and `config` do not fit each other."""
        classes, width = self.model.num_classes, self.model.caption_dim
        if self.config.guidance.active and not self.model.has_null:
            raise ConfigError(
                f"guidance scale {self.config.guidance.scale} needs a model trained with label dropout, this one was "
                f"trained without {'it (class_dropout_prob 0)' if classes or width else 'classes'}: use scale 1"
            )
        solver, continuous = self.config.solver, self.schedule.rates is not None
        if solver == "ddpm" and continuous:
            raise ConfigError(
                "solver ddpm applies only to diffusion models: for flow matching use euler, heun or sde-sigma"
            )
        if solver == "dopri5":
            require_torchdiffeq()
        if self.schedule.reverse and solver not in VELOCITY_SOLVERS:
            raise ConfigError(
                f"solver {solver} does not lead from data to noise: choose {', '.join(VELOCITY_SOLVERS)}"
            )
        if self.cond_fn is not None and solver in VELOCITY_SOLVERS:
            raise ConfigError(f"solver {solver} takes no classifier guidance: use ddim")
        evaluations(self.config, self.schedule)
        if solver.startswith("sde") and not continuous:
            raise ConfigError(
                f"solver {solver} applies only to flow matching: for a diffusion model use ddpm, or ddim with eta"
            )
        learned = self.schedule.variance.startswith("learned")
        if solver == "ddpm" and learned and not self.model.learn_sigma:
            raise ConfigError(
                "the process has a learned variance and the model predicts none: "
                "learn_sigma must agree in model and create_diffusion"
            )
        if self.model.pos_embed.is_meta:
            raise ConfigError(
                "the model's weights are not in memory (meta device): sample an offloaded model in diffusers' pipeline "
                "or load it back by accelerate's remove_hook_from_submodules(model)"
            )
        if self.config.precision:
            for name, weight in self.model.named_parameters():
                quantized = weight.dtype.itemsize == 1 or type(weight).__module__.startswith("torchao.")
                if weight.is_meta or quantized:
                    found = "not in memory" if weight.is_meta else "quantized or stored in 8 bits"
                    raise ConfigError(
                        f"precision {self.config.precision!r} casts the weights and {name} is {found}: give no "
                        "precision, cast before quantizing, or load the offloaded weights back"
                    )
        if self.config.precision == "fp8":
            require_float8(self.model)

    def _batch(
        self,
        labels: Tensor,
        numbers: Tensor,
        seed: int,
        notify: Callable[[int, Tensor], None] | None,
        every: int,
        start: Tensor | None,
    ) -> Tensor:
        model = self._cast_model()
        device = model.pos_embed.device
        shape, guided = self._shape(), self.config.guidance.active
        noise: KeyedNoise | ReferenceNoise
        if self.config.mode == "reference":
            noise = ReferenceNoise(seed, numbers.to(device), shape, doubled=guided)
        else:
            noise = KeyedNoise(seed, numbers.to(device), shape)
        rows, slots = self._table_rows(labels)
        key = self._key(model, labels, len(rows), len(self.schedule) if notify is None else every)
        trajectory, rows = self._trajectory(model, key), rows.to(device)

        first = noise.start() if start is None else start.to(device)
        trajectory.begin(labels.to(device), slots.to(device), first)
        states = trajectory.states()
        for segment, (begin, stop) in enumerate(key.segments):
            trajectory.load(begin, stop, rows, noise)
            state = trajectory.advance(segment, states)
            if notify is not None:
                notify(stop, state.clone())
        return state.clone()

    def _shape(self) -> tuple[int, ...]:
        """(C, H, W) of a sample."""
        return (self.model.in_channels, *self.model.x_embedder.img_size)

    def _trajectory(self, model: DiT, key: TrajectoryKey) -> Trajectory:
        """A captured trajectory, or an eager one where that is not possible; sets `eager_reason`."""
        self.eager_reason = self._no_graph(key.device) or self._failed.get(key)
        if self.eager_reason is None:

            def capture() -> Trajectory:
                trajectory = Trajectory(model, key, self._evaluate())
                trajectory.capture(self.graphs)
                return trajectory

            try:
                return self.trajectories.get(key, capture)
            # Operations that cannot be captured and CUDA's out-of-memory errors are both RuntimeErrors.
            except RuntimeError as error:
                self.trajectories.clear()
                self.eager_reason = self._failed[key] = f"capture failed: {one_line(error)}"
        return Trajectory(model, key, self._evaluate(), self.cond_fn)

    def _no_graph(self, device: torch.device) -> str | None:
        if self.config.graph == "never":
            return "graph is 'never'"
        if self.config.solver == "dopri5":
            return "dopri5 chooses its steps while it runs"
        if self.cond_fn is not None:
            return "a classifier's gradient is not captured"
        if type(self.model).forward is not DiT.forward:
            return f"{type(self.model).__name__} has a forward of its own"
        if seen := next((name for name, module in self.model.named_modules() if is_seen(module)), None):
            return f"hooks and replaced forwards, as on {seen or 'the model'}, would run in the capture only"
        return self.graphs.unavailable(device)

    def _table_rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels or captions of the rows of the modulation table, and the row of each of 2n evaluations (null last).

        The number of rows is a power of two or the batch size, so that batches of random labels use one capture.
        """
        distinct, slots = torch.unique(labels, return_inverse=True, dim=0)
        count = min(1 << (len(distinct) - 1).bit_length(), len(labels))
        rows = torch.cat([distinct, distinct[:1].expand(count - len(distinct), *labels.shape[1:])])
        if self.config.guidance.active:
            # The null class follows the last class. As a caption, num_classes is 0: the null caption is all padding.
            rows = torch.cat([rows, torch.full_like(rows[:1], self.model.num_classes)])
        return rows, torch.cat([slots, torch.full_like(slots, len(rows) - 1)])

    def _key(self, model: DiT, labels: Tensor, rows: int, every: int) -> TrajectoryKey:
        config, steps = self.config, len(self.schedule)
        batch, caption = len(labels), tuple(labels.shape[1:])
        height, width = model.x_embedder.img_size
        bytes_per_step = rows * modulation_width(model, *caption[:1]) * model.pos_embed.itemsize
        bytes_per_step *= evaluations_per_step(config)
        if draws_noise(config):
            bytes_per_step += 4 * batch * model.in_channels * height * width
        longest = max(1, min(steps, config.table_bytes // bytes_per_step))
        # Segments end where `on_step` is called, and are no longer than the table allows.
        bounds = sorted({*range(0, steps, every), steps})
        segments = tuple(
            (start, min(start + longest, stop))
            for begin, stop in itertools.pairwise(bounds)
            for start in range(begin, stop, longest)
        )
        return TrajectoryKey(
            config=config,
            schedule=self.schedule,
            batch=batch,
            rows=rows,
            caption=caption,
            segments=segments,
            dtype=model.pos_embed.dtype,
            device=model.pos_embed.device,
            backends=(model.kernels, model.attention),
            weights=tuple(p.data_ptr() for p in loop_parameters(model)),
            behavior=behavior_of(model),
        )

    def _cast_model(self) -> DiT:
        """The model, or a copy in `config.precision` that is updated when the weights have changed."""
        precision = self.config.precision
        dtype = PRECISIONS[precision] if precision else self.model.pos_embed.dtype
        if precision != "fp8" and dtype is self.model.pos_embed.dtype:
            return self.model
        # Writing to a parameter in place keeps its address and increments its version.
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        state = (
            precision,
            id(self.model),
            behavior_of(self.model),
            *((each.data_ptr(), each._version) for each in tensors),
        )
        if self._cast is None or self._cast[0] != state:
            # The old copy is freed before the new one is made.
            self._cast = None
            cast = copy.deepcopy(self.model).to(dtype)
            if precision == "fp8":
                use_float8_linears(cast)
            self._cast = (state, cast)
            self.trajectories.clear()
        return self._cast[1]

    def _evaluate(self) -> Evaluate:
        if not self.config.compile:
            return evaluate
        if self._compiled is None:
            self._compiled = torch.compile(evaluate, fullgraph=True, dynamic=False)
        return self._compiled


def _as_tensor(name: str, values: Any) -> Tensor:
    """`values` on the CPU; ConfigError where they are not a tensor, an array or a sequence of numbers."""
    try:
        if not isinstance(values, Tensor):
            array = np.asarray(values if hasattr(values, "__len__") else list(values))
            values = torch.from_numpy(array.astype(np.int64) if array.size == 0 else array)
        return values.cpu()
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ConfigError(f"{name} {shown(values)}: give a tensor or a sequence of integers") from None
