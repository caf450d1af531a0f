"""Recipes by name, for `--preset`: the YAML files in this folder; docs/sit.md has the sources of the published ones."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dit_fast.training.config import TrainConfig
from dit_fast.utils.option_files import read_option_file

NAMES = ("demo", "dit", "lightningdit", "sit")


class _Presets(Mapping[str, dict[str, Any]]):
    """Options of each preset by field of `TrainConfig`; a file is read when it is asked for."""

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in NAMES:
            raise KeyError(name)
        return dict(_read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


PRESETS: Mapping[str, dict[str, Any]] = _Presets()


@functools.cache
def _read(name: str) -> dict[str, Any]:
    return read_option_file(Path(__file__).with_name(f"{name}.yaml"), TrainConfig)
