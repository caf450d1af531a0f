"""What the model of a weight file was trained to predict: as the file tells, or else the caller."""

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
# All of these sample a model that reads discrete timesteps of the same forward process; they differ as solvers do.
_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in ("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "PNDM", "DPMSolverMultistep")
    + ("DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep")
    + ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")
    + ("LMSDiscrete", "SASolver")
)


@dataclass(frozen=True)
class PipelineFacts:
    """Where known: the classes' names in their order, arguments of `create_diffusion`, the autoencoder's folder."""

    class_names: tuple[str, ...] | None = None
    diffusion: dict[str, Any] = field(default_factory=dict)
    vae: str | None = None


def pipeline_facts(folder: Path, num_classes: int) -> PipelineFacts:
    """The facts of a pipeline's folder; none of a folder that is no pipeline's.

    Raises CheckpointError for a scheduler of another kind, noise schedule or prediction than a DiT's samplers know:
    flow matching and EDM are not taken for the noise prediction of DDPM.
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
    """Raise CheckpointError for an entry of model_index.json, ["diffusers", class], of another kind of model."""
    if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
        _check_class(entry[1], path)


def _check_class(name: Any, path: Path) -> None:
    """Raise CheckpointError for a scheduler that samples other models than those of discrete timesteps."""
    if isinstance(name, str) and name in _SCHEDULERS:
        return
    kinds = {"Flow": "flow matching", "EDM": "EDM (Karras et al. 2022)", "LCM": "a consistency model"}
    kind = next((kind for part, kind in kinds.items() if part in str(name)), "something else")
    raise CheckpointError(
        f"{path}: its scheduler is {str(name)[:80]!r}: the model was trained for {kind}, with timesteps and outputs in "
        f"diffusers' conventions for it, and only models of DDPM's noise schedules (DDPMScheduler, DDIMScheduler, "
        "...) are read from pipelines"
    )


def _class_names(names: Any, num_classes: int) -> tuple[str, ...] | None:
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(num_classes)}:
        return None
    return tuple(str(names[str(i)]) for i in range(num_classes))


def _diffusion(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of `create_diffusion` for a scheduler's configuration; absent fields have diffusers' defaults."""
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
        # Ho et al. 2020 have 0.0001 to 0.02 for 1000 steps; the same noise in n steps has 1000 / n times as much each.
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
            f"{path}: no schedule that this model could be sampled with: {'; '.join(problems)[:300]}; give the "
            "transformer's folder, and --objective, to load the model alone"
        )
    return {"noise_schedule": schedule, "diffusion_steps": steps, "predict_xstart": _PREDICTIONS[prediction]}


ASKED = ("objective", "prediction", "path")
"""What a caller may say: arguments of `create_objective`."""


def transport_objective(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `create_objective` in the options that train.py of SiT or LightningDiT saves; {} for others."""
    path, prediction = (str(arguments.get(name)).lower() for name in ("path_type", "prediction"))
    if path not in PATHS:
        return {}
    return {
        "objective": "flow",
        "path": path,
        "prediction": {"noise": "epsilon"}.get(prediction, prediction),
    }


def settled_objective(
    asked: str | Mapping[str, Any] | None, told: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """`told`, which the checkpoint says, with what is `asked`: a name, or arguments of ASKED.

    Raises CheckpointError where the two contradict each other, and ConfigError for what cannot be asked.
    """
    wanted = {"objective": asked} if isinstance(asked, str) else dict(asked or {})
    if not wanted:
        try:
            create_objective(**told)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(
                f"{source}: what it says of its objective cannot be: {one_line(error)}"
            ) from None
        return dict(told)
    if unknown := sorted(wanted.keys() - set(ASKED)):
        raise ConfigError(f"objective: unknown {', '.join(unknown)}; it has {', '.join(ASKED)}")
    said = dict(told)
    if told and "objective" not in told:  # pipelines of diffusers, and runs from when there was one
        said |= {"objective": "diffusion", "prediction": "x0" if told.get("predict_xstart") else "epsilon"}
    if differing := [name for name in wanted if said.get(name, wanted[name]) != wanted[name]]:
        listed = ", ".join(
            f"{name} is {said[name]} in the checkpoint, {wanted[name]} asked for" for name in differing
        )
        raise CheckpointError(f"{source} tells what it was trained on: {listed}; leave it out")
    settled = {**told, **wanted}
    if "path" in wanted and said.get("objective", wanted.get("objective")) != "flow":
        raise ConfigError(
            f"path {wanted['path']} is of flow matching: give objective flow (--objective flow) with it"
        )
    create_objective(**settled)
    return settled
