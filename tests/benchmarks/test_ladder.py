"""The ladder: what is timed on every rung is one and the same model, and what fails leaves a reason and no figure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models.ladder import climb as climbing
from benchmarks.models.ladder import training
from benchmarks.models.ladder.__main__ import cases, main, parser
from benchmarks.models.ladder.climb import climb, row_of
from benchmarks.models.ladder.rungs import KINDS, RUNGS, Case, Climber, Rung
from benchmarks.models.ladder.sampling import Sampling
from benchmarks.models.ladder.training import Training
from benchmarks.ops.rows import Row, read_results
from dit_fast.kernels import tuned
from dit_fast.models import DiT
from tests.sampling.test_graphs import FakeGraphs as SampledGraphs
from tests.training.test_step import FakeGraphs as TrainedGraphs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")
CPU = torch.device("cpu")
BY_NAME = {rung.name: rung for rung in RUNGS}


def silent(text: str) -> None:
    pass


def small(*_: object) -> DiT:
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model in the place of every one, no compiler, and the dtypes of a CPU without bfloat16."""
    monkeypatch.setattr("benchmarks.models.ladder.__main__.cpu_has_bf16", lambda: False)
    monkeypatch.setattr(climbing, "random_model", small)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)


@pytest.fixture
def device_with_everything(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No rung is left out: graphs are recorded calls, torchao a mark on the model. Returns the models marked."""
    marked: list[Any] = []
    monkeypatch.setattr(climbing, "lacks", lambda rung, device: None)
    monkeypatch.setattr("dit_fast.sampling.sampler.GraphCapture", SampledGraphs)
    monkeypatch.setattr(training, "CudaGraphs", TrainedGraphs)
    monkeypatch.setattr(training, "use_float8", lambda model, device: marked.append(model))
    return marked


def climbed(kind: str, *names: str, keep: Callable[[Row], None] = silent, **changes: Any) -> list[Row]:  # type: ignore[assignment]
    case = Case(**{"kind": kind, "model": "DiT-S/2", "image_size": 64, "batch": 16, **changes})
    return climb(case, case.rungs(list(names) or None), 1, 2, silent, keep, {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_rung_of_every_kind(kind: str, device_with_everything: list[Any]) -> None:
    rows = climbed(kind)
    assert {row.provider: row.failed for row in rows if row.failed} == {}
    assert [row.provider for row in rows] == [
        name for name, rung in BY_NAME.items() if kind.startswith("train") or not rung.training_only
    ]
    assert {(row.benchmark, row.direction) for row in rows} == {KINDS[kind]}
    rate, steps = ("images/s", 1) if kind.startswith("train") else ("images/s at 250 steps", 250)
    for row in rows:
        assert row.repeats == 2
        assert row.metrics[rate] == pytest.approx(16 / row.median / steps)
        assert 0 < row.metrics["of the roofline"] < 1
        # No CUDA device: no figures of one.
        assert set(row.metrics) == {rate, "of the roofline"}
    assert len(device_with_everything) == kind.startswith("train")


@pytest.mark.parametrize("kind", ["train", "sample-cfg"])
def test_a_cpu_computes_in_float32_and_has_no_graphs(kind: str) -> None:
    rows = {row.provider: row for row in climbed(kind)}
    left_out = {name for name, row in rows.items() if row.failed == "needs a CUDA device"}
    assert left_out == {rung.name for rung in Case(kind, "", 64, 1).rungs() if rung.needs_gpu}
    assert {"+ TF32", "+ bf16", "ours + CUDA graph", "ours + CUDA graph + fp8"} <= left_out
    assert {row.dtype for name, row in rows.items() if name not in left_out} == {"fp32"}
    assert rows["ours + CUDA graph + fp8"].dtype == "fp8"
    assert all(row.median for name, row in rows.items() if name not in left_out)


@pytest.mark.parametrize("kind", ["train", "sample-cfg"])
def test_a_cpu_computes_in_bfloat16_where_asked_to(kind: str) -> None:
    """The same rungs but the plain one in float32, which the other case of a command has."""
    rows = {row.provider: row for row in climbed(kind, bf16=True) if row.failed != "needs a CUDA device"}
    assert set(rows) == {
        rung.name for rung in Case(kind, "", 64, 1).rungs() if rung.bf16 and not rung.needs_gpu
    }
    assert {row.dtype for row in rows.values()} == {"bf16"}
    assert all(row.median for row in rows.values())


def test_dtypes_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, [False, True]), (False, [False])):
        monkeypatch.setattr("benchmarks.models.ladder.__main__.cpu_has_bf16", lambda has=has: has)
        assert [case.bf16 for case in cases(parser().parse_args(["--kinds", "train"]))] == expected
    assert [case.bf16 for case in cases(parser().parse_args(["--kinds", "train", "--dtypes", "bf16"]))] == [
        True
    ]


def test_models_of_all_rungs_are_one(tmp_path: Path, device_with_everything: list[Any]) -> None:
    """Samples of the same draws agree to rounding, and a model that is another one does not."""
    sampling = Sampling(Case("sample-cfg", "", 64, 2), small(), CPU, 2)
    for rung in RUNGS:
        built = sampling.build(rung)
        assert built.gap <= built.most, rung
    assert sampling.build(BY_NAME["+ bf16"]).gap > 0
    with torch.no_grad():
        sampling.model.final_layer.linear.weight.mul_(1.01)
    assert sampling.build(BY_NAME["ours, eager"].on(CPU)).gap > 1e-4
    step = Training(Case("train", "", 64, 64), small(), CPU, tmp_path)
    assert step.build(BY_NAME["diffusers"]).gap < 0.05
    step.expected *= 1.5
    assert step.build(BY_NAME["ours, eager"]).gap > 0.2


@pytest.mark.parametrize("gap", [0.3, float("nan")])
def test_another_model_leaves_no_figure(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(self: Training, rung: Rung) -> Climber:
        return Climber(lambda: None, 1, gap if rung.model == "ours" else 0.0, 0.2)

    monkeypatch.setattr(Training, "build", build)
    plain, ours = climbed("train", "plain fp32", "ours")
    assert plain.median is not None
    assert ours.failed == (
        f"another model: its first results are {gap:.2g} off the plain model in float32, where 0.2 is rounding"
    )


def test_what_fails_is_a_reason_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise Exception("out of memory: 1 GB\nlong story")

    kept: list[Row] = []
    monkeypatch.setattr(training, "to_diffusers", fail)
    plain, peer, ours = climbed("train", "plain fp32", "diffusers", "ours", keep=kept.append)
    assert peer.failed == "out of memory: 1 GB"
    assert peer.median is None
    assert plain.median is not None
    assert ours.median is not None
    assert list({row.provider: row for row in kept}.values()) == [plain, peer, ours]


class Killed(BaseException):
    """What no rung can catch, as a kill."""


@pytest.mark.parametrize("at", [3, 5])
def test_what_is_killed_leaves_the_rows_until_then(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second round, when each rung has been timed once; and in the third."""
    runs, kept = [], []

    def run() -> None:
        runs.append(1)
        if len(runs) == at:
            raise Killed

    monkeypatch.setattr(Training, "build", lambda self, rung: Climber(run, 1, 0.0, 0.2))
    monkeypatch.setattr(climbing, "launches_of", lambda run, device, steps: None)
    case = Case("train", "DiT-S/2", 64, 16)
    with pytest.raises(Killed):
        climb(case, case.rungs(["plain fp32", "+ SDPA"]), 2, 2, silent, kept.append, {})
    last = {row.provider: row.repeats for row in kept}
    assert last == {3: {"plain fp32": 1, "+ SDPA": 1}, 5: {"plain fp32": 2, "+ SDPA": 2}}[at]


def test_rungs_run_in_the_order_that_is_asked_for() -> None:
    names = ["ours", "+ torch.compile", "ours + CUDA graph", "ours, tuned"]
    assert [rung.name for rung in Case("train", "", 64, 1).rungs(names)] == names
    assert [rung.name for rung in Case("sample", "", 64, 1).rungs(names)] == names[:3]


def test_building_alone_keeps_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    build = Training.build
    monkeypatch.setattr(Training, "build", lambda self, rung: built.append(rung.name) or build(self, rung))
    words = ["--kinds", "train", "--image-sizes", "64", "--batch", "1", "--compile-only"]
    assert main([*words, "--only", "ours", "+ torch.compile", "--out", str(tmp_path)]) == 0
    assert built == ["ours", "+ torch.compile"]
    assert not list(tmp_path.glob("*/*.json"))


def test_a_model_of_another_depth_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []
    monkeypatch.setattr(climbing, "random_model", lambda *_, **sizes: asked.append(sizes) or small())
    (row,) = climbed("sample", "plain fp32", depth=1)
    assert (row.case, asked) == ("DiT-S/2, depth 1", [{"depth": 1}])


def test_only_the_tuned_rung_follows_the_tables(
    device_with_everything: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    follows: dict[str, bool] = {}
    build = Training.build

    def built(self: Training, rung: Rung) -> Climber:
        follows[rung.name] = tuned._on
        return build(self, rung)

    monkeypatch.setattr(Training, "build", built)
    climbed("train", "ours", "ours, tuned", "ours + CUDA graph")
    assert follows == {"ours": False, "ours, tuned": True, "ours + CUDA graph": False}
    assert tuned._on


def test_without_a_table_there_is_no_tuned_rung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.forget()
    why = climbing.lacks(BY_NAME["ours, tuned"], torch.device("cuda"))
    assert why == "no tuned table fits this device: python -m benchmarks.ops.tune attention mlp"
    assert climbing.lacks(BY_NAME["ours"], torch.device("cuda")) is None
    tuned.forget()


def test_options_of_a_rung_are_those_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(training, "DiT", lambda **options: made.append(options) or small())
    step = Training(Case("train", "", 64, 1), small(), CPU, Path())
    for name in ("ours", "ours, attention triton", "ours, epilogue cublaslt"):
        step.build(BY_NAME[name])
    assert [(options["attention"], options["mlp_epilogue"]) for options in made] == [
        ("auto", "auto"), ("triton", "auto"), ("auto", "cublaslt"),
    ]  # fmt: skip


def test_a_reason_is_the_line_that_says_it() -> None:
    assert climbing.reason(RuntimeError("no room\nlong story")) == "no room"
    assert climbing.reason(RuntimeError("Cannot import x:\nstory\nno y")) == "Cannot import x: no y"
    assert climbing.reason(RuntimeError("")) == "RuntimeError"


def test_a_rung_that_fails_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def run() -> None:
        runs.append(1)
        if len(runs) == 2:
            raise RuntimeError("")

    monkeypatch.setattr(Training, "build", lambda self, rung: Climber(run, 1, 0.0, 0.2))
    (row,) = climbed("train", "ours")
    assert (row.failed, row.repeats, len(runs)) == ("RuntimeError", 0, 2)


def test_a_graph_that_is_refused_is_no_graph(device_with_everything: list[Any], monkeypatch) -> None:
    monkeypatch.setattr(training, "CudaGraphs", lambda: TrainedGraphs("operation not permitted", 2))
    monkeypatch.setattr(
        "dit_fast.sampling.sampler.GraphCapture", lambda: SampledGraphs(RuntimeError("not permitted"))
    )
    assert climbed("train", "ours + CUDA graph")[0].failed == "no CUDA graph: operation not permitted"
    assert climbed("sample", "ours + CUDA graph")[0].failed == "no CUDA graph: capture failed: not permitted"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "DiT-S/3"}, "unknown model DiT-S/3: choose DiT-XL/2, "),
        ({"image_size": 100}, "100 pixels are not a multiple of 8 x patch 2"),
    ],
)
def test_a_case_that_there_is_none_of(changes: dict[str, Any], reason: str) -> None:
    rows = climbed("sample", "plain fp32", "ours", **changes)
    assert [row.provider for row in rows] == ["plain fp32", "ours"]
    assert all(row.failed.startswith(reason) for row in rows)


