"""What a training run is made of: `TrainConfig`, and how a resumed run is compared with it."""

import dataclasses
import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dit_fast.data import Conversion, ImageSet, LatentSet, open_data, parse_buckets, relocate
from dit_fast.diffusion.beta_schedules import DIFFUSION_STEPS, NOISE_SCHEDULES
from dit_fast.distributed.sharding import PARALLEL
from dit_fast.encoders.autoencoder import LatentEncoder
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.evaluation import FEATURES
from dit_fast.kernels import BACKENDS, EPILOGUES, KERNEL_MODES
from dit_fast.model.backends import RECOMPUTE
from dit_fast.model.config import OPTIONS, SIZES
from dit_fast.model.dit import DiT
from dit_fast.model.presets import SIZES as MODEL_SIZES
from dit_fast.model.presets import DiT_models
from dit_fast.training.objective import OBJECTIVE_CHOICES, ObjectiveConfig
from dit_fast.training.optimizer import OPTIMIZERS, SCHEDULES
from dit_fast.training.precision import PRECISIONS, RESIDUALS
from dit_fast.utils.values import (
    FLAG,
    SEED,
    SIDE,
    SOURCE,
    TEXT,
    Number,
    OneOf,
    Value,
    Whole,
    check_fields,
    check_memory,
    flag_of,
)

MOST_COMPILED = 8
"""Shapes that torch.compile specialises a function for before it gives up."""

DEVICES = ("auto", "cpu", "cuda")
CHOICES = {
    **OBJECTIVE_CHOICES,
    "precision": PRECISIONS,
    "residual": RESIDUALS,
    **OPTIONS,
    "recompute": RECOMPUTE,
    "attention": BACKENDS,
    "mlp_epilogue": EPILOGUES,
    "kernels": KERNEL_MODES,
    "evaluate_features": FEATURES,
    "optimizer": OPTIMIZERS,
    "lr_schedule": SCHEDULES,
    "device": DEVICES,
    "parallel": PARALLEL,
}
"""The values that a field may have, where they are a list."""

_FRACTION = Number(0, 1, below=True)
_RATE = Number(0, 1e6, above=True)
_STEPS = Whole(1)
_THREADS = Whole(1, 1 << 10)
RANGES: dict[str, Value] = {
    **{field: OneOf(values) for field, values in CHOICES.items()},
    **dict.fromkeys(
        (
            "learned_range",
            "sigma_small",
            "use_kl",
            "direction_loss",
            "learn_sigma",
            "qk_norm",
            "flip",
            "compile",
        )
        + ("cuda_graph", "async_checkpoint", "stop_on_save_failure", "tensorboard", "wandb", "nvtx"),
        FLAG,
    ),
    **dict.fromkeys(
        (
            "steps",
            "epochs",
            "ema_snapshot_every",
            "log_every",
            "ckpt_every",
            "sample_every",
            "evaluate_every",
        ),
        _STEPS,
    ),
    **dict.fromkeys(("warmup_steps", "skip_nonfinite", "skip_unreadable", "milestone_every"), Whole(0)),
    **dict.fromkeys(("beta1", "beta2", "ema_decay", "class_dropout_prob", "holdout"), _FRACTION),
    "data": SOURCE,
    "vae": SOURCE,
    "evaluate_against": SOURCE,
    "evaluate_weights": SOURCE,
    "model": TEXT,
    "noise_schedule": OneOf(NOISE_SCHEDULES),
    "diffusion_steps": DIFFUSION_STEPS,
    "min_snr_gamma": Number(0, 1e6, above=True),
    **{
        field: SIZES[field]
        for field in ("hidden_size", "num_heads", "patch_size", "mlp_ratio", "num_classes")
    },
    "depth": Whole(1, 1 << 12),
    "image_size": SIDE,
    "buckets": TEXT,
    "background": TEXT,
    "raw_pixels": FLAG,
    "channels": Whole(1, 1 << 12),
    "batch_size": Whole(1, 1 << 24),
    "accumulate": Whole(1, 1 << 24),
    "lr": _RATE,
    "weight_decay": Number(0, 1e6),
    "max_grad_norm": Number(0, above=True),
    "timeout": Number(0, 1e7, above=True),
    "seed": SEED,
    "threads": _THREADS,
    "num_workers": Whole(0, 1 << 12),
    "keep_checkpoints": Whole(2, besides=(0,)),
    "sample_steps": Whole(1, 1 << 20),
    "evaluate_samples": Whole(2, 10**7),
}
"""The value of each field, for the command line and for `TrainConfig`. The largest sizes are what nobody means to
exceed: a mistyped or hostile one is refused before memory is asked for it.
"""


