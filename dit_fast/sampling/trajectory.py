"""Sampling trajectory of one batch: its noise, its modulation table, its steps, and their capture as CUDA graphs.

A captured trajectory reads and writes fixed memory. Its inputs are copied there before each replay and its outputs are
cloned afterwards, so that a later replay never overwrites a tensor of the caller.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.diffusion.adaptive import dopri5
from dit_fast.model.dit import DiT
from dit_fast.model.layers import is_seen
from dit_fast.sampling import runge_kutta, solvers
from dit_fast.sampling.config import SamplerConfig
from dit_fast.sampling.guidance import guide
from dit_fast.sampling.schedule import VELOCITY_SOLVERS, Array, NoiseSchedule
from dit_fast.sampling.solvers import Denoised
from dit_fast.utils import keyed

CondFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""cond_fn(x, t, y): gradient of log p(y | x) with respect to x, (N, C, H, W)."""
Evaluate = Callable[..., Denoised]

# Steps whose noise is drawn at once: a launch of the generator costs as much as the numbers of several steps.
_NOISE_STEPS = 25
# UniPC reaches its last branch, with two earlier predictions, at the third step.
_WARM_UP_STEPS = 3


class KeyedNoise:
    """Noise of sample i as a function of (seed, i): independent of the batch, the ranks and earlier samples.

    Args:
        seed: Random seed.
        numbers: Sample numbers, int64 (n,), on the device of the draws.
        shape: (C, H, W) of a sample.
    """

    def __init__(self, seed: int, numbers: Tensor, shape: tuple[int, ...]) -> None:
        self.seed, self.numbers, self.shape = seed, numbers, shape
        self._block, self._values = -1, torch.empty(0)

    def start(self) -> Tensor:
        """Initial noise, float32 (n, C, H, W)."""
        return keyed.normal(keyed.key(self.seed, "sampling start"), self.numbers, self.shape)

    def step(self, i: int) -> Tensor:
        """Noise of step i, float32 (n, C, H, W)."""
        block, place = divmod(i, _NOISE_STEPS)
        if block != self._block:
            key = keyed.key(self.seed, f"sampling steps {block}")
            # The key contains the block, so that any step can be drawn without the steps before it.
            self._block, self._values = block, keyed.normal(key, self.numbers, (_NOISE_STEPS, *self.shape))
        return self._values[:, place]


class ReferenceNoise:
    """Draws of the reference's sample.py after `torch.manual_seed(seed)`; steps must be requested in order.

    Args:
        seed: Random seed.
        numbers: Sample numbers, int64 (n,), on the device of the draws.
        shape: (C, H, W) of a sample.
        doubled: Draw 2n samples per step, as under guidance. The second half belongs to the null branch, whose state
            the reference discards.
    """

    def __init__(self, seed: int, numbers: Tensor, shape: tuple[int, ...], doubled: bool) -> None:
        self.shape, self.doubled, self.n = shape, doubled, len(numbers)
        self.device = numbers.device
        self.generator = torch.Generator(self.device).manual_seed(_batch_seed(seed, int(numbers[0])))

    def start(self) -> Tensor:
        """Initial noise, float32 (n, C, H, W)."""
        return torch.randn(self.n, *self.shape, generator=self.generator, device=self.device)

    def step(self, i: int) -> Tensor:
        """Noise of step i, the step after the last one requested, float32 (n, C, H, W)."""
        n = 2 * self.n if self.doubled else self.n
        return torch.randn(n, *self.shape, generator=self.generator, device=self.device)[: self.n]


