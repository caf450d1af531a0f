"""One model over several processes: `parallelize`.

"none": one process. "ddp": every rank holds everything and averages gradients. "fsdp": weights, gradients and optimizer
states are sharded over all ranks (`fully_shard`, ZeRO-3) and gathered block by block. "hsdp": they are sharded within a
machine only, and gradients are averaged between machines, so that the large messages stay on the fast links.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dit_fast.distributed.world import World
from dit_fast.errors import ConfigError
from dit_fast.model.dit import DiT
from dit_fast.utils.nvtx import Ranges

Parallel = Literal["auto", "none", "ddp", "fsdp", "hsdp"]
PARALLEL = get_args(Parallel)


def choose_parallel(mode: str, world: World) -> str:
    """Resolve "auto": "none" for one process, "fsdp" for several; ConfigError for a mode that does not fit `world`."""
    if mode not in PARALLEL:
        raise ConfigError(f"--parallel {mode}: choose one of {', '.join(PARALLEL)}")
    if mode == "auto":
        mode = "fsdp" if world.size > 1 else "none"
    if mode == "none" and world.size > 1:
        raise ConfigError(
            f"--parallel none with {world.size} ranks: each would train a model of its own; give ddp"
        )
    if mode != "none" and world.size == 1:
        raise ConfigError(
            f"--parallel {mode} needs several processes: start it with torchrun --nproc-per-node N -m dit_fast.cli"
        )
    if mode == "hsdp" and world.size % world.local_size:
        raise ConfigError(
            f"--parallel hsdp: {world.size} ranks do not divide into machines of {world.local_size}"
        )
    return mode


def parallelize(
    model: DiT,
    world: World,
    mode: str = "auto",
    *,
    recompute: str | None = None,
    compile: bool = False,
    param_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Prepare `model` in place for training on `world`.

    Ranks must hold equal weights: "ddp" broadcasts those of rank 0, but "fsdp" shards what each rank has.

    Args:
        model: The model, moved to the device of the rank.
        world: The ranks.
        mode: One of PARALLEL.
        recompute: As `Backends.recompute`; None leaves it.
        compile: Compile each block separately.
        param_dtype: Dtype of the weights that "fsdp" and "hsdp" gather (bfloat16 halves that traffic; gradients are
            still summed in float32); None: the parameters' own.

    Returns:
        The module to call, with the same parameters.

    Raises:
        ConfigError: A mode that does not fit the world.
    """
    mode = choose_parallel(mode, world)
    if recompute is not None:
        model.recompute = recompute
    if compile:
        for block in model.blocks:
            # The method, not the module, so that hooks (ranges, fully_shard) stay outside of the graph.
            setattr(block, "forward", torch.compile(block.forward, dynamic=False, fullgraph=True))  # noqa: B010
    if mode in ("fsdp", "hsdp"):
        return _shard(model, _mesh(world, mode), param_dtype)
    model.to(world.device)
    if mode == "none":
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _mesh(world: World, mode: str) -> DeviceMesh:
    if mode == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    machines = world.size // world.local_size
    return init_device_mesh(
        world.device.type, (machines, world.local_size), mesh_dim_names=("replicate", "shard")
    )


def _shard(model: DiT, mesh: DeviceMesh, param_dtype: torch.dtype | None) -> nn.Module:
    """Shard each block, and then the rest at the root: embedders and the final layer."""
    # Imported where it is used: it takes a third of a second.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Inputs keep their dtype: timesteps and the residual stream are not weights.
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=torch.float32 if param_dtype else None,
        cast_forward_inputs=False,
    )
    # A block also returns a view (its gate); nothing writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # The backward pass needs the last block's weights again at once.
    for block in model.blocks:
        last = block is model.blocks[-1]
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not last)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


@contextmanager
def micro_batch(module: nn.Module, last: bool) -> Iterator[None]:
    """Context for forward and backward of one micro-batch: gradients are reduced between ranks in the `last` one only.

    "fsdp" and "hsdp" still reduce-scatter each micro-batch, so that no rank holds a whole gradient; "hsdp" delays its
    all-reduce between machines to the last.
    """
    if isinstance(module, DistributedDataParallel):
        with nullcontext() if last else module.no_sync():
            yield
        return
    sharded: Any = module
    if hasattr(module, "set_requires_all_reduce"):
        sharded.set_requires_all_reduce(last)
        sharded.set_is_last_backward(last)
    yield


def mark_communication(module: nn.Module, ranges: Ranges) -> None:
    """Put ranges around the collectives that "ddp", "fsdp" and "hsdp" start for weights and gradients."""
    # Imported where they are used, as fully_shard is; the classes that set_custom_... replaces have no public names.
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    class AllGather(DefaultAllGather):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            with ranges("communication"):
                return super().__call__(*arguments, **options)

    class ReduceScatter(DefaultReduceScatter):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            with ranges("communication"):
                return super().__call__(*arguments, **options)

    def all_reduce(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        with ranges("communication"):
            mean = bucket.buffer().div_(dist.get_world_size())
            work = dist.all_reduce(mean, async_op=True)
            return work.get_future().then(lambda done: mean)

    if isinstance(module, DistributedDataParallel):
        module.register_comm_hook(None, all_reduce)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_custom_all_gather(AllGather())
            part.set_custom_reduce_scatter(ReduceScatter())


def groups_of(module: nn.Module) -> tuple[Any, ...]:
    """The process groups of a sharded module, besides the default group."""
    parameter = next(module.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    return () if mesh is None else tuple(mesh.get_group(index) for index in range(mesh.ndim))


def rank_rows(batch_size: int, accumulate: int, world: World) -> slice:
    """This rank's rows of the global batch; ConfigError where the batch does not divide evenly."""
    parts = world.size * accumulate
    if batch_size % parts:
        near = max(1, round(batch_size / parts)) * parts
        raise ConfigError(
            f"--batch-size {batch_size} does not divide by {world.size} ranks x --accumulate {accumulate}; "
            f"give --batch-size {near}"
        )
    rows = batch_size // world.size
    return slice(world.rank * rows, (world.rank + 1) * rows)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, detached, on every rank; all ranks must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(tensor: Any) -> Any:
    """This rank's shard of a DTensor; another tensor, or None, unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