@dataclass(frozen=True)
class TrainConfig(ObjectiveConfig):
    """Options of a run, besides those of `ObjectiveConfig`. `model` names a size of the paper; the fields up to
    `mlp_ratio` replace parts of it.

    data                 a built-in set, a folder of class sub-folders, or latents
    vae                  "ema", "mse" or the folder of an autoencoder that makes latents of images as they are read
    image_size, channels, flip, holdout   see `dit_fast.data.open_images`; None: as the data are
    num_classes          checked against the data; 0 for a model that is told no class, of any folder of images
    background, raw_pixels   how image files become pixels (`dit_fast.data.Conversion`)
    skip_unreadable      files that may turn out to be unreadable; each is replaced (`dit_fast.data.unreadable`)
    buckets              "256x256,192x320": the shapes (height x width) of images of many aspect ratios, instead of
                         image_size; each has the nearest, a batch is of one, the first is the model's own
    steps, epochs        length of the run in optimiser steps, or in passes over the training images
    lr, beta1, beta2, weight_decay, ema_decay   AdamW, and the decay of the averaged weights
    ema_snapshot_every   steps between snapshots of two more averages, of which one of any width is made afterwards
                         (`dit_fast.checkpoint.power_ema`); None: neither is kept
    lr_schedule, warmup_steps   "constant" or "cosine" (to 0 at the last step), after a linear warm-up
    max_grad_norm        the gradients' norm is clipped to it; None: not at all
    optimizer            "ours" (AdamW, clipping and averaging in one pass), "torch" (fused AdamW) or "apex"
    accumulate           micro-batches that a batch is cut into, to take less memory; the draws stay the same
    class_dropout_prob   share of labels replaced by the null class, for classifier-free guidance
    precision            "auto" (bf16 where CUDA has it, else fp32), "bf16", "fp16" (both autocast; weights stay
                         float32), "fp32", "tf32" (CUDA matrix products) or "fp8" (torchao's float8 linears)
    residual             "fp32" or "bf16": dtype of the residual stream
    conditioning, positions, norm, mlp, qk_norm, recompute, attention, mlp_epilogue, kernels   as in `DiT`
    compile              torch.compile for each block
    parallel             how ranks share the model: "none", "ddp", "fsdp", "hsdp" (`dit_fast.distributed.sharding`) or
                         "auto": none for one, fsdp for several
    timeout              seconds that ranks wait for one that hangs, once the first step is made
    cuda_graph           the whole step as one CUDA graph, for each of buckets its own
    skip_nonfinite       steps that may be left out for a loss or gradient that is not finite; 0: the first ends the
                         run
    sample_every, sample_steps   steps between grids of samples of the averaged weights (None: none), and the noise
                         levels of their sampling
    evaluate_every, evaluate_samples   steps between Frechet distances of so many unguided samples of the averaged
                         weights, by sample_steps levels, of the same labels and noise each time (None: none)
    evaluate_against, evaluate_features, evaluate_weights   what they are compared with (None: the images in `data`), by
                         which features, and the weight file of "inception": as `dit-fast evaluate` takes them
    tensorboard, wandb   also log there
    nvtx                 NVTX ranges around the parts of a step
    keep_checkpoints     newest checkpoints to keep, at least 2; 0 keeps all
    milestone_every      also keep the checkpoints of steps that it divides; 0: none
    async_checkpoint     write checkpoints beside the training, from a copy of the state
    stop_on_save_failure a checkpoint that cannot be written ends the run; else the run goes on to the next one
    num_workers          threads that decode image files; None: one a core
    threads              PyTorch's CPU threads; None leaves them alone

    Raises ConfigError for a value that cannot work.
    """

    data: str
    model: str = "DiT-S/2"
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    mlp_ratio: float | None = None
    conditioning: str = "adaln_zero"
    positions: str = "sincos"
    norm: str = "layernorm"
    mlp: str = "gelu"
    qk_norm: bool = False
    vae: str | None = None
    image_size: int | None = None
    buckets: str | None = None
    channels: int | None = None
    num_classes: int | None = None
    flip: bool | None = None
    holdout: float | None = None
    background: str = "white"
    raw_pixels: bool = False
    skip_unreadable: int = 0
    batch_size: int = 256
    steps: int | None = None
    epochs: int | None = None
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    ema_decay: float = 0.9999
    ema_snapshot_every: int | None = None
    optimizer: str = "ours"
    accumulate: int = 1
    class_dropout_prob: float = 0.1
    seed: int = 0
    precision: str = "auto"
    residual: str = "fp32"
    recompute: str = "cheap"
    attention: str = "auto"
    mlp_epilogue: str = "auto"
    kernels: str = "auto"
    compile: bool = False
    parallel: str = "auto"
    timeout: float = 600.0
    cuda_graph: bool = False
    skip_nonfinite: int = 0
    device: str = "auto"
    threads: int | None = None
    num_workers: int | None = None
    log_every: int = 100
    ckpt_every: int = 5000
    keep_checkpoints: int = 2
    milestone_every: int = 0
    async_checkpoint: bool = True
    stop_on_save_failure: bool = False
    sample_every: int | None = None
    sample_steps: int = 50
    evaluate_every: int | None = None
    evaluate_samples: int = 1000
    evaluate_against: str | None = None
    evaluate_features: str = "inception"
    evaluate_weights: str | None = None
    tensorboard: bool = False
    wandb: bool = False
    nvtx: bool = False

    def __post_init__(self) -> None:
        check_fields(self, RANGES, flag_of)
        self.choose_defaults()
        if self.residual == "bf16" and self.precision in ("fp16", "fp32", "tf32"):
            raise ConfigError(f"--residual bf16 goes with --precision bf16 or fp8, not {self.precision}")
        if self.evaluate_every and (self.evaluate_features == "inception") != bool(self.evaluate_weights):
            raise ConfigError(
                f"--evaluate-features {self.evaluate_features} with --evaluate-weights {self.evaluate_weights}: "
                "inception, and it alone, needs torch-fidelity's weights-inception-2015-12-05-6726825d.pth there (the "
                "others are proxies)"
            )
        self.conversion()
        sizes = self.bucket_sizes()
        if self.evaluate_every and self.evaluate_features == "classifier" and sizes:
            raise ConfigError(
                "--evaluate-features classifier knows images of one size, --buckets are several: give another"
            )
        if self.compile and len(sizes) > MOST_COMPILED:
            raise ConfigError(
                f"--compile: {len(sizes)} --buckets, and each is compiled for itself: give up to {MOST_COMPILED}"
            )
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"--batch-size {self.batch_size} does not divide into --accumulate {self.accumulate}"
            )
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"--steps {self.steps} and --epochs {self.epochs} both set the length: give one"
            )
        if self.num_classes == 0 and self.class_dropout_prob not in (0, TrainConfig.class_dropout_prob):
            raise ConfigError(
                f"--class-dropout-prob {self.class_dropout_prob}: with --num-classes 0 there is no label to drop; "
                "leave it out"
            )
        self.check_objective()
        if self.model not in DiT_models:
            near = difflib.get_close_matches(
                self.model.upper(), [name.upper() for name in DiT_models], 3, 0.5
            )
            names = [name for name in DiT_models if name.upper() in near] or list(DiT_models)
            raise ConfigError(f"--model {self.model} is unknown; nearest: {', '.join(names)}")

    def bucket_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of `buckets`; none where images are squares of one size."""
        return parse_buckets(self.buckets) if self.buckets is not None else ()

    def conversion(self) -> Conversion:
        """How image files become pixels."""
        return Conversion(self.background, self.raw_pixels)

    def total_steps(self, num_train: int) -> int:
        """Optimiser steps of the whole run over `num_train` images; 400,000 (the paper's) unless set."""
        if self.epochs is not None:
            return math.ceil(self.epochs * num_train / self.batch_size)
        return 400_000 if self.steps is None else self.steps


# What may differ between a run and its continuation. Data may have moved: their fingerprint is compared.
CHANGEABLE = frozenset(
    ("data", "steps", "epochs", "compile", "device", "threads", "num_workers", "optimizer", "accumulate")
    + ("recompute", "attention", "mlp_epilogue", "kernels", "cuda_graph", "skip_nonfinite", "parallel")
    + ("skip_unreadable",)
    + ("timeout", "log_every", "ckpt_every", "keep_checkpoints", "milestone_every", "async_checkpoint")
    + ("stop_on_save_failure", "sample_every", "sample_steps", "tensorboard", "wandb", "nvtx")
    + ("evaluate_every", "evaluate_samples", "evaluate_against", "evaluate_features", "evaluate_weights")
)


_PATHS = ("data", "vae", "evaluate_against", "evaluate_weights")
"""Options that may be names of files, or built-in ones."""


def resumed_config(saved: dict[str, Any], asked: dict[str, Any], source: str) -> TrainConfig:
    """The configuration `saved` in a manifest with the options `asked` for anew.

    Raises CheckpointError that lists every option that a continuation may not change, with both values.
    """
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    if "predict_xstart" in saved:  # what runs had before `prediction`
        saved = {"prediction": "x0" if saved["predict_xstart"] else "epsilon", **saved}
        del saved["predict_xstart"]
    if unknown := sorted(saved.keys() - fields.keys()):
        raise CheckpointError(f"{source} has options that this version does not know: {', '.join(unknown)}")
    # Before there was a choice, transparency and orientation were ignored.
    saved = {"raw_pixels": True, **saved}
    # An option that is younger than the run was then what is now its default.
    younger = {name: value for name, value in fields.items() if value is not dataclasses.MISSING}
    saved = {**younger, **saved}
    # Half a cosine ends with the run, so that its length is part of the recipe.
    length = ("steps", "epochs") if saved.get("lr_schedule") == "cosine" else ()
    changed = [
        f"--{name.replace('_', '-')} is {saved.get(name)} there and {value} here"
        for name, value in asked.items()
        if (name not in CHANGEABLE or name in length) and saved.get(name) != value
    ]
    if changed:
        raise CheckpointError(
            f"{source} was trained otherwise: {'; '.join(changed)}; start anew with another --out"
        )
    if "steps" in asked or "epochs" in asked:
        saved = {**saved, "steps": None, "epochs": None}
    try:
        TrainConfig(**saved)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{source} has options that cannot be: {error}") from None
    return TrainConfig(**{**saved, **asked})


def relocated(
    config: TrainConfig, asked: Collection[str], manifest: dict[str, Any], run: Path
) -> TrainConfig:
    """`config` of a run that continues, with its paths where they are now.

    One that was not `asked` for anew is looked for with `dit_fast.data.relocate`.
    """
    begun = manifest.get("working_directory")
    given = {name: getattr(config, name) for name in _PATHS if name not in asked}
    found = {name: relocate(source, begun, run) for name, source in given.items() if source is not None}
    return dataclasses.replace(config, **found)


def open_set(config: TrainConfig) -> ImageSet | LatentSet:
    """The data of `config`. Raises the errors of `open_data` and `LatentEncoder`."""
    encoder = None
    if config.vae is not None:
        on_gpu = torch.cuda.is_available() and config.device != "cpu"
        dtype = torch.bfloat16 if config.precision in ("auto", "bf16") and on_gpu else torch.float32
        encoder = LatentEncoder(config.vae, "cuda" if on_gpu else "cpu", dtype)
    return open_data(
        config.data,
        config.image_size,
        channels=config.channels,
        num_classes=config.num_classes,
        flip=config.flip,
        holdout=config.holdout,
        num_workers=config.num_workers,
        encoder=encoder,
        buckets=config.bucket_sizes(),
        conversion=config.conversion(),
        skip_unreadable=config.skip_unreadable,
    )


def apply_to_process(config: TrainConfig) -> None:
    """Set what PyTorch has once for a process: CPU threads and TF32."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.precision == "tf32":
        torch.set_float32_matmul_precision("high")


class Samples(Protocol):
    """What a model must know of what it is trained on: side, or shapes where there are several, channels, classes
    or the width of captions.
    """

    @property
    def image_size(self) -> int: ...
    @property
    def buckets(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def channels(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def caption_dim(self) -> int: ...


def build_model(config: TrainConfig, data: Samples) -> DiT:
    """The model of `config` for images of `data`. Raises ConfigError for sizes that do not fit."""
    overrides = {
        name: value
        for name in ("hidden_size", "depth", "num_heads", "patch_size", "mlp_ratio")
        if (value := getattr(config, name)) is not None
    }
    patch_size = config.patch_size or int(config.model.rpartition("/")[2])
    for size in data.buckets:
        if any(side % patch_size for side in size):
            fit = (patch_size * max(1, round(side / patch_size)) for side in size)
            raise ConfigError(
                f"--buckets: {'x'.join(map(str, size))} is not a multiple of the patch size {patch_size}; "
                f"the nearest is {'x'.join(map(str, fit))}"
            )
    if data.image_size % patch_size:
        fitting = [size for size in range(2, 33) if data.image_size % size == 0]
        near = patch_size * max(1, round(data.image_size / patch_size))
        raise ConfigError(
            f"image size {data.image_size} is not a multiple of the patch size {patch_size}; "
            f"give --image-size {near}"
            + (f" or one of --patch-size {', '.join(map(str, fitting))}" if fitting else "")
        )
    # A lower bound: a block's attention and MLP, and the positions; weights, averages and two moments of float32.
    named = MODEL_SIZES[config.model.removeprefix("DiT-").partition("/")[0]]
    width, depth = config.hidden_size or named["hidden_size"], config.depth or named["depth"]
    per_block = (4 + 2 * (config.mlp_ratio or 4.0)) * width**2
    tokens = (data.image_size // patch_size) ** 2
    if not torch.empty(0).is_meta:
        check_memory(16 * depth * per_block + 4 * tokens * width, f"a model of width {width}, depth {depth}")
    return DiT_models[config.model](
        input_size=data.buckets[0] if data.buckets else data.image_size,
        in_channels=data.channels,
        num_classes=0 if config.num_classes == 0 else data.num_classes,
        caption_dim=0 if config.num_classes == 0 else data.caption_dim,
        class_dropout_prob=config.class_dropout_prob,
        learn_sigma=bool(config.learn_sigma),
        **{name: getattr(config, name) for name in OPTIONS},
        kernels=config.kernels,
        attention=config.attention,
        mlp_epilogue=config.mlp_epilogue,
        recompute=config.recompute,
        **overrides,
    )
