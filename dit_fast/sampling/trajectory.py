"""One trajectory of a batch: its fixed memory, the steps that read it, and how it is captured."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit_fast.model.dit import DiT
from dit_fast.sampling import solvers
from dit_fast.sampling.guidance import Guidance, guide
from dit_fast.sampling.schedule import Nodes
from dit_fast.sampling.solvers import Denoised
from dit_fast.utils import keyed
from dit_fast.utils.cuda_graphs import GraphBackend, Replay

# A draw covers this many steps: one launch of the generator costs as much as several steps' numbers.
BLOCK = 25


class KeyedNoise:
    """Noise of sample i that depends on (seed, i) alone: not on the batch, the ranks, or the samples before.

    `numbers`: int64 (n,), on the device of the draws. `shape`: (C, H, W).
    """

    def __init__(self, seed: int, numbers: Tensor, shape: tuple[int, ...]) -> None:
        self.seed, self.numbers, self.shape = seed, numbers, shape
        self._block, self._values = -1, torch.empty(0)

    def start(self) -> Tensor:
        """Pure noise to begin with, float32 (n, C, H, W)."""
        return keyed.normal(keyed.key(self.seed, "sampling start"), self.numbers, self.shape)

    def step(self, i: int) -> Tensor:
        """The noise of step i, float32 (n, C, H, W)."""
        if i // BLOCK != self._block:
            self._block = i // BLOCK
            key = keyed.key(self.seed, f"sampling steps {self._block}")
            self._values = keyed.normal(key, self.numbers, (BLOCK, *self.shape))
        return self._values[:, i % BLOCK]


class ReferenceNoise:
    """The reference's draws after `torch.manual_seed(seed)`: n to begin with, then 2n at each step under guidance.

    Steps must be asked for in order. The second half of 2n belongs to the null branch, whose state is thrown away.
    """

    def __init__(self, seed: int, numbers: Tensor, shape: tuple[int, ...], doubled: bool) -> None:
        self.shape, self.doubled, self.n = shape, doubled, len(numbers)
        self.device = numbers.device
        self.generator = torch.Generator(self.device).manual_seed(batch_seed(seed, int(numbers[0])))

    def start(self) -> Tensor:
        """As `KeyedNoise.start`."""
        return torch.randn(self.n, *self.shape, generator=self.generator, device=self.device)

    def step(self, i: int) -> Tensor:
        """As `KeyedNoise.step`, for the next i."""
        n = 2 * self.n if self.doubled else self.n
        return torch.randn(n, *self.shape, generator=self.generator, device=self.device)[: self.n]


def batch_seed(seed: int, first: int) -> int:
    """Seed of the batch whose first sample has number `first`; the first batch has `seed` itself."""
    if first == 0:
        return seed
    return int(np.random.SeedSequence((seed, first)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def loop_parameters(model: DiT) -> list[Tensor]:
    """The parameters that a step with given modulation vectors reads."""
    hoisted = {id(p) for layer in model.modulation_layers() for p in layer.parameters()}
    return [
        p
        for name, p in model.named_parameters()
        if not name.startswith(("t_embedder.", "y_embedder.")) and id(p) not in hoisted
    ]


def modulation_width(model: DiT, caption_tokens: int = 1) -> int:
    """Numbers in one modulation vector: (6 depth + 2) D under adaLN-Zero, (1 + S) D of a caption of S tokens."""
    return sum(model.modulation_widths(caption_tokens))


class ModulationTable:
    """Modulation vectors of up to `steps` consecutive nodes for `rows` labels, or captions of `caption_tokens` tokens:
    (steps, rows, `modulation_width`).

    `values` keeps its memory when it is filled again. With `offload`, the adaLN weights wait on the CPU and each is
    brought to the table's device while it is used.
    """

    def __init__(
        self, model: DiT, steps: int, rows: int, *, caption_tokens: int = 1, offload: bool = False
    ) -> None:
        self.model, self.offload = model, offload
        like = model.pos_embed
        width = modulation_width(model, caption_tokens)
        self.values = torch.zeros(steps, rows, width, dtype=like.dtype, device=like.device)

    def fill(self, times: Tensor, labels: Tensor) -> None:
        """Make the vectors of `times` (at most `steps`) and `labels` (rows,), up to the null class, or captions."""
        t = self.model.t_embedder(times)
        y = self.model.embed_labels(labels)
        y = None if y is None else y.repeat(len(times), *[1] * (y.ndim - 1))
        c = self.model.condition(t.repeat_interleave(len(labels), 0), y)
        start = 0
        for layer in self.model.modulation_layers():
            if self.offload:
                layer.to(c.device)
            made = layer(c).flatten(1).unflatten(0, (len(times), len(labels)))
            if self.offload:
                layer.to("cpu")
            self.values[: len(times), :, start : start + made.shape[-1]] = made
            start += made.shape[-1]


_WARM_UP_STEPS = 3

# cond_fn(x, t, y) -> gradient of log p(y | x) with respect to x.
CondFn = Callable[[Tensor, Tensor, Tensor], Tensor]
Evaluate = Callable[..., Denoised]


@dataclass(frozen=True)
class ProgramKey:
    """All that a captured trajectory is made for; another value of any of these needs another capture.

    `rows`: labels or captions in the modulation table; `caption`: shape (S, E) of one, () of labels;
    `segments`: (start, stop) of the steps that are run in one go;
    `switches`: which kernels and attention the model runs; `weights`: addresses of the parameters that steps read.
    """

    batch: int
    rows: int
    caption: tuple[int, ...]
    nodes: Nodes
    solver: str
    eta: float
    last_step: str
    guidance: Guidance
    clip: bool
    dtype: torch.dtype
    device: torch.device
    segments: tuple[tuple[int, int], ...]
    compiled: bool
    offload: bool
    switches: tuple[str, ...]
    weights: tuple[int, ...]

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.solver.startswith(("ddpm", solvers.SDE)) or (self.solver == "ddim" and self.eta > 0)


def evaluate(
    model: DiT, x: Tensor, rows: Tensor, slots: Tensor, a: Tensor, b: Tensor, scale: Tensor | None,
    channels: int, of_data: bool, clip: bool,
) -> Denoised:  # fmt: skip
    """x_0 = a x + b answer, predicted for states x (n, C, H, W) from the modulation vectors `rows[slots]`.

    Under guidance (`scale` given) `slots` has 2n places, the null class's last. `of_data`: the answer is x_0 itself.
    """
    inputs = x if scale is None else torch.cat([x, x])
    answer = model.forward_modulated(inputs.to(rows.dtype), rows.index_select(0, slots)).to(x.dtype)
    if scale is not None:
        answer = guide(answer, scale, channels)
    prediction, variance = answer[:, : x.shape[1]], answer[:, x.shape[1] :]
    data = prediction if of_data else torch.addcmul(a * x, b, prediction)
    return Denoised(data.clamp(-1, 1) if clip else data, variance if model.learn_sigma else None)


class Program:
    """The memory of one trajectory and its steps; `load` and `start` fill the memory, `states` reads it."""

    def __init__(
        self, model: DiT, key: ProgramKey, run: Evaluate = evaluate, cond_fn: CondFn | None = None
    ) -> None:
        self.model, self.key, self.nodes, self.run, self.cond_fn = model, key, key.nodes, run, cond_fn
        state_dtype = torch.float64 if key.dtype is torch.float64 else torch.float32
        shape = (key.batch, model.in_channels, *model.x_embedder.img_size)
        longest = max(stop - start for start, stop in key.segments)
        self.start = torch.zeros(shape, dtype=state_dtype, device=key.device)
        self.noise = self.start.new_zeros((longest if key.stochastic else 0, *shape))
        # Heun's method reads one node ahead.
        self.table = ModulationTable(
            model,
            min(longest + 1, len(self.nodes)),
            key.rows,
            caption_tokens=key.caption[0] if key.caption else 1,
            offload=key.offload,
        )
        self.slots = torch.zeros(2 * key.batch, dtype=torch.int64, device=key.device)
        kind = key.dtype if key.caption else torch.int64
        self.labels = torch.zeros(key.batch, *key.caption, dtype=kind, device=key.device)

        a, b = self.nodes.data_coefficients()
        self.of_data = not a.any()
        scales = key.guidance.scales(self.nodes)
        self.guided = [bool(scale != 1) for scale in scales]
        self.coefficients = torch.from_numpy(np.stack([a, b, scales], axis=1)).to(self.start)
        times = torch.as_tensor(self.nodes.times)
        whole = bool((times == times.round()).all())
        self.times = (times.long() if whole else times.float()).to(key.device)
        # Dhariwal & Nichol 2021, algorithm 2: noise' = noise - sigma * score moves x_0 by sigma^2 / alpha * score.
        self.shift = self.nodes.sigmas[:-1] ** 2 / self.nodes.alphas[:-1].clip(1e-12)
        self.first = 0
        self.replays: list[tuple[Replay, Tensor]] = []

    def begin(self, labels: Tensor, slots: Tensor, start: Tensor) -> None:
        """Take a batch: its labels (n,) or captions, their rows in the table (2n,), the null's n last, and x_T."""
        self.labels.copy_(labels)
        self.slots.copy_(slots)
        self.start.copy_(start)

    def load(self, start: int, stop: int, rows: Tensor, noise: KeyedNoise | ReferenceNoise) -> None:
        """Make what the steps from `start` up to `stop` read: vectors for the labels `rows`, and noise."""
        self.first = start
        self.table.fill(self.times[start : min(stop + 1, len(self.nodes))], rows)
        if self.key.stochastic:
            for i in range(start, stop):
                self.noise[i - start] = noise.step(i)

    def denoise(self, x: Tensor, i: int) -> Denoised:
        """The guided prediction of x_0 at node i."""
        a, b, scale = self.coefficients[i]
        channels = min(self.key.guidance.channels or self.model.in_channels, self.model.in_channels)
        data, variance = self.run(
            self.model,
            x,
            self.table.values[i - self.first],
            self.slots if self.guided[i] else self.slots[: len(x)],
            a,
            b,
            scale if self.guided[i] else None,
            channels,
            self.of_data,
            self.key.clip,
        )
        if self.cond_fn is not None and self.key.solver != "ddpm":
            data = data + float(self.shift[i]) * self.score(x, i)
        return Denoised(data, variance)

    def score(self, x: Tensor, i: int) -> Tensor:
        """The classifier's gradient at node i."""
        assert self.cond_fn is not None
        return self.cond_fn(x, self.times[i].expand(len(x)), self.labels)

    def states(self) -> Iterator[Tensor]:
        """The state after each step, (n, C, H, W)."""
        key = self.key

        def noise(i: int) -> Tensor:
            return self.noise[i - self.first]

        if key.solver == "ddpm":
            score = None if self.cond_fn is None else self.score
            return solvers.ddpm(self.denoise, self.start, self.nodes, noise, score=score)
        if key.solver == "ddim":
            return solvers.ddim(self.denoise, self.start, self.nodes, noise, eta=key.eta)
        if key.solver.startswith(solvers.SDE):
            form = key.solver.removeprefix(solvers.SDE)
            return solvers.sde(
                self.denoise, self.start, self.nodes, noise, form=form, last_step=key.last_step
            )
        return solvers.DETERMINISTIC[key.solver](self.denoise, self.start, self.nodes)

    def capture(self, backend: GraphBackend) -> None:
        """Record every segment; afterwards `replays` has what runs it and where its last state then lies.

        Segments share one pool of memory: they are replayed in the order of their capture.
        """
        self._warm_up()
        pool, states, reached = backend.pool(), self.states(), self.start
        for start, stop in self.key.segments:
            self.first = start

            def run(steps: int = stop - start) -> None:
                nonlocal reached
                for _ in range(steps):
                    reached = next(states)

            replay = backend.capture(run, pool)
            self.replays.append((replay, reached))

    def _warm_up(self) -> None:
        """Run each kind of step once: kernels are compiled and coefficients reach the device before the capture."""
        for kind in (True, False):
            if kind in self.guided:
                self.first = self.guided.index(kind)
                self.denoise(self.start, self.first)
        self.first = 0
        states = self.states()
        for _ in range(min(_WARM_UP_STEPS, self.key.segments[0][1])):
            next(states)
