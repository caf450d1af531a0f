"""Options that are described once: command line, checks, docstring and page come from the fields of a dataclass."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytest

from dit_fast.cli.sample_options import SampleOptions
from dit_fast.data.encode import EncodeConfig
from dit_fast.diffusion.flow_matching import FLOW_WEIGHTINGS
from dit_fast.diffusion.paths import PATHS, PathName
from dit_fast.errors import ConfigError
from dit_fast.kernels import ACTIVATIONS
from dit_fast.kernels.reference import ACTIVATIONS as ACTIVATION_FUNCTIONS
from dit_fast.model.blocks import BLOCKS, Conditioning
from dit_fast.model.cost import PRECISIONS as COST_PRECISIONS
from dit_fast.model.cost import CostPrecision
from dit_fast.sampling import PRECISIONS, SOLVERS, Guidance, SamplerConfig
from dit_fast.sampling.config import SamplePrecision
from dit_fast.sampling.guidance import SCHEDULES, GuidanceSchedule
from dit_fast.sampling.runge_kutta import TABLEAUS
from dit_fast.sampling.solvers import DETERMINISTIC, DIFFUSION_FORMS, SDE
from dit_fast.training.config import TrainConfig
from dit_fast.training.objective import LossWeighting
from dit_fast.utils.options import (
    REQUIRED,
    Options,
    add_options,
    check_options,
    default_of,
    documented,
    given_options,
    option,
    options_of,
    read_options,
    same_option,
    value_of,
)
from dit_fast.utils.values import Number, OneOf, Several, Whole


@documented
@dataclass(frozen=True, kw_only=True)
class Example(Options):
    """An example."""

    source: str | None = option(None, "Where from", OneOf(("here", "there")), positional=True)
    count: int = option(REQUIRED, "How many", Whole(1, 9), group="numbers", aliases=("--number",))
    rate: float = option(1e-4, "How fast, in %", Number(), group="numbers")
    sizes: tuple[int, ...] = option((), "Which sizes", Several(Whole()), group="numbers", default_text="all")
    mode: Literal["slow", "fast"] = option("slow", "Which mode", constants={"--quick": "fast"})
    kind: str = option("new", "Which kind", OneOf(("new",), (("old", "new"),)))
    compare: str | None = option(None, "Compare", OneOf(("a", "b")), bare="b")
    clip: bool | None = option(None, "Whether to clip", default_text="on for images")
    deep: bool = option(False, "Whether to go deep")


@dataclass(frozen=True)
class Other(Options):
    rate: float = same_option(Example, "rate", default=2.0, group="others")
    mode: Literal["slow", "fast"] | None = same_option(Example, "mode", default=None, default_text="by size")


def parsed(*words: str, cls: Any = Example, groups: Sequence[str] | None = None, **more: Any) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, cls, groups, **more)
    return parser.parse_args(words)


def test_a_command_line_becomes_the_dataclass() -> None:
    words = ("there", "--number", "3", "--rate", "0.5", "--sizes", "1", "2", "--quick", "--kind", "old")
    assert read_options(Example, parsed(*words, "--compare", "--clip", "--no-deep")) == Example(
        source="there",
        count=3,
        rate=0.5,
        sizes=(1, 2),
        mode="fast",
        kind="new",
        compare="b",
        clip=True,
        deep=False,
    )
    assert read_options(Example, parsed("--count", "1")) == Example(count=1)
    assert given_options(Example, parsed("--count", "1", "--mode", "slow")) == {
        "source": None,
        "count": 1,
        "mode": "slow",
    }
    assert given_options(Example, parsed("--count", "1", "--deep"), ("numbers",)) == {"count": 1}


@pytest.mark.parametrize(
    "words",
    [(), ("--count", "10"), ("--count", "1", "nowhere"), ("--count", "1", "--mode", "x"), ("--sizes",)],
)
def test_what_is_out_of_range_is_a_usage_error(words: tuple[str, ...]) -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parsed(*words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 10}, "^--count 10: give a whole number from 1 to 9$"),
        ({"count": None}, "^--count None: give a whole"),
        ({"count": 1, "mode": "x"}, "^--mode 'x': give one of slow, fast$"),
        ({"count": 1, "sizes": (0,)}, r"^--sizes \(0,\): give one or more, each a whole number"),
        ({"count": 1, "deep": None}, "^--deep None: give True or False$"),
    ],
)
def test_python_s_values_are_checked_by_the_same_ranges(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Example(**options)


def test_help_has_groups_defaults_and_sentences() -> None:
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=200))
    add_options(parser, Example)
    text = " ".join(parser.format_help().split())
    assert "numbers: --count COUNT, --number COUNT How many" in text
    assert "--rate RATE How fast, in % (default: 0.0001)" in text
    assert "Which sizes (default: all)" in text
    assert "--mode {slow,fast} Which mode (default: slow)" in text
    assert "--quick The same as --mode fast" in text
    assert "--clip, --no-clip Whether to clip (default: on for images)" in text
    assert "--deep, --no-deep Whether to go deep (default: off)" in text
    assert "--compare [{a,b}] Compare" in text
    assert "    count: How many.\n    " in (Example.__doc__ or "")
    assert "rate: How fast, in % (default: 0.0001).\n" in (Example.__doc__ or "")


def test_groups_are_chosen_and_ordered() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, Example, ("numbers", "options"), required=False)
    assert [action.dest for action in parser._actions][:4] == ["count", "rate", "sizes", "source"]
    assert vars(parser.parse_args([])) == {"source": None}


def test_the_same_option_has_another_default() -> None:
    assert read_options(Other, parsed("--mode", "fast", cls=Other)) == Other(2.0, "fast")
    assert [default_of(field) for field in options_of(Other)] == ["2", "by size"]
    with pytest.raises(ConfigError, match="--rate nan"):
        Other(rate=float("nan"))


def test_an_option_without_a_range_is_an_error_of_the_program() -> None:
    @dataclass(frozen=True)
    class Loose:
        path: str = option("x", "A path")

    with pytest.raises(TypeError, match=r"^path: .* has no range"):
        check_options(Loose())


@pytest.mark.parametrize("cls", [TrainConfig, EncodeConfig, SamplerConfig, Guidance, SampleOptions])
def test_defaults_are_in_their_ranges_and_help_is_a_sentence(cls: type) -> None:
    for field in options_of(cls):
        about = field.metadata["option"]
        if field.default not in (None, REQUIRED):
            assert value_of(field).accept(field.default) == field.default, field.name
        assert about.help[0].isupper() or about.help[0].isdigit(), field.name
        assert not about.help.endswith("."), field.name
        assert "default" not in about.help.lower(), (
            f"{field.name}: the default is not repeated in the help text"
        )


@pytest.mark.parametrize(
    ("literal", "known"),
    [
        (PathName, tuple(PATHS)),
        (Conditioning, tuple(BLOCKS)),
        (GuidanceSchedule, tuple(SCHEDULES)),
        (SamplePrecision, tuple(PRECISIONS)),
        (CostPrecision, tuple(COST_PRECISIONS)),
        (LossWeighting, ("none", "min-snr", *FLOW_WEIGHTINGS[1:])),
    ],
)
def test_types_of_choices_are_the_choices(literal: Any, known: tuple[str, ...]) -> None:
    assert get_args(literal) == known
    assert (*ACTIVATIONS,) == tuple(ACTIVATION_FUNCTIONS)
    sde = (SDE + form for form in DIFFUSION_FORMS)
    assert ("ddpm", "ddim", *DETERMINISTIC, *TABLEAUS, "dopri5", *sde) == SOLVERS


def test_runs_with_the_earlier_name_of_the_optimizer_resume() -> None:
    assert TrainConfig(data="digits", optimizer="ours").optimizer == "adamw_ema"  # type: ignore[arg-type]


def test_every_option_of_a_run_is_on_the_command_line() -> None:
    from dit_fast.cli import train

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    assert {field.name for field in options_of(TrainConfig)} <= {action.dest for action in parser._actions}


def test_the_page_of_options_is_up_to_date() -> None:
    from tests.project.options_page import PAGE, page

    assert PAGE.read_text() == page(), "run python -m tests.project.options_page"
