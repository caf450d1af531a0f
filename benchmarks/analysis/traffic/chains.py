"""What a step computes beside its blocks, priced: Inductor's launches and bytes against the least possible.

Each chain is written in plain PyTorch, or is dit_fast's own where the diffusion is concerned, and compiled alone.
Sizes are the program's, DiT-XL/2's at 256 x 256 pixels by default. `prices.py` has the least possible beside them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from benchmarks.analysis.traffic import Program
from benchmarks.analysis.traffic.blocks import chain, default_dtype
from benchmarks.analysis.traffic.inductor import Workload
from benchmarks.models.plain_dit import (
    PlainBlock,
    PlainFinalLayer,
    PlainLabelEmbedder,
    PlainPatchEmbed,
    PlainTimestepEmbedder,
)
from dit_fast.diffusion import create_diffusion
from dit_fast.utils import keyed

PATCH, CHANNELS, CLASSES, DEPTH = 2, 4, 1000, 28


def weights(program: Program) -> torch.dtype:
    """Parameters' dtype: autocast trains float32 ones."""
    return torch.bfloat16 if program.mode == "bf16" else torch.float32


def side(program: Program) -> int:
    """Height and width of the latent."""
    return PATCH * int(program.tokens**0.5)


def latents(
    program: Program, channels: int = CHANNELS, batch: int | None = None, grad: bool = False
) -> Tensor:
    """A float32 latent of the batch, or a model's output for it."""
    size = side(program)
    return torch.empty(batch or program.batch, channels, size, size, dtype=torch.float32, requires_grad=grad)


def steps(program: Program, batch: int | None = None) -> Tensor:
    """Timesteps of the batch."""
    return torch.empty(batch or program.batch, dtype=torch.int64)


def final_layer(program: Program) -> Workload:
    """Modulated norm, projection and unpatchify of plain PyTorch; the modulation is given."""
    B, T, D = program.batch, program.tokens, program.width
    with default_dtype(weights(program)):
        layer = PlainFinalLayer(D, PATCH * PATCH * 2 * CHANNELS)
        layer.adaLN_modulation = nn.Sequential()
    rows = side(program) // PATCH

    def run(x: Tensor, modulation: Tensor) -> Tensor:
        out = layer(x, modulation).reshape(B, rows, rows, PATCH, PATCH, -1)
        return torch.einsum("nhwpqc->nchpwq", out).reshape(B, -1, side(program), side(program)).float()

    x = torch.empty(B, T, D, dtype=weights(program), requires_grad=True)
    return Workload(run, (x, torch.empty(B, 2 * D, dtype=torch.bfloat16, requires_grad=True)))


def our_final_layer(program: Program) -> Workload:
    """The same of dit_fast."""
    from dit_fast.kernels import unpatchify
    from dit_fast.model.blocks import FinalLayer

    B, T, D = program.batch, program.tokens, program.width
    with default_dtype(weights(program)):
        layer = FinalLayer(D, PATCH, 2 * CHANNELS)
        layer.adaLN_modulation = nn.Sequential()
    rows = side(program) // PATCH

    def run(x: Tensor, modulation: Tensor) -> Tensor:
        return unpatchify(layer(x, modulation), PATCH, rows, rows).float()

    x = torch.empty(B, T, D, dtype=weights(program), requires_grad=True)
    return Workload(run, (x, torch.empty(B, 2 * D, dtype=torch.bfloat16, requires_grad=True)))


def timestep_embedding(program: Program) -> Workload:
    """Sinusoids, Linear, SiLU, Linear."""
    with default_dtype(weights(program)):
        embedder = PlainTimestepEmbedder(program.width)

    def run(t: Tensor) -> Tensor:
        angles = t[:, None].float() * torch.exp(-9.210340371976184 / 128 * torch.arange(128, device=t.device))
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return embedder.mlp(waves.to(weights(program)))

    return Workload(run, (steps(program),))


def label_embedding(program: Program) -> Workload:
    """Label drop and look-up; backward, the sum over equal labels. The random draw is given."""
    with default_dtype(weights(program)):
        embedder = PlainLabelEmbedder(CLASSES, program.width, 0.1)

    def run(y: Tensor, draw: Tensor) -> Tensor:
        return embedder.embedding_table(torch.where(draw < 0.1, CLASSES, y))

    return Workload(run, (steps(program), torch.empty(program.batch, dtype=torch.float32)))


