"""Configuration of a training run, and its comparison with the saved one when the run is resumed."""

import dataclasses
import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dit_fast.data import Conversion, ImageSet, LatentSet, open_data, parse_buckets, relocate
from dit_fast.data.encode import EncodeConfig
from dit_fast.distributed.sharding import Parallel
from dit_fast.distributed.world import DeviceName
from dit_fast.encoders.autoencoder import LatentEncoder
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.evaluation.features import FeatureName
from dit_fast.kernels import Activation, AttentionBackend, KernelMode, MlpEpilogue, Norm
from dit_fast.model.backends import Recompute
from dit_fast.model.blocks import Conditioning
from dit_fast.model.config import OPTIONS, SIZES
from dit_fast.model.dit import DiT
from dit_fast.model.positions import Positions
from dit_fast.model.presets import SIZES as MODEL_SIZES
from dit_fast.model.presets import DiT_models
from dit_fast.training.objective import ObjectiveConfig
from dit_fast.training.optimizer import OPTIMIZERS, LrSchedule, OptimizerName
from dit_fast.training.precision import ResidualDtype, TrainPrecision
from dit_fast.utils.options import (
    REQUIRED,
    check_options,
    described,
    documented,
    flag_of,
    option,
    options_of,
    same_option,
)
from dit_fast.utils.values import SEED, SIDE, SOURCE, TEXT, Number, OneOf, Several, Whole, check_memory

DEFAULT_STEPS = 400_000
"""Length of a run: that of the paper."""
MAX_COMPILED_SHAPES = 8
"""Shapes for which torch.compile specializes a function before it gives up (its recompile limit)."""

BY_NAME = "names"
"""Value of --keep-classes without a file: classes with the same name are kept."""

_FRACTION = Number(0, 1, below=True)
_STEPS = Whole(1)
_COUNT = Whole(0)