def _batch_seed(seed: int, first: int) -> int:
    """Seed of the batch whose first sample has number `first`; `seed` itself for the first batch."""
    if first == 0:
        return seed
    return int(np.random.SeedSequence((seed, first)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def loop_parameters(model: DiT) -> list[Tensor]:
    """Parameters that a step reads once its modulation vectors are known."""
    hoisted = {id(p) for layer in model.modulation_layers() for p in layer.parameters()}
    return [
        p
        for name, p in model.named_parameters()
        if not name.startswith(("t_embedder.", "y_embedder.")) and id(p) not in hoisted
    ]


def modulation_width(model: DiT, caption_tokens: int = 1) -> int:
    """Size of a modulation vector: (6 depth + 2) D with adaLN-Zero, (1 + S) D for a caption of S tokens."""
    return sum(model.modulation_widths(caption_tokens))


class ModulationTable:
    """Modulation vectors for consecutive steps and the labels of a batch.

    `values` (steps, rows, `modulation_width`) keeps its memory when it is filled again.

    Args:
        model: The model.
        steps: Upper bound on the number of steps.
        rows: Number of labels or captions.
        caption_tokens: Tokens of a caption.
        offload: Keep the adaLN weights on the CPU and copy each to the device of the table while it is used.
    """

    def __init__(
        self, model: DiT, steps: int, rows: int, *, caption_tokens: int = 1, offload: bool = False
    ) -> None:
        self.model, self.offload = model, offload
        like = model.pos_embed
        width = modulation_width(model, caption_tokens)
        self.values = torch.zeros(steps, rows, width, dtype=like.dtype, device=like.device)

    def fill(self, times: Tensor, labels: Tensor) -> None:
        """Compute the vectors.

        Args:
            times: Timesteps, at most `steps`.
            labels: Labels int64 (rows,), the null class included, or captions (rows, S, E).
        """
        if is_called(self.model):
            return
        t = self.model.embed_times(times)
        y = self.model.embed_labels(labels)
        y = None if y is None else y.repeat(len(times), *[1] * (y.ndim - 1))
        c = self.model.condition(t.repeat_interleave(len(labels), 0), y)
        # One layer at a time, so that only one needs to be on the device when offloaded.
        start = 0
        for layer in self.model.modulation_layers():
            if self.offload:
                layer.to(c.device)
            vectors = layer(c).flatten(1).unflatten(0, (len(times), len(labels)))
            if self.offload:
                layer.to("cpu")
            self.values[: len(times), :, start : start + vectors.shape[-1]] = vectors
            start += vectors.shape[-1]


def evaluate(
    model: "DiT | Called", x: Tensor, rows: Tensor, slots: Tensor, a: Tensor, b: Tensor, scale: Tensor | None,
    channels: int, predicts_data: bool, clip: bool,
) -> Denoised:  # fmt: skip
    """Evaluate the model once and predict x_0 = a x + b output.

    Args:
        model: The model.
        x: States (n, C, H, W).
        rows: Modulation vectors (rows, `modulation_width`) of this step.
        slots: Row of each sample, int64 (n,), or (2n,) under guidance, where the null class comes second.
        a: Coefficient of x.
        b: Coefficient of the output.
        scale: Guidance scale; None evaluates the conditional branch alone.
        channels: Number of guided channels.
        predicts_data: The output is x_0 itself; a and b are not used.
        clip: Clamp x_0 to [-1, 1].

    Returns:
        The predicted x_0 (n, C, H, W), and the variance where the model learns one.
    """
    # Both branches have the same state; only their modulation vectors differ.
    inputs = x if scale is None else torch.cat([x, x])
    output = model.forward_modulated(inputs.to(rows.dtype), rows.index_select(0, slots)).to(x.dtype)
    if scale is not None:
        output = guide(output, scale, channels)
    prediction, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
    data = prediction if predicts_data else torch.addcmul(a * x, b, prediction)
    return Denoised(data.clamp(-1, 1) if clip else data, variance if model.learn_sigma else None)


def is_called(model: DiT) -> bool:
    """Whether the model's own forward must run, since hooks see it or a subclass replaces it."""
    return is_seen(model) or type(model).forward is not DiT.forward


@dataclass(frozen=True)
class Called:
    """A model that is called at each step, in place of one whose modulation was computed before.

    Attributes:
        model: The model.
        time: Timestep of the step, ().
        labels: Labels or captions of the conditional branch, and of the null branch after them.
    """

    model: DiT
    time: Tensor
    labels: Tensor

    @property
    def learn_sigma(self) -> bool:
        """As the model's."""
        return self.model.learn_sigma

    def forward_modulated(self, x: Tensor, modulations: Tensor) -> Tensor:
        """The model's output for x; the modulation is not read."""
        training, self.model.training = self.model.training, False  # which drops labels
        try:
            return self.model(x, self.time.expand(len(x)), self.labels[: len(x)])
        finally:
            self.model.training = training


class GraphCapture:
    """Capture of launches as CUDA graphs."""

    def unavailable(self, device: torch.device) -> str | None:
        """The reason why nothing can be captured on `device`; None where it can."""
        return None if device.type == "cuda" else f"there are no CUDA graphs on {device.type}"

    def pool(self) -> Any:
        """A memory pool for graphs that are replayed one after the other."""
        return torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None], pool: Any) -> Callable[[], None]:
        """Record the launches of `run` without executing them; the returned function executes them."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay


@dataclass(frozen=True)
class TrajectoryKey:
    """Everything that a captured trajectory depends on; a new value of any field needs a new capture.

    Args:
        config: Configuration of the sampler.
        schedule: Noise schedule, by identity.
        batch: Number of samples.
        rows: Number of labels or captions in the modulation table, the null class included.
        caption: Shape (S, E) of a caption, () for labels.
        segments: (start, stop) of the steps that run at once.
        dtype: Dtype of the model.
        device: Device of the model.
        backends: The model's kernels and attention backend.
        weights: Addresses of the parameters that steps read.
        behavior: What the model computes beside its weights, such as the active adapter.
    """

    config: SamplerConfig
    schedule: NoiseSchedule
    batch: int
    rows: int
    caption: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    device: torch.device
    backends: tuple[str, ...]
    weights: tuple[int, ...]
    behavior: tuple[Any, ...]


def draws_noise(config: SamplerConfig) -> bool:
    """Whether the steps of this solver add noise."""
    return config.solver.startswith(("ddpm", solvers.SDE)) or (config.solver == "ddim" and config.eta > 0)


def evaluations_per_step(config: SamplerConfig) -> int:
    """Evaluations of the model at different times in a step."""
    tableau = runge_kutta.TABLEAUS.get(config.solver)
    return 1 if tableau is None else len(tableau.fractions)


def evaluations(config: SamplerConfig, schedule: NoiseSchedule) -> tuple[Array, Array, Array, Array]:
    """Times at which a solver may evaluate the model, float64 (E,), and what it takes from each evaluation.

    Returns:
        The times, the noise levels, and the coefficients (a, b) of a x + b output: the velocity for solvers in t, and
        x_0 for all others.

    Raises:
        ConfigError: The solver and the noise schedule do not fit each other.
    """
    if config.solver in runge_kutta.TABLEAUS:
        times = runge_kutta.evaluation_times(schedule, config.solver)
        # The end is evaluated only by methods whose last stage is there.
        if not runge_kutta.evaluates_end(config.solver):
            times = times[:-1]
        return times, 1 - times, *schedule.velocity_coefficients(times)
    if config.solver in VELOCITY_SOLVERS:
        return schedule.times, schedule.levels, *schedule.velocity_coefficients(schedule.times)
    if config.solver.startswith(solvers.SDE) and config.sde_method == "heun" and config.last_step == "none":
        # Heun's last step evaluates the model at its end, where sigma is still above 0.
        whole = schedule.extended()
        return whole.times, whole.levels, *whole.data_coefficients
    return schedule.times, schedule.levels, *schedule.data_coefficients


class Trajectory:
    """Memory and steps of one trajectory.

    `begin` loads a batch; for each segment, `load` then computes what its steps read and `advance` runs them, eagerly
    or, after `capture`, by replaying a graph.

    Args:
        model: The model.
        key: The request.
        run: `evaluate`, or a compiled version of it.
        cond_fn: Classifier guidance; not captured.
    """

    def __init__(
        self, model: DiT, key: TrajectoryKey, run: Evaluate = evaluate, cond_fn: CondFn | None = None
    ) -> None:
        self.model, self.key, self.run, self.cond_fn = model, key, run, cond_fn
        self.config, self.schedule = key.config, key.schedule
        state_dtype = torch.float64 if key.dtype is torch.float64 else torch.float32
        shape = (key.batch, model.in_channels, *model.x_embedder.img_size)
        longest = max(stop - start for start, stop in key.segments)
        self.start = torch.zeros(shape, dtype=state_dtype, device=key.device)
        self.noise = self.start.new_zeros((longest if draws_noise(self.config) else 0, *shape))
        times, levels, a, b = evaluations(self.config, self.schedule)
        self.per_step = evaluations_per_step(self.config)
        # One more than a segment's steps have: Heun's method evaluates the model at the next timestep too.
        self.table = ModulationTable(
            model,
            min(longest * self.per_step + 1, len(times)),
            key.rows,
            caption_tokens=key.caption[0] if key.caption else 1,
            offload=self.config.offload,
        )
        # Fixed addresses: a captured graph reads these tensors, and `begin` overwrites their values.
        self.slots = torch.zeros(2 * key.batch, dtype=torch.int64, device=key.device)
        label_dtype = key.dtype if key.caption else torch.int64
        self.labels = torch.zeros(key.batch, *key.caption, dtype=label_dtype, device=key.device)

        # Solvers in t take the velocity where the others take x_0: the output itself if the model predicts it.
        self.predicts_data = not a.any()
        scales = self.config.guidance.scales(levels)
        self.guided = [bool(scale != 1) for scale in scales]
        self.coefficients = torch.from_numpy(np.stack([a, b, scales], axis=1)).to(self.start)
        # Discrete timesteps are integers for the model, as in the reference; times of flow matching are not.
        integers = bool((times == times.round()).all())
        self.times = torch.from_numpy(times).to(torch.int64 if integers else torch.float32).to(key.device)
        # Dhariwal & Nichol 2021, algorithm 2: noise' = noise - sigma * score shifts x_0 by sigma^2 / alpha * score.
        self.shift = self.schedule.sigmas[:-1] ** 2 / self.schedule.alphas[:-1].clip(1e-12)
        # The step that row 0 of `table` and `noise` belongs to.
        self.first = 0
        self.rows = torch.empty(0)
        self.replays: list[tuple[Callable[[], None], Tensor]] = []

    def begin(self, labels: Tensor, slots: Tensor, start: Tensor) -> None:
        """Load a batch.

        Args:
            labels: Labels int64 (n,) or captions (n, S, E).
            slots: Table row of each sample and, after these, of its null branch, int64 (2n,).
            start: Initial noise (n, C, H, W).
        """
        self.labels.copy_(labels)
        self.slots.copy_(slots)
        self.start.copy_(start)

    def load(self, start: int, stop: int, rows: Tensor, noise: KeyedNoise | ReferenceNoise) -> None:
        """Compute the modulation vectors and the noise of the steps from `start` up to `stop`.

        Args:
            start: First step.
            stop: Step after the last one.
            rows: Labels (rows,) or captions (rows, S, E) of the modulation table.
            noise: Source of the noise.
        """
        self.first, self.rows = start, rows
        self.table.fill(self.times[start * self.per_step : stop * self.per_step + 1], rows)
        for i in range(start, stop) if draws_noise(self.config) else ():
            self.noise[i - start] = noise.step(i)

    def advance(self, segment: int, states: Iterator[Tensor]) -> Tensor:
        """Run a segment.

        Args:
            segment: Its number; segments run in order.
            states: An iterator from `states`, the same one for all segments; not used after `capture`.

        Returns:
            The state (n, C, H, W) after the segment, in memory that the next replay overwrites.
        """
        if self.replays:
            replay, state = self.replays[segment]
            replay()
            return state
        start, stop = self.key.segments[segment]
        for _ in range(start, stop):
            state = next(states)
        return state

    def states(self) -> Iterator[Tensor]:
        """Iterator over the states after each step, (n, C, H, W); `load` must have been called for a step."""
        solver, schedule = self.config.solver, self.schedule

        def noise(i: int) -> Tensor:
            return self.noise[i - self.first]

        if solver == "ddpm":
            score = None if self.cond_fn is None else self._score
            return solvers.ddpm(self.denoise, self.start, schedule, noise, score=score)
        if solver == "ddim":
            return solvers.ddim(self.denoise, self.start, schedule, noise, eta=self.config.eta)
        if solver.startswith(solvers.SDE):
            return solvers.sde(
                self.denoise,
                self.start,
                schedule,
                noise,
                form=solver.removeprefix(solvers.SDE),
                last_step=self.config.last_step,
                norm=self.config.diffusion_norm,
                method=self.config.sde_method,
            )
        if solver == "dopri5":
            return self._adaptive()
        if solver in VELOCITY_SOLVERS:
            return runge_kutta.runge_kutta(lambda x, i: self.denoise(x, i).data, self.start, schedule, solver)
        return solvers.DETERMINISTIC[solver](self.denoise, self.start, schedule)

    def denoise(self, x: Tensor, i: int) -> Denoised:
        """The guided prediction of x_0, or the velocity, for the state x (n, C, H, W) at evaluation i."""
        row = self.table.values[i - self.first * self.per_step]
        data, variance = self._evaluate(x, self.times[i], row, self.coefficients[i], self.guided[i])
        # The DDPM solver applies the score itself, to the mean of its step.
        if self.cond_fn is not None and self.config.solver != "ddpm":
            data = data + float(self.shift[i]) * self._score(x, i)
        return Denoised(data, variance)

    def _evaluate(self, x: Tensor, time: Tensor, row: Tensor, coefficients: Tensor, guided: bool) -> Denoised:
        a, b, scale = coefficients
        model: DiT | Called = self.model
        if is_called(self.model):
            # The null class follows the last class. As a caption, num_classes is 0: the null caption is all padding.
            null = torch.full_like(self.labels, self.model.num_classes)
            model = Called(self.model, time, torch.cat([self.labels, null]))
        return self.run(
            model,
            x,
            row,
            self.slots if guided else self.slots[: len(x)],
            a,
            b,
            scale if guided else None,
            self.config.guidance.guided(self.model.in_channels),
            self.predicts_data,
            self.config.clip,
        )

    def _adaptive(self) -> Iterator[Tensor]:
        """dopri5 from each time of the schedule to the next; `sampling_schedule` has only the ends."""
        x = self.start
        for start, end in itertools.pairwise([*self.schedule.times.tolist(), self.schedule.end]):
            x = dopri5(self._velocity_at, x, start, end, *self.config.tolerances())
            yield x

    def _velocity_at(self, t: float, x: Tensor) -> Tensor:
        """The guided velocity at any time, which replaces the first row of the table."""
        times = torch.tensor([t], dtype=torch.float32, device=x.device)
        self.table.fill(times, self.rows)
        time = np.array([t])
        a, b = self.schedule.velocity_coefficients(time)
        scale = self.config.guidance.scales(1 - time)
        coefficients = torch.from_numpy(np.stack([a, b, scale], axis=1)).to(x)[0]
        return self._evaluate(x, times[0], self.table.values[0], coefficients, bool(scale[0] != 1)).data

    def _score(self, x: Tensor, i: int) -> Tensor:
        assert self.cond_fn is not None
        return self.cond_fn(x, self.times[i].expand(len(x)), self.labels)

    def capture(self, graphs: GraphCapture) -> None:
        """Capture every segment; `advance` replays them from here on.

        The segments use one memory pool, since they are replayed in the order of their capture.
        """
        self._warm_up()
        pool, states, reached = graphs.pool(), self.states(), self.start
        for start, stop in self.key.segments:
            self.first = start

            def run(steps: int = stop - start) -> None:
                nonlocal reached
                for _ in range(steps):
                    reached = next(states)

            replay = graphs.capture(run, pool)
            self.replays.append((replay, reached))

    def _warm_up(self) -> None:
        """Run each kind of step once, so that kernels are compiled and coefficients are on the device."""
        for guided in (True, False):
            if guided in self.guided:
                evaluation = self.guided.index(guided)
                self.first = evaluation // self.per_step
                self.denoise(self.start, evaluation)
        self.first = 0
        states = self.states()
        for _ in range(min(_WARM_UP_STEPS, self.key.segments[0][1])):
            next(states)


class TrajectoryCache:
    """Captured trajectories of the last `size` keys; the least recently used one is discarded first."""

    def __init__(self, size: int = 4) -> None:
        self.size, self.captures = size, 0
        self._trajectories: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, capture: Callable[[], Any]) -> Any:
        """The trajectory of `key`; `capture` makes it where there is none."""
        if key not in self._trajectories:
            # Discarded before the capture, which needs the memory.
            while len(self._trajectories) >= self.size:
                self._trajectories.popitem(last=False)
            self._trajectories[key] = capture()
            self.captures += 1
        self._trajectories.move_to_end(key)
        return self._trajectories[key]

    def clear(self) -> None:
        """Discard all trajectories and their memory."""
        self._trajectories.clear()