def modulations(program: Program) -> Workload:
    """SiLU of the conditioning vector and one Linear for each block and the final layer."""
    D = program.width
    with default_dtype(weights(program)):
        layers = nn.ModuleList([*(nn.Linear(D, 6 * D) for _ in range(DEPTH)), nn.Linear(D, 2 * D)])

    def run(c: Tensor) -> Tensor:
        return torch.cat([layer(F.silu(c)) for layer in layers], dim=1)

    return Workload(run, (torch.empty(program.batch, D, dtype=torch.bfloat16, requires_grad=True),))


def patch_embedding(program: Program) -> Workload:
    """Convolution of the patches plus bias plus position."""
    T, D = program.tokens, program.width
    with default_dtype(weights(program)):
        embed = PlainPatchEmbed(CHANNELS, D, PATCH)
    positions = torch.empty(1, T, D, dtype=weights(program))
    return Workload(lambda x, pos: embed(x.to(weights(program))) + pos, (latents(program), positions))


def our_patch_embedding(program: Program) -> Workload:
    """The same of dit_fast."""
    from dit_fast.model.embedders import PatchEmbed

    T, D = program.tokens, program.width
    with default_dtype(weights(program)):
        embed = PatchEmbed(side(program), PATCH, CHANNELS, D)
    positions = torch.empty(1, T, D, dtype=weights(program))
    return Workload(lambda x, pos: embed(x, pos), (latents(program), positions))


def noise_draw(program: Program) -> Workload:
    """The noise of a training step, keyed by the samples' numbers."""
    key, shape = keyed.key(0, "noise"), (CHANNELS, side(program), side(program))
    return Workload(lambda index: keyed.normal(key, index, shape), (steps(program),), backward=False)


def noise_mixing(program: Program) -> Workload:
    """x_t from x_0, noise and t."""
    diffusion = process("")
    arguments = latents(program), steps(program), latents(program)
    return Workload(lambda x, t, noise: diffusion.q_sample(x, t, noise), arguments, backward=False)


def hybrid_loss(program: Program) -> Workload:
    """Squared error and variational bound of the model's output, with the noise mixing left out."""
    diffusion = process("")
    x_start, noise, x_t = latents(program), latents(program), latents(program)
    t, output = steps(program), latents(program, 2 * CHANNELS, grad=True)

    def run(output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        prediction, variance = diffusion._split_output(output, x_t)
        error = ((noise - prediction) ** 2).mean(dim=(1, 2, 3))
        posterior = diffusion._posterior(prediction.detach(), variance, x_t, t, clip_denoised=False)
        bound = diffusion._bound(x_start, x_t, t, posterior) * (diffusion.num_timesteps / 1000.0)
        return (error + bound).mean()

    return Workload(run, (output, x_start, x_t, t, noise))


def ddpm_update(program: Program) -> Workload:
    """Guidance, learned-range variance and ancestral step, fast mode: one half is updated."""
    return sampling_update(program, "p_sample")


def ddim_update(program: Program) -> Workload:
    """Guidance and a deterministic DDIM step, fast mode."""
    return sampling_update(program, "ddim_sample")


def sampling_update(program: Program, method: str) -> Workload:
    """One step from the model's output for 2 n latents, n = batch / 2; noise is drawn where the step asks for it."""
    n = program.batch // 2
    diffusion = process("250")
    x, t, output = latents(program, batch=n), steps(program, n), latents(program, 2 * CHANNELS)

    def run(x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        eps, rest = output[:, :3], output[:, 3:]
        cond, uncond = eps.chunk(2)
        guided = torch.cat([uncond + 4.0 * (cond - uncond), rest[:n]], dim=1)
        return getattr(diffusion, method)(lambda *_, **__: guided, x, t, clip_denoised=False)["sample"]

    return Workload(run, (x, t, output), backward=False)


def process(respacing: str) -> Any:
    """A diffusion whose step tables are on the device already, as after a first step."""
    with unset_fake_temporarily(), torch.device("cpu"):
        diffusion = create_diffusion(timestep_respacing=respacing)
    for table in filter(None, (diffusion._coefficients._table, diffusion._timestep_table)):
        fake = torch.empty(table._host.shape, dtype=table._host.dtype)
        table._copies[fake.device] = fake
    return diffusion


def forward_block(program: Program) -> Workload:
    """Blocks in plain PyTorch without a backward pass, as when sampling."""
    workload = chain(program, lambda: PlainBlock(program.width, program.heads, 4.0), lazy=False)
    return Workload(workload.function, workload.arguments, backward=False)