@documented
@dataclass(frozen=True)
class TrainConfig(ObjectiveConfig):
    """Configuration of a training run. The field `batch_size` is the option `--batch-size` of `dit-fast train`.

    Raises:
        ConfigError: an option is out of range, or two options exclude each other.
    """

    data: str = option(
        REQUIRED,
        "Data set: mnist, digits, a folder of class sub-folders, or latents written by dit-fast encode",
        SOURCE,
        group="run",
        metavar="SOURCE",
        aliases=("--data-path",),
        changeable=True,
    )
    model: str = option(
        "DiT-S/2", "Size and patch size of the model, e.g. DiT-XL/2", TEXT, group="model", metavar="NAME"
    )
    hidden_size: int | None = option(
        None, "Width", SIZES["hidden_size"], group="model", metavar="D", default_text="from --model"
    )
    depth: int | None = option(
        None, "Number of blocks", Whole(1, 1 << 12), group="model", metavar="N", default_text="from --model"
    )
    num_heads: int | None = option(
        None, "Attention heads", SIZES["num_heads"], group="model", metavar="N", default_text="from --model"
    )
    patch_size: int | None = option(
        None, "Side of a patch", SIZES["patch_size"], group="model", metavar="P", default_text="from --model"
    )
    mlp_ratio: float | None = option(
        None,
        "Hidden width of the MLP divided by the width",
        SIZES["mlp_ratio"],
        group="model",
        metavar="R",
        default_text="4",
    )
    conditioning: Conditioning = option(
        "adaln_zero", "How blocks are conditioned on timestep and class", group="model"
    )
    positions: Positions = option(
        "sincos",
        "Position encoding: fixed sines, a learned table, rotary, or fixed sines and rotary",
        group="model",
    )
    norm: Norm = option("layernorm", "Normalization layer", group="model")
    mlp: Activation = option("gelu", "Activation of the MLP", group="model")
    qk_norm: bool = option(False, "Apply RMSNorm to the queries and keys of each head", group="model")
    num_classes: int | None = option(
        None,
        "Number of classes, compared with the data; 0 trains an unconditional model on a folder without sub-folders",
        SIZES["num_classes"],
        group="model",
        metavar="N",
        default_text="from the data",
    )
    vae: str | None = option(
        None,
        "Encode images to latents as they are read: ema, mse, or a folder with a diffusers AutoencoderKL",
        SOURCE,
        group="data",
        metavar="NAME",
    )
    image_size: int | None = option(
        None,
        "Scale and center-crop images to S x S",
        SIDE,
        group="data",
        metavar="S",
        default_text="size of the images, which must be equal",
    )
    buckets: str | None = option(
        None,
        "Train on several aspect ratios, HEIGHTxWIDTH,...: each image goes to the nearest shape, each batch has one",
        TEXT,
        group="data",
        metavar="SIZES",
    )
    channels: int | None = option(
        None,
        "Channels of the images: 1 for grayscale, 3 for RGB",
        Whole(1, 1 << 12),
        group="data",
        metavar="C",
        default_text="from the data",
    )
    flip: bool | None = option(
        None, "Mirror half of the images", group="data", default_text="on for folders, off for digits"
    )
    holdout: float | None = option(
        None,
        "Fraction of each class that is held out of training",
        _FRACTION,
        group="data",
        metavar="F",
        default_text="from the data",
    )
    background: str = same_option(EncodeConfig, "background")
    raw_pixels: bool = same_option(EncodeConfig, "raw_pixels")
    skip_unreadable: int = option(
        0,
        "Number of unreadable files to replace by other images; the next one ends the run after a checkpoint",
        _COUNT,
        group="data",
        metavar="N",
        changeable=True,
    )
    num_workers: int | None = option(
        None,
        "Threads that decode images",
        Whole(0, 1 << 12),
        group="data",
        metavar="N",
        default_text="one per CPU core",
        changeable=True,
    )
    steps: int | None = option(
        None,
        "Optimizer steps of the run",
        _STEPS,
        group="recipe",
        metavar="N",
        default_text=str(DEFAULT_STEPS),
        changeable=True,
    )
    epochs: int | None = option(
        None,
        "Length of the run in passes over the images, instead of --steps",
        _STEPS,
        group="recipe",
        metavar="N",
        changeable=True,
    )
    batch_size: int = option(
        256,
        "Images per step, on all ranks together",
        Whole(1, 1 << 24),
        group="recipe",
        metavar="B",
        aliases=("--global-batch-size",),
    )
    lr: float = option(1e-4, "Learning rate of AdamW", Number(0, 1e6, above=True), group="recipe")
    lr_schedule: LrSchedule = option(
        "constant", "Learning rate after the warmup: constant, or a half cosine to 0", group="recipe"
    )
    warmup_steps: int = option(0, "Steps of linear warmup", _COUNT, group="recipe", metavar="N")
    beta1: float = option(0.9, "First beta of AdamW", _FRACTION, group="recipe")
    beta2: float = option(0.999, "Second beta of AdamW", _FRACTION, group="recipe")
    weight_decay: float = option(0.0, "Weight decay of AdamW", Number(0, 1e6), group="recipe")
    max_grad_norm: float | None = option(
        None,
        "Clip the norm of the gradients to N",
        Number(0, above=True),
        group="recipe",
        metavar="N",
        default_text="no clipping",
    )
    skip_nonfinite: int = option(
        0,
        "Number of steps to skip because of a loss or gradient that is not finite; the next one ends the run",
        _COUNT,
        group="recipe",
        metavar="N",
        changeable=True,
    )
    ema_decay: float = option(
        0.9999, "Decay of the exponential moving average (EMA) of the weights", _FRACTION, group="recipe"
    )
    ema_snapshot_every: int | None = option(
        None,
        "Steps between snapshots of two more averages, from which --weights ema:WIDTH reconstructs one of any width",
        _STEPS,
        group="recipe",
        metavar="N",
        default_text="no snapshots",
    )
    class_dropout_prob: float = option(
        0.1,
        "Fraction of labels that are replaced by the null class, for classifier-free guidance",
        _FRACTION,
        group="recipe",
        metavar="P",
    )
    seed: int = option(
        0, "Seed of initial weights and of all random draws", SEED, group="recipe", aliases=("--global-seed",)
    )
    init_from: str | None = option(
        None,
        "Start from the weights of a checkpoint: a run, a .pt or .safetensors file, a folder of diffusers, "
        "organization/name on the hub, or a published name",
        SOURCE,
        group="start",
        metavar="CKPT",
        default_text="drawn with --seed",
    )
    init_weights: str = option(
        "ema",
        "Weights of --init-from: ema, model, or ema:WIDTH of a run with --ema-snapshot-every",
        TEXT,
        group="start",
        metavar="SET",
    )
    init_optimizer: bool = option(
        False,
        "Continue a dictionary of DiT's or SiT's train.py given to --init-from: also its raw and averaged weights, "
        "optimizer state and step",
        group="start",
    )
    keep_classes: str | None = option(
        None,
        "Keep rows of the label table of classes with the same name; names, or a JSON file of renamed classes",
        SOURCE,
        group="start",
        metavar="FILE",
        default_text="all rows for the same classes, else none",
        bare=BY_NAME,
    )
    freeze: tuple[str, ...] = option(
        (),
        "Parameters that are not trained: patterns of their names or of modules, as in 'blocks.[0-5]'",
        Several(TEXT),
        group="start",
        metavar="PATTERN",
        default_text="none",
    )
    lora: int | None = option(
        None,
        "Train adapters (LoRA) of this rank on the frozen weights of --init-from; needs peft",
        Whole(1, 1 << 12),
        group="start",
        metavar="RANK",
        default_text="train the weights themselves",
    )
    lora_alpha: float | None = option(
        None,
        "Factor of the adapters times the rank",
        Number(0, 1e6, above=True),
        group="start",
        metavar="A",
        default_text="the rank: a factor of 1",
    )
    lora_targets: tuple[str, ...] = option(
        (),
        "Layers that --lora adapts: patterns of their names or of modules, as in 'blocks.*.attn'",
        Several(TEXT),
        group="start",
        metavar="PATTERN",
        default_text="attention and MLP of all blocks",
    )
    lora_train: tuple[str, ...] = option(
        (),
        "Modules that --lora trains whole beside the adapters (modules_to_save of peft), as in final_layer.linear",
        Several(TEXT),
        group="start",
        metavar="MODULE",
        default_text="those that the checkpoint of --init-from does not have, such as new classes",
    )
    lora_dora: bool = option(
        False, "Also train the norm of each row of the adapted layers (DoRA)", group="start"
    )
    device: DeviceName = option("auto", "Device to train on", group="machine", changeable=True)
    precision: TrainPrecision = option(
        "auto",
        "Arithmetic of the model; weights stay float32",
        group="machine",
        default_text="auto: bf16 where CUDA supports it, else fp32",
    )
    residual: ResidualDtype = option(
        "fp32", "Dtype of the residual stream; bf16 needs --precision bf16 or fp8", group="machine"
    )
    accumulate: int = option(
        1,
        "Micro-batches per batch, which need less memory; random draws stay the same",
        Whole(1, 1 << 24),
        group="machine",
        metavar="K",
        changeable=True,
    )
    recompute: Recompute = option(
        "cheap",
        "Activations recomputed in the backward pass: none, norm outputs and activations of the MLP, or whole blocks",
        group="machine",
        changeable=True,
    )
    attention: AttentionBackend = option("auto", "Attention kernel", group="machine", changeable=True)
    mlp_epilogue: MlpEpilogue = option(
        "auto", "Kernel that applies the GELU of the MLP", group="machine", changeable=True
    )
    kernels: KernelMode = option(
        "auto",
        "Triton kernels or their PyTorch reference",
        group="machine",
        default_text="auto: Triton on CUDA, else the reference",
        changeable=True,
    )
    optimizer: OptimizerName = option(
        "adamw_ema",
        "AdamW and EMA: fused in one kernel, PyTorch's fused AdamW, or NVIDIA apex",
        OneOf(OPTIMIZERS, (("ours", "adamw_ema"),)),
        group="machine",
        changeable=True,
    )
    compile: bool = option(False, "Compile each block with torch.compile", group="machine", changeable=True)
    cuda_graph: bool = option(
        False,
        "Capture the whole step as one CUDA graph, one per shape of --buckets",
        group="machine",
        changeable=True,
    )
    parallel: Parallel = option(
        "auto",
        "How the ranks of torchrun divide the model",
        group="machine",
        default_text="auto: fsdp for several ranks, else none",
        changeable=True,
    )
    timeout: float = option(
        600.0,
        "Seconds that ranks wait for a rank that hangs, after the first step",
        Number(0, 1e7, above=True),
        group="machine",
        metavar="S",
        changeable=True,
    )
    threads: int | None = option(
        None,
        "CPU threads of PyTorch",
        Whole(1, 1 << 10),
        group="machine",
        metavar="N",
        default_text="PyTorch's",
        changeable=True,
    )
    ckpt_every: int = option(
        5000, "Steps between checkpoints", _STEPS, group="checkpoints", metavar="N", changeable=True
    )
    keep_checkpoints: int = option(
        2,
        "Newest checkpoints to keep, 0 for all",
        Whole(2, besides=(0,)),
        group="checkpoints",
        metavar="N",
        changeable=True,
    )
    milestone_every: int = option(
        0,
        "Also keep the checkpoints of steps that are multiples of N; 0 keeps none",
        _COUNT,
        group="checkpoints",
        metavar="N",
        changeable=True,
    )
    async_checkpoint: bool = option(
        True,
        "Write checkpoints in the background from a copy of the state",
        group="checkpoints",
        changeable=True,
    )
    stop_on_save_failure: bool = option(
        False,
        "End the run when a checkpoint cannot be written, instead of continuing to the next one",
        group="checkpoints",
        changeable=True,
    )
    log_every: int = option(
        100, "Steps between log lines", _STEPS, group="logging", metavar="N", changeable=True
    )
    sample_every: int | None = option(
        None,
        "Steps between grids of samples drawn with the averaged weights",
        _STEPS,
        group="logging",
        metavar="N",
        default_text="no samples",
        changeable=True,
    )
    sample_steps: int = option(
        50,
        "Sampling steps of --sample-every and --evaluate-every",
        Whole(1, 1 << 20),
        group="logging",
        metavar="N",
        changeable=True,
    )
    evaluate_every: int | None = option(
        None,
        "Steps between Frechet distances (FID) of unguided samples drawn with the averaged weights",
        _STEPS,
        group="logging",
        metavar="N",
        default_text="no evaluation",
        changeable=True,
    )
    evaluate_samples: int = option(
        1000,
        "Samples per evaluation, each time with the same labels and noise",
        Whole(2, 10**7),
        group="logging",
        metavar="K",
        changeable=True,
    )
    evaluate_against: str | None = option(
        None,
        "Real images, as in dit-fast evaluate --against: a folder, an .npz of images or of statistics",
        SOURCE,
        group="logging",
        metavar="REFERENCE",
        default_text="the training data",
        changeable=True,
    )
    evaluate_features: FeatureName = option(
        "inception",
        "Feature network of the evaluation; efficientnet and classifier are proxies",
        group="logging",
        changeable=True,
    )
    evaluate_weights: str | None = option(
        None,
        "Weight file of --evaluate-features inception",
        SOURCE,
        group="logging",
        metavar="PATH",
        changeable=True,
    )
    tensorboard: bool = option(False, "Also log to RUN/tensorboard", group="logging", changeable=True)
    wandb: bool = option(False, "Also log to Weights & Biases", group="logging", changeable=True)
    nvtx: bool = option(
        False, "Mark the parts of a step with NVTX ranges, for nsys and ncu", group="logging", changeable=True
    )

    def __post_init__(self) -> None:
        check_options(self)
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
                "--evaluate-features classifier needs images of one size, --buckets are several: give another"
            )
        if self.compile and len(sizes) > MAX_COMPILED_SHAPES:
            raise ConfigError(
                f"--compile: {len(sizes)} --buckets, and each is compiled for itself: give up to {MAX_COMPILED_SHAPES}"
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
        for name in ("init_weights", "init_optimizer", "keep_classes"):
            if self.init_from is None and getattr(self, name) != getattr(TrainConfig, name):
                raise ConfigError(f"{flag_of(name)} applies only to --init-from; remove it")
        if self.init_optimizer and self.ema_snapshot_every:
            raise ConfigError(
                "--ema-snapshot-every averages all steps, and --init-optimizer has none of those before; remove one"
            )
        self._check_lora()
        self.check_objective()
        if self.model not in DiT_models:
            near = difflib.get_close_matches(
                self.model.upper(), [name.upper() for name in DiT_models], 3, 0.5
            )
            names = [name for name in DiT_models if name.upper() in near] or list(DiT_models)
            raise ConfigError(f"--model {self.model} is unknown; nearest: {', '.join(names)}")

    def _check_lora(self) -> None:
        if self.lora is None:
            for name in ("lora_alpha", "lora_targets", "lora_train", "lora_dora"):
                if getattr(self, name) != getattr(TrainConfig, name):
                    raise ConfigError(f"{flag_of(name)} applies only to --lora RANK; remove it")
            return
        if self.init_from is None:
            raise ConfigError(f"--lora {self.lora} adapts the weights of a checkpoint: give --init-from CKPT")
        if self.init_optimizer:
            raise ConfigError(
                "--init-optimizer continues with all weights, and --lora freezes them; remove one"
            )
        if self.freeze:
            raise ConfigError(
                f"--freeze {' '.join(self.freeze)}: --lora freezes all weights already; choose layers with "
                "--lora-targets"
            )
        if self.precision == "fp8":
            raise ConfigError("--precision fp8 does not go with --lora; give bf16")

    def bucket_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of `buckets`; none where images are squares of one size."""
        return parse_buckets(self.buckets) if self.buckets is not None else ()

    def conversion(self) -> Conversion:
        """How image files become pixels."""
        return Conversion(self.background, self.raw_pixels)

    def total_steps(self, num_train: int) -> int:
        """Optimizer steps of the whole run over `num_train` images."""
        if self.epochs is not None:
            return math.ceil(self.epochs * num_train / self.batch_size)
        return DEFAULT_STEPS if self.steps is None else self.steps


CHANGEABLE = frozenset(field.name for field in options_of(TrainConfig) if described(field).changeable)
"""Options that a resumed run may change. Data may have moved: their fingerprint is compared instead of their path."""
RECIPE = frozenset(
    ("lr", "lr_schedule", "warmup_steps", "beta1", "beta2", "weight_decay", "max_grad_norm", "ema_decay")
    + ("class_dropout_prob", "steps", "epochs")
)
"""Options of which later steps may have another value than earlier ones, which is logged."""

_PATHS = ("data", "vae", "evaluate_against", "evaluate_weights")
"""Options that may be names of files, or built-in ones."""


def resumed_config(
    saved: dict[str, Any], asked: dict[str, Any], source: str, step: int | None = None
) -> TrainConfig:
    """The configuration of a run that is resumed.

    Args:
        saved: Configuration in the manifest.
        asked: Options that were given again.
        source: The checkpoint, for messages.
        step: Finished steps, after which the recipe may change; None: it may not.

    Returns:
        `saved` with the options `asked`.

    Raises:
        CheckpointError: Lists every option that contradicts the steps so far, with both values.
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
    # JSON has lists where options are tuples.
    saved = {**younger, **{name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}}
    # Half a cosine ends with the run, so that its length is part of the recipe.
    length = {"steps", "epochs"} if saved.get("lr_schedule") == "cosine" else set()
    free = CHANGEABLE - length if step is None else CHANGEABLE | RECIPE
    changed = [
        f"{flag_of(name)} is {saved.get(name)} there and {value} here"
        for name, value in asked.items()
        if name not in free and saved.get(name) != value
    ]
    if changed:
        raise CheckpointError(
            f"{source} was trained otherwise: {'; '.join(changed)}; start anew with another --out"
        )
    if "steps" in asked or "epochs" in asked:
        saved = {**saved, "steps": None, "epochs": None}
    try:
        before = TrainConfig(**saved)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{source} has options that cannot be: {error}") from None
    config = TrainConfig(**{**saved, **asked})
    if step is not None:
        _check_changes(before, config, source, step)
    return config


def _check_changes(before: TrainConfig, config: TrainConfig, source: str, step: int) -> None:
    """Raise CheckpointError for a recipe that contradicts the first `step` steps."""
    if config.warmup_steps != before.warmup_steps and config.warmup_steps <= step:
        raise CheckpointError(
            f"--warmup-steps {config.warmup_steps}: {source} has {step} steps, its warmup is over; leave it out"
        )
    if bool(config.class_dropout_prob) != bool(before.class_dropout_prob):
        raise CheckpointError(
            f"--class-dropout-prob is {before.class_dropout_prob} there and {config.class_dropout_prob} here: {source} "
            f"has {'a' if before.class_dropout_prob else 'no'} null class; start another run with --init-from"
        )


def recipe_changes(saved: dict[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Options of the recipe that differ from the configuration `saved` in a manifest: (old, new) by name."""
    # The length changes nothing but the end, except for a cosine.
    recipe = RECIPE if config.lr_schedule == "cosine" else RECIPE - {"steps", "epochs"}
    return {
        name: (saved[name], value)
        for name in sorted(recipe & saved.keys())
        if (value := getattr(config, name)) != saved[name]
    }


def relocated(
    config: TrainConfig, asked: Collection[str], manifest: dict[str, Any], run: Path
) -> TrainConfig:
    """`config` of a run that continues, with its paths where they are now.

    One that was not `asked` for anew is looked for with `dit_fast.data.relocate`.
    """
    begun = manifest.get("working_directory")
    given = {name: getattr(config, name) for name in _PATHS if name not in asked}
    found: dict[str, Any] = {
        name: relocate(source, begun, run) for name, source in given.items() if source is not None
    }
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
