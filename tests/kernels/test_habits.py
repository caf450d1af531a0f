"""The habits of tests/interop/habits.py on the kernels themselves."""

import pytest
import torch

from tests.interop.habits import HABITS, build, run
from tests.tolerance import relative

# One habit of each kind of change that a layer may have.
TITLES = (
    "forward hooks on every layer",
    "torch.nn.utils.parametrize",
    "prune.global_unstructured",
    "peft LoRA: a pattern",
    "diffusers group offloading: block_level",
    "diffusers layerwise casting: float8",
    "torchao int8 weights",
)


@pytest.mark.parametrize("name", ["adaln_zero", pytest.param("adaln", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "title",
    [title if title in TITLES else pytest.param(title, marks=pytest.mark.nightly) for title in HABITS],
)
def test_a_habit_has_its_effect_beside_the_kernels(title: str, name: str) -> None:
    applied = HABITS[title](build(name, "triton"))
    with torch.no_grad():
        assert relative(run(applied.module, name), run(applied.plain, name)) <= 1e-5
