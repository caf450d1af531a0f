"""What the model of a weight file was trained to predict: as the file tells, or else the caller."""

from collections.abc import Mapping
from typing import Any

from dit_fast.diffusion.objectives import create_objective
from dit_fast.diffusion.paths import PATHS
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop.weight_file import first_line

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
                f"{source}: what it says of its objective cannot be: {first_line(error)}"
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
