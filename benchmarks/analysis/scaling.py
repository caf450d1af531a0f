"""Training at scale on paper: step time, communication and memory for 1 to 1,024 GPUs, from FLOPs and bytes.

`python -m benchmarks.analysis.scaling` prints the tables of docs/scaling.md. Nothing is measured: rates are assumed,
stated in `Machine`, and the counts are those of the architecture (Peebles & Xie 2023, table 1, figure 3) and of what
dit_fast moves and keeps. The model answers what limits where, not how fast a machine is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.analysis.roofline import OPTIMIZER_BYTES, U_BACKWARD, U_FORWARD, Step, training_parts
from dit_fast.model.presets import SIZES

GPUS = (1, 8, 64, 256, 1024)


@dataclass(frozen=True)
class Machine:
    """Eight H100 SXM and eight network cards of 400 Gb/s; rates in FLOP/s and bytes/s, latencies in seconds.

    A collective over n GPUs is a ring: bytes at the rate of its slowest link, and n - 1 steps of latency. Rings through
    several machines use all their cards, so that their bandwidth is about that inside a machine; their latency is not.
    """

    gemm: float = 640e12
    attention: float = 220e12
    memory: float = 2.6e12
    capacity: float = 80e9
    gpus: int = 8
    link: float = 370e9
    card: float = 45e9
    link_latency: float = 2e-6
    card_latency: float = 6e-6
    launch: float = 12e-3

    def gather(self, size: float, ranks: int) -> float:
        """Seconds of an all-gather or a reduce-scatter of `size` bytes in total."""
        if ranks == 1:
            return 0.0
        machines = -(-ranks // self.gpus)
        rate = self.link if machines == 1 else min(self.link, self.gpus * self.card)
        latency = (ranks - machines) * self.link_latency + (machines - 1) * self.card_latency
        return size * (ranks - 1) / ranks / rate + latency

    def reduce_between(self, size: float, machines: int) -> float:
        """Seconds of an all-reduce of `size` bytes between one GPU of each machine."""
        if machines == 1:
            return 0.0
        return 2 * (size * (machines - 1) / machines / self.card + (machines - 1) * self.card_latency)


@dataclass(frozen=True)
class Model:
    """A DiT on latents of 32 x 32 x 4 with patch 2 (256 tokens), as images of 256 x 256 give; counts of one image."""

    name: str
    depth: int
    width: int

    @property
    def step(self) -> Step:
        return Step(self.depth, self.width, patch=2, image_size=256, batch=1)

    @property
    def gemm_flops(self) -> float:
        """Of one block, forward."""
        products = ("qkv", "proj", "fc1", "fc2", "modulation")
        return sum(part.flops[0] for part in training_parts(self.step) if part.name in products) / self.depth

    @property
    def attention_flops(self) -> float:
        return sum(part.flops[0] for part in training_parts(self.step) if part.attention) / self.depth


@dataclass(frozen=True)
class Recipe:
    """How dit_fast trains: bfloat16 arithmetic, float32 weights, gradients, moments and average.

    passes: U that memory-bound kernels move in a block, forward and backward; kept: U that a block keeps for the
    backward pass (recompute cheap or none). optimizer: bytes moved for a parameter by AdamW, average and copy. state:
    bytes that a parameter takes (weight, gradient, two moments, average). weight: bytes of a gathered one.
    """

    passes_forward: float = U_FORWARD
    passes_backward: float = U_BACKWARD
    kept: float = 12.0
    optimizer: float = OPTIMIZER_BYTES
    state: float = 20.0
    weight: float = 2.0
    gradient: float = 4.0
    overhead: float = 3e9


def shard_traffic(
    model: Model, mode: str, gpus: int, shards: int, machine: Machine, recipe: Recipe
) -> tuple[float, float, float]:
    """Seconds to gather a block, to reduce a block's gradients, and for the root's weights and gradients."""
    machines = -(-gpus // machine.gpus) if mode == "hsdp" else 1

    def reduce(parameters: int) -> float:
        size = recipe.gradient * parameters
        return machine.gather(size, shards) + machine.reduce_between(size / shards, machines)

    root = machine.gather(recipe.weight * model.step.root_parameters, shards) + reduce(
        model.step.root_parameters
    )
    return (
        machine.gather(recipe.weight * model.step.block_parameters, shards),
        reduce(model.step.block_parameters),
        root,
    )


@dataclass(frozen=True)
class Estimate:
    """One step of one layout; times in seconds, memory in bytes on a GPU.

    products: forward and backward; compute: those and the optimizer; exposed: communication that nothing hides.
    """

    mode: str
    step: float
    products: float
    compute: float
    communication: float
    exposed: float
    memory: float
    limit: str


def estimate(
    model: Model,
    gpus: int,
    images: int,
    mode: str,
    machine: Machine = Machine(),
    recipe: Recipe = Recipe(),
) -> Estimate:
    """A step with `images` on each of `gpus`, in mode "none", "ddp", "fsdp" or "hsdp"."""
    shards = {"fsdp": gpus, "hsdp": min(gpus, machine.gpus)}.get(mode, 1)
    sharded = mode in ("fsdp", "hsdp")

    forward = images * (
        model.gemm_flops / machine.gemm
        + model.attention_flops / machine.attention
        + recipe.passes_forward * model.step.unit / machine.memory
    )
    # Twice the products; attention 2.5 times, since it makes its probabilities again.
    backward = images * (
        2 * model.gemm_flops / machine.gemm
        + 2.5 * model.attention_flops / machine.attention
        + recipe.passes_backward * model.step.unit / machine.memory
    )
    update = recipe.optimizer * model.step.parameters / shards / machine.memory
    if not sharded:
        update += 6 * model.step.parameters / machine.memory
    compute = model.depth * (forward + backward) + update

    if sharded:
        gather, scatter, root = shard_traffic(model, mode, gpus, shards, machine, recipe)
        communication = model.depth * (2 * gather + scatter) + root
        # The next block is gathered during the present one; the first one, and the last gradients, are waited for.
        overlapped = model.depth * (max(forward, gather) + max(backward, gather + scatter))
        time = overlapped + gather + scatter + root + update
        nothing = replace(recipe, weight=0, gradient=0)
        gather, scatter, root = shard_traffic(model, mode, gpus, shards, machine, nothing)
        latency = model.depth * (2 * gather + scatter) + root
    else:
        communication = 2 * machine.gather(recipe.gradient * model.step.parameters, gpus)
        tail = 2 * machine.gather(recipe.gradient * model.step.block_parameters, gpus)
        time = model.depth * forward + max(model.depth * backward, communication) + tail + update
        latency = 2 * machine.gather(0, gpus)
    step = max(time, machine.launch)
    exposed = step - compute if time >= machine.launch else 0.0

    # A bfloat16 copy of all; of a sharded model two blocks and their gradients at a time, and the root.
    gathered = recipe.weight * model.step.parameters
    if sharded:
        gathered = 2 * model.step.block_parameters * (recipe.weight + recipe.gradient)
        gathered += model.step.root_parameters * recipe.weight
    memory = (
        recipe.state * model.step.parameters / shards
        + gathered
        + images * model.depth * recipe.kept * model.step.unit
        + recipe.overhead
    )
    limit = "arithmetic"
    if memory > machine.capacity:
        limit = "memory: does not fit"
    elif time < machine.launch:
        limit = "the host (launches)"
    elif exposed > 0.1 * step:
        limit = "latency of collectives" if latency > communication / 2 else "bandwidth of collectives"
    elif update > 0.1 * step:
        limit = "the optimizer's memory traffic"
    return Estimate(
        mode,
        step,
        model.depth * (forward + backward),
        compute,
        communication,
        max(0.0, exposed),
        memory,
        limit,
    )


def modes(gpus: int, machine: Machine = Machine()) -> tuple[str, ...]:
    if gpus == 1:
        return ("none",)
    return ("ddp", "fsdp", "hsdp") if gpus > machine.gpus else ("ddp", "fsdp")


def best(model: Model, gpus: int, images: int) -> Estimate:
    """The fastest mode that fits; if none does, the one that lacks least."""
    choices = [estimate(model, gpus, images, mode) for mode in modes(gpus)]
    fitting = [choice for choice in choices if choice.memory <= Machine().capacity]
    return min(fitting, key=lambda choice: choice.step) if fitting else min(choices, key=lambda c: c.memory)


def paper_models() -> dict[str, Model]:
    models = {
        f"DiT-{size}/2": Model(f"DiT-{size}/2", SIZES[size]["depth"], SIZES[size]["hidden_size"])
        for size in ("S", "B", "L", "XL")
    }
    # 24 heads of 128.
    models["7B"] = Model("7B", 40, 3072)
    return models


HEADER = (
    "| model | GPUs | images per GPU | mode | step ms | images/s | of ideal | compute ms | communication ms | "
    "not hidden ms | memory GB | limit |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(model: Model, gpus: int, images: int, found: Estimate, ideal: float) -> str:
    rate = gpus * images / found.step
    return (
        f"| {model.name} | {gpus} | {images} | {found.mode} | {1e3 * found.step:.1f} | {rate:,.0f} | "
        f"{100 * rate / (ideal * gpus):.0f} % | {1e3 * found.compute:.1f} | {1e3 * found.communication:.1f} | "
        f"{1e3 * found.exposed:.1f} | {found.memory / 1e9:.1f} | {found.limit} |"
    )


WEAK = {"DiT-S/2": 256, "DiT-B/2": 256, "DiT-L/2": 256, "DiT-XL/2": 256, "7B": 32}


def ideal_rate(model: Model, images: int) -> float:
    """Images per second of one GPU with forward and backward alone: no optimizer, no waiting, no limit of memory."""
    return images / estimate(model, 1, images, "none").products


def weak_scaling() -> Iterator[str]:
    """Global batch proportional to the GPUs."""
    for name, images in WEAK.items():
        model = paper_models()[name]
        for gpus in GPUS:
            yield row(model, gpus, images, best(model, gpus, images), ideal_rate(model, images))


def strong_scaling(batch: int = 1024) -> Iterator[str]:
    """The batch stays: the paper's 256 is four times less still."""
    for name in ("DiT-XL/2", "7B"):
        model = paper_models()[name]
        for gpus in (8, 32, 64, 128, 256, 1024):
            images = batch // gpus
            yield row(model, gpus, images, best(model, gpus, images), ideal_rate(model, WEAK[name]))


def by_mode() -> Iterator[str]:
    """Every mode beside the others, where they differ."""
    for name, gpus, images in (
        ("DiT-XL/2", 64, 32),
        ("DiT-XL/2", 1024, 32),
        ("7B", 64, 32),
        ("7B", 1024, 32),
    ):
        model = paper_models()[name]
        for mode in modes(gpus):
            found = estimate(model, gpus, images, mode)
            yield row(model, gpus, images, found, ideal_rate(model, WEAK[name]))


def tables() -> str:
    parts = []
    for title, rows in (
        ("Global batch proportional to the GPUs", weak_scaling()),
        ("Global batch of 1,024", strong_scaling()),
        ("Comparison of modes", by_mode()),
    ):
        parts.append(f"### {title}\n\n{HEADER}\n" + "\n".join(rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(tables())