def test_missing_libraries_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao and diffusers are extras."""
    monkeypatch.setattr(climbing, "lacks", lambda rung, device: None)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    peer, fp8 = climbed("train", "diffusers", "ours + CUDA graph + fp8")
    assert "diffusers" in peer.failed
    assert "[fp8]'" in fp8.failed


def test_plain_attention_without_sdpa_is_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    kernel = training.sdpa_kernel
    monkeypatch.setattr(training, "sdpa_kernel", lambda kind: asked.append(kind) or kernel(kind))
    climbed("train", "+ SDPA")
    assert asked == []
    climbed("train", "plain fp32")
    assert set(asked) == {training.SDPBackend.MATH}


@pytest.mark.slow
def test_command_writes_rows_and_goes_on_where_it_stopped(tmp_path: Path, capsys, monkeypatch) -> None:
    words = [
        "--kinds",
        "train",
        "sample",
        "--batch",
        "1",
        "--image-sizes",
        "64",
        "--images",
        "1",
        "--repeats",
        "1",
    ]
    assert main([*words, "--only", "plain fp32", "--out", str(tmp_path)]) == 0
    assert "train, DiT-S/2, batch 16, 64 px, step:\n\n|  | dtype | ms | images/s |" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/*.json")
    before = read_results(path).rows
    assert [(row.benchmark, row.provider) for row in before] == [
        ("train", "plain fp32"),
        ("sample", "plain fp32"),
    ]

    built = []
    build = Training.build
    monkeypatch.setattr(Training, "build", lambda self, rung: built.append(rung.name) or build(self, rung))
    assert main([*words, "--only", "plain fp32", "+ TF32", "ours, eager", "--out", str(tmp_path)]) == 0
    assert built == ["ours, eager"]
    after = read_results(path).rows
    assert after[:2] == before
    assert {row.provider: row.failed for row in after if row.benchmark == "train"} == {
        "plain fp32": None, "+ TF32": "needs a CUDA device", "ours, eager": None,
    }  # fmt: skip
    # More repeats than before are another measurement.
    assert main([*words, "--repeats", "2", "--only", "plain fp32", "--out", str(tmp_path)]) == 0
    assert built == ["ours, eager", "plain fp32"]
    path.write_text(json.dumps(json.loads(path.read_text()))[:-40])
    assert main([*words, "--out", str(tmp_path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_cases_keep_the_pixels_of_a_batch() -> None:
    args = parser().parse_args(
        ["--image-sizes", "256", "512", "--models", "DiT-S/2", "DiT-B/2", "--batch", "8"]
    )
    found = list(cases(args))
    assert [case.batch for case in found if case.kind == "train"] == [8, 8, 2, 2]
    assert [case.batch for case in found[:8]] == [8, 8, 1, 8, 32, 1, 8, 32]
    assert [case.forwards for case in found[4:8]] == [32, 2, 16, 64]
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["--repeats", "0"])


def test_figures_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MFU by its convention: three forward passes an image in training, one an evaluation in sampling."""
    monkeypatch.setattr(climbing, "peak_flops", lambda device: 1e9)
    model = small()
    for kind, passes in (("train", 3), ("sample", 1), ("sample-cfg", 2)):
        case = Case(kind, "DiT-S/2", 64, 4)
        found = climbing.Found(seconds=[0.5, 0.5], memory=2 * 10**9, launches=70.0)
        metrics = row_of(case, BY_NAME["ours"], found, model, CPU).metrics
        assert metrics["MFU"] == pytest.approx(passes * 4 * 2 * model.macs() / 0.5 / 1e9)
        assert (metrics["peak GB"], metrics["launches"]) == (2.0, 70.0)
