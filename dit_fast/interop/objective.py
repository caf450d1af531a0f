"""Training objective of a loaded model: from its checkpoint or pipeline, or from the caller."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_fast.diffusion import create_objective
from dit_fast.diffusion.paths import PATHS
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.utils.files import read_object
from dit_fast.utils.terminal import one_line

_SCHEDULES = ("linear", "squaredcos_cap_v2")
_PREDICTIONS = {"epsilon": False, "sample": True}
# All of these sample models with discrete timesteps of one forward process; they differ only in the solver.
_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in ("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "PNDM", "DPMSolverMultistep")
    + ("DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep")
    + ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")
    + ("LMSDiscrete", "SASolver")
)


@dataclass(frozen=True)
class PipelineFacts:
    """Metadata of a diffusers pipeline, where it has them.

    Attributes:
        class_names: Names of the classes in order.
        diffusion: Arguments of `create_diffusion`.
        vae: Folder of the autoencoder.
    """

    class_names: tuple[str, ...] | None = None
    diffusion: dict[str, Any] = field(default_factory=dict)
    vae: str | None = None


def pipeline_facts(folder: Path, num_classes: int) -> PipelineFacts:
    """Read the metadata of a diffusers pipeline.

    Args:
        folder: The folder; without a model_index.json the result is empty.
        num_classes: Number of classes of the model.

    Returns:
        The metadata.

    Raises:
        CheckpointError: The scheduler, its noise schedule or its prediction is not supported. Flow matching and EDM
            must not be mistaken for the noise prediction of DDPM.
    """
    if not (folder / "model_index.json").exists():
        return PipelineFacts()
    index = read_object(folder / "model_index.json", CheckpointError)
    names, scheduler = index.get("id2label"), folder / "scheduler" / "scheduler_config.json"
    _check_scheduler(index.get("scheduler"), folder / "model_index.json")
    vae = folder / "vae"
    # The decoder reads safetensors only.
    decodes = (vae / "config.json").is_file() and any(vae.glob("*.safetensors"))
    return PipelineFacts(
        _class_names(names, num_classes),
        _diffusion(read_object(scheduler, CheckpointError), scheduler) if scheduler.exists() else {},
        str(vae) if decodes else None,
    )


def _check_scheduler(entry: Any, path: Path) -> None:
    """Raise CheckpointError for an unsupported scheduler in an entry ["diffusers", class] of model_index.json."""
    if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
        _check_class(entry[1], path)


def _check_class(name: Any, path: Path) -> None:
    """Raise CheckpointError for a scheduler whose models do not have discrete timesteps."""
    if isinstance(name, str) and name in _SCHEDULERS:
        return
    kinds = {"Flow": "flow matching", "EDM": "EDM (Karras et al. 2022)", "LCM": "a consistency model"}
    kind = next((kind for part, kind in kinds.items() if part in str(name)), "another objective")
    raise CheckpointError(
        f"{path}: its scheduler is {str(name)[:80]!r}: the model was trained for {kind}; only pipelines with a noise "
        "schedule of DDPM (DDPMScheduler, DDIMScheduler, ...) are supported"
    )


def _class_names(names: Any, num_classes: int) -> tuple[str, ...] | None:
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(num_classes)}:
        return None
    return tuple(str(names[str(i)]) for i in range(num_classes))


def _diffusion(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of `create_diffusion` for the configuration of a scheduler; missing fields have diffusers' defaults."""
    steps = config.get("num_train_timesteps", 1000)
    schedule, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if "_class_name" in config:
        _check_class(config["_class_name"], path)
    problems = []
    if config.get("use_flow_sigmas"):
        problems.append("use_flow_sigmas (flow matching)")
    if type(steps) is not int or not 0 < steps <= 1_000_000:
        problems.append(f"num_train_timesteps {steps!r}")
    elif schedule == "linear":
        # Ho et al. 2020 use betas from 0.0001 to 0.02 for 1000 steps; n steps use 1000 / n times these.
        ends = [config.get(key, default) for key, default in (("beta_start", 1e-4), ("beta_end", 0.02))]
        wanted = [0.1 / steps, 20 / steps]
        if not all(
            isinstance(a, int | float) and 0 < a < 1 and abs(a - b) <= 1e-6 * b
            for a, b in zip(ends, wanted, strict=True)
        ):
            problems.append(f"betas {ends[0]!r} to {ends[1]!r} ({wanted[0]:g} to {wanted[1]:g} known)")
    if schedule not in _SCHEDULES or config.get("trained_betas") is not None:
        problems.append(f"beta_schedule {schedule!r} ({', '.join(_SCHEDULES)} known)")
    if not isinstance(prediction, str) or prediction not in _PREDICTIONS:
        problems.append(f"prediction_type {prediction!r} ({', '.join(_PREDICTIONS)} known)")
    if config.get("rescale_betas_zero_snr"):
        problems.append("rescale_betas_zero_snr")
    if problems:
        raise CheckpointError(
            f"{path}: unsupported noise schedule: {'; '.join(problems)[:300]}; give the "
            "transformer's folder, and --objective, to load the model alone"
        )
    return {"noise_schedule": schedule, "diffusion_steps": steps, "predict_xstart": _PREDICTIONS[prediction]}


OBJECTIVE_FIELDS = ("objective", "prediction", "path")
"""Arguments of `create_objective` that a caller of `load_model` may give."""


def transport_objective(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `create_objective` for options that train.py of SiT or LightningDiT saves; {} for other options."""
    path, prediction = (str(arguments.get(name)).lower() for name in ("path_type", "prediction"))
    if path not in PATHS:
        return {}
    return {
        "objective": "flow",
        "path": path,
        "prediction": {"noise": "epsilon"}.get(prediction, prediction),
    }


def merged_objective(
    given: str | Mapping[str, Any] | None, stored: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Merge the objective that a caller gives with the one that a checkpoint stores.

    Args:
        given: Name of the objective, or a mapping with keys from `OBJECTIVE_FIELDS`; None for none.
        stored: Arguments of `create_objective` in the checkpoint, possibly empty.
        source: The checkpoint, for messages.

    Returns:
        Arguments of `create_objective`.

    Raises:
        CheckpointError: The checkpoint contradicts the caller, or stores an invalid objective.
        ConfigError: The caller gives an invalid objective.
    """
    wanted = {"objective": given} if isinstance(given, str) else dict(given or {})
    if not wanted:
        try:
            create_objective(**stored)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{source}: invalid training objective: {one_line(error)}") from None
        return dict(stored)
    if unknown := sorted(wanted.keys() - set(OBJECTIVE_FIELDS)):
        raise ConfigError(
            f"objective: unknown {', '.join(unknown)}; choose from {', '.join(OBJECTIVE_FIELDS)}"
        )
    known = dict(stored)
    if stored and "objective" not in stored:  # pipelines of diffusers, and runs before flow matching existed
        known |= {"objective": "diffusion", "prediction": "x0" if stored.get("predict_xstart") else "epsilon"}
    if differing := [name for name in wanted if known.get(name, wanted[name]) != wanted[name]]:
        listed = ", ".join(
            f"{name} is {known[name]} in the checkpoint, {wanted[name]} requested" for name in differing
        )
        raise CheckpointError(f"{source} stores its training objective: {listed}; remove it")
    merged = {**stored, **wanted}
    if "path" in wanted and known.get("objective", wanted.get("objective")) != "flow":
        raise ConfigError(
            f"path {wanted['path']} applies only to flow matching: give objective flow (--objective flow) too"
        )
    create_objective(**merged)
    return merged
