"""Options of `dit-fast sample`, with those of the reference's sample.py and sample_ddp.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_fast.diffusion.objective import ObjectiveName
from dit_fast.diffusion.paths import PathName, Prediction
from dit_fast.download import pretrained_models
from dit_fast.interop.guidance import DEFAULT_SCALE
from dit_fast.sampling import Guidance, SamplerConfig
from dit_fast.sampling.config import BATCH_SIZE, SamplePrecision
from dit_fast.sampling.guidance import GuidanceSchedule
from dit_fast.sampling.schedule import SHIFT
from dit_fast.sampling.solvers import LastStep, SdeMethod, Solver
from dit_fast.utils.options import Options, documented, option, same_option
from dit_fast.utils.values import PATH, SEED, SIDE, SOURCE, TEXT, Number, Pair, Pattern, Several, Whole

ALL_CLASSES = 20
"""All classes of a small set are drawn by default; of more than these, SHOWN_CLASSES evenly spaced ones."""
SHOWN_CLASSES = 8
PER_CLASS = 8
OWN_DATA = "(the checkpoint's own data)"
RESPACING = Pattern(
    r"(ddim)?\d{1,7}|\d{1,7}(,\d{1,7})*",
    "a number, of diffusion also numbers with commas, or ddim and a number",
)
"""Steps of sampling, as `dit_fast.sampling.sampling_schedule` takes them."""


class ImageSize(Pair):
    """The side of a square image, as in "256", or height and width, as in "192x320"."""

    def accept(self, value: Any) -> Any:
        sides = super().accept(value)
        return sides if isinstance(value, tuple | list) and len(value) == 2 else sides[0]


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """Options that select a checkpoint, for the commands that read one."""

    ckpt: str | None = option(
        None,
        "Run folder, step folder, save_pretrained folder, folder of diffusers, .safetensors or .pt file, repository "
        "of the Hugging Face hub (organization/name or organization/name@revision), or published name "
        f"({', '.join(sorted(pretrained_models))})",
        SOURCE,
        group="checkpoint",
    )
    weights: str = option(
        "ema",
        "Weights to use: ema, model, or ema:WIDTH, an average of any width of a run with --ema-snapshot-every",
        TEXT,
        group="checkpoint",
        metavar="SET",
    )
    lora: str | None = option(
        None,
        "Folder with a LoRA adapter of these weights, from dit-fast train --lora or peft, merged into them",
        SOURCE,
        group="checkpoint",
        metavar="ADAPTER",
    )
    num_heads: int | None = option(
        None,
        "Attention heads of a checkpoint that does not record them",
        Whole(1, 1 << 12),
        group="checkpoint",
        metavar="N",
        default_text="from the checkpoint",
    )
    objective: ObjectiveName | None = option(
        None,
        "Objective of a checkpoint that does not record it",
        group="checkpoint",
        default_text="from the checkpoint, else diffusion",
    )
    prediction: Prediction | None = option(
        None,
        "Prediction of a checkpoint that does not record it",
        group="checkpoint",
        default_text="from the checkpoint, else epsilon for diffusion and velocity for flow",
    )
    path: PathName | None = option(
        None,
        "Path of a checkpoint of flow matching that does not record it",
        group="checkpoint",
        default_text="from the checkpoint, else linear",
    )

    def given_objective(self) -> dict[str, str]:
        """Part of the objective that was given, as `load_model` takes it."""
        given = {name: getattr(self, name) for name in ("objective", "prediction", "path")}
        return {name: value for name, value in given.items() if value is not None}


@documented
@dataclass(frozen=True, kw_only=True)
class SampleOptions(CheckpointOptions):
    """Options of `dit-fast sample`."""

    model: str | None = option(
        None,
        "Name of the model that the checkpoint must have, e.g. DiT-XL/2",
        TEXT,
        group="checkpoint",
        metavar="NAME",
    )
    image_size: int | tuple[int, int] | None = option(
        None,
        "Side of the images that the checkpoint must make, or HEIGHTxWIDTH to sample another size",
        ImageSize(SIDE),
        group="checkpoint",
        metavar="SIZE",
        default_text="from the checkpoint",
    )
    num_classes: int | None = option(
        None,
        "Number of classes that the checkpoint must have",
        Whole(0, 1 << 24),
        group="checkpoint",
        metavar="N",
    )
    vae: str | None = option(
        None,
        "Decoder of latents: ema, mse, a folder with a diffusers AutoencoderKL, or none to keep latents",
        SOURCE,
        group="checkpoint",
        metavar="NAME",
        default_text="that of the training, else mse",
    )
    latent_stats: Path | None = option(
        None,
        "LightningDiT's latents_stats.pt: mean and standard deviation per channel of its normalized latents",
        PATH,
        group="checkpoint",
        metavar="FILE",
        default_text="from the checkpoint, else those of the autoencoder",
    )
    num: int | None = option(
        None,
        "Number of images; write --num-samples under torchrun, which reads --num as its own --numa-binding",
        Whole(1),
        group="samples",
        metavar="N",
        aliases=("--num-samples", "--num-fid-samples"),
        default_text=f"{PER_CLASS} per class",
    )
    classes: tuple[str, ...] = option(
        (),
        "Class numbers or names, used in turn; all; or random, as for FID",
        Several(TEXT),
        group="samples",
        metavar="CLASS",
        default_text=f"all, or {SHOWN_CLASSES} evenly spaced ones of more than {ALL_CLASSES}; with --npz random",
    )
    prompt: tuple[str, ...] = option(
        (),
        "Captions, used in turn, for a model that was trained on captions",
        Several(TEXT),
        group="samples",
        metavar="TEXT",
        default_text="with --npz random captions of the training",
    )
    text_encoder: str | None = option(
        None,
        "Encoder of the captions, as in dit-fast encode --text-encoder",
        SOURCE,
        group="samples",
        metavar="NAME",
        default_text="that of the training",
    )
    seed: int = option(
        0, "Seed of noise and random labels", SEED, group="samples", aliases=("--global-seed",)
    )
    steps: str | None = option(
        None,
        "Sampling steps; for diffusion also a respacing such as ddim50 or 10,20,30",
        RESPACING,
        group="solver",
        default_text="250, or all if fewer",
        aliases=("--num-sampling-steps",),
    )
    solver: Solver | None = same_option(
        SamplerConfig,
        "solver",
        group="solver",
        default=None,
        default_text="ddpm for diffusion, euler for flow matching",
    )
    shift: float = option(
        1.0,
        "Above 1, more of the steps of flow matching are near noise; the inverse of LightningDiT's timestep_shift",
        SHIFT,
        group="solver",
    )
    atol: float | None = same_option(SamplerConfig, "atol", group="solver")
    rtol: float | None = same_option(SamplerConfig, "rtol", group="solver")
    last_step: LastStep = same_option(SamplerConfig, "last_step", group="solver")
    last_step_size: float | None = option(
        None,
        "Length in t of the last step of the sde solvers",
        Number(0, 1, above=True, below=True),
        group="solver",
        default_text="0.04",
    )
    sde_method: SdeMethod = same_option(SamplerConfig, "sde_method", group="solver")
    diffusion_norm: float = same_option(SamplerConfig, "diffusion_norm", group="solver")
    sample_eps: float | None = option(
        None,
        "Distance in t from the ends where SiT's equations are singular, for the sde solvers and those in t",
        Number(0, 0.5, below=True),
        group="solver",
        default_text="0.001 where needed",
    )
    reverse: Path | None = option(
        None,
        "Encode images to noise, with a solver in t: the .npy file of M images or latents (M, C, H, W) that the model "
        "makes; writes their noise to OUT/latents.npy",
        PATH,
        group="solver",
        metavar="NPY",
    )
    eta: float = same_option(SamplerConfig, "eta", group="solver")
    mode: Literal["fast", "reference"] | None = same_option(
        SamplerConfig,
        "mode",
        group="solver",
        default=None,
        default_text="reference; fast with --npz or several ranks",
    )
    clip_denoised: bool | None = same_option(
        SamplerConfig,
        "clip",
        group="solver",
        default=None,
        default_text="on for images with solvers that predict them, off for latents",
    )
    cfg_scale: float | None = same_option(
        Guidance,
        "scale",
        group="guidance",
        default=None,
        default_text=f"{DEFAULT_SCALE:g}, or 1 for a model without a null class",
    )
    cfg_channels: str | None = option(
        None,
        "Number of channels that are guided, or all",
        Pattern(r"all|[1-9]\d{0,5}", "a positive number, or all"),
        group="guidance",
        default_text="3 for 4-channel weights of the reference, else all",
    )
    cfg_interval: tuple[float, float] = same_option(Guidance, "interval", group="guidance")
    cfg_schedule: GuidanceSchedule = same_option(Guidance, "schedule", group="guidance")
    batch_size: int = option(
        64, "Images per batch", BATCH_SIZE, group="machine", aliases=("--per-proc-batch-size",)
    )
    device: str = option(
        "auto",
        "Device to sample on: cpu, cuda, or one of several as in cuda:1",
        Pattern(r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:NUMBER"),
        group="machine",
        default_text="cuda if there is one",
    )
    precision: SamplePrecision = same_option(SamplerConfig, "precision", group="machine", default="fp32")
    tf32: bool = option(True, "Use TF32 for matrix products in float32 on CUDA", group="machine")
    compile: bool = same_option(SamplerConfig, "compile", group="machine")
    graph: Literal["auto", "never"] = same_option(
        SamplerConfig, "graph", group="machine", constants={"--no-graph": "never"}
    )
    out: Path = option(
        Path("samples"),
        "Folder for sample.png and other results; the same command continues one that was killed",
        PATH,
        group="output",
        aliases=("--sample-dir",),
    )
    columns: int = option(
        10, "Maximum number of images per class in the grid", Whole(1, 1 << 12), group="output"
    )
    save_images: bool = option(False, "Also write each image to OUT/images", group="output")
    npz: bool = option(False, "Also write OUT/samples.npz, the input of ADM's evaluator", group="output")
    gif: bool = option(
        False, "Also write OUT/trajectory.gif, the first images on their way from noise", group="output"
    )
    compare_to: str | None = option(
        None,
        "Score the samples against the real images DATA; without DATA, those of the training",
        SOURCE,
        group="output",
        metavar="DATA",
        bare=OWN_DATA,
    )
