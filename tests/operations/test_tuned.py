"""Tuned tables: used when they fit, ignored with one warning when not, written by the search; what profilers see."""

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from benchmarks.compile import compile_ahead
from benchmarks.compile.compile_ahead import Answer, compile_answer
from benchmarks.ops import tune
from benchmarks.ops.op_bench import Bench
from benchmarks.ops.registry import REGISTRY, OpSpec
from benchmarks.ops.tune import Measured
from dit_fast.kernels import reference, tuned
from dit_fast.kernels.attention.short import backward_launch, forward_launch
from dit_fast.kernels.launch import (
    Products,
    RowLaunch,
    TileLaunch,
    describe,
    launch,
    record_launches,
    row_launch,
)
from dit_fast.kernels.mlp import gemm
from dit_fast.kernels.mlp.gemm import gemm_launch

SHAPE = (256, 256, 1152)
KEY = "D=1152 bfloat16,bfloat16"
FORWARD = "_gated_residual_fwd_kernel"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.forget()
    yield tmp_path
    tuned.forget()


def meta(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def recorded(capability: int = 90) -> Any:
    """The forward launch of gated_residual, and its kernel."""
    spec = REGISTRY["gated_residual"]
    with record_launches(capability) as launches:
        spec.op(*spec.make_inputs(SHAPE, torch.bfloat16, torch.bfloat16, meta), kernels="triton")
    return launches[0]


def table(config: Any = None, **head: Any) -> dict[str, Any]:
    source = tuned.source_hash(recorded().kernel)
    tuned.forget()
    entries = {KEY: {"config": config or {"rows": 4, "num_warps": 8}}}
    launches = {FORWARD: {"source": source, "entries": entries}}
    return {"schema": 1, "architecture": "sm90", **tuned.versions(), "launches": launches, **head}


def write(folder: Path, data: Any) -> None:
    (folder / "sm90.json").write_text(data if isinstance(data, str) else json.dumps(data))
    tuned.forget()


def test_without_a_table_the_heuristic_decides(folder: Path) -> None:
    found = recorded()
    heuristic = row_launch(*SHAPE)
    assert (found.arguments["ROWS"], found.num_warps) == (heuristic.rows, heuristic.num_warps)


def test_a_table_decides_on_its_architecture_alone(folder: Path) -> None:
    heuristic = row_launch(*SHAPE)
    assert (heuristic.rows, heuristic.num_warps) != (4, 8)
    write(folder, table())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (recorded(90).arguments["ROWS"], recorded(90).num_warps) == (4, 8)
        assert recorded(90).grid == (256 * 64,)
        assert recorded(80).num_warps == heuristic.num_warps


def test_a_table_is_read_once(folder: Path) -> None:
    write(folder, table())
    recorded()
    (folder / "sm90.json").unlink()
    assert recorded().num_warps == 8


def with_source(data: dict[str, Any], source: str) -> dict[str, Any]:
    data["launches"][FORWARD]["source"] = source
    return data


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: "{", "not JSON"),
        (lambda: "[]", "schema is 'list', expected 1"),
        (lambda: table(schema=2), "schema is 2, expected 1"),
        (lambda: table(architecture="sm80"), "architecture is 'sm80', expected 'sm90'"),
        (lambda: table(torch="1.0.0"), "measured with torch 1.0.0, here is "),
        (lambda: table(triton="1.0.0"), "measured with triton 1.0.0, here is "),
        (lambda: table(launches=[1]), "'launches' is not {name: {source, entries: {key: entry}}}"),
        (lambda: with_source(table(), "0"), f"{FORWARD}: its code has changed since it was measured"),
        (lambda: table({"rows": 3, "num_warps": 4}), "rows is 3, expected a power of two from 2 to 64"),
        (
            lambda: table({"rows": 8, "num_warps": 64}),
            "num_warps is 64, expected a power of two from 1 to 16",
        ),
        (lambda: table({"rows": "8"}), "config is {'rows': '8'}, expected whole numbers for rows, num_warps"),
        (lambda: table({"splits": 1}), "config is {'splits': 1}, expected whole numbers for rows, num_warps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_ignored_with_one_warning(
    folder: Path, make: Callable[[], Any], reason: str
) -> None:
    write(folder, make())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        heuristic = row_launch(*SHAPE)
        for _ in range(2):
            found = recorded()
            assert (found.arguments["ROWS"], found.num_warps) == (heuristic.rows, heuristic.num_warps)
    (warning,) = caught
    assert str(warning.message).startswith(f"tuned table ignored: {folder / 'sm90.json'}: ")
    assert reason in str(warning.message)


def choices(word: Any) -> dict[str, Any]:
    source = tuned.source_hash()
    entries = {"key": {"choice": word}}
    return table(choices={"attention": {"source": source, "entries": entries}})


def test_choice(folder: Path) -> None:
    def chosen(key: str = "key") -> str:
        return tuned.choice("attention", key, "sdpa", options=("sdpa", "triton"), capability=90)

    assert chosen() == "sdpa"
    write(folder, choices("triton"))
    assert (chosen(), chosen("another key")) == ("triton", "sdpa")
    write(folder, choices("cudnn"))
    with pytest.warns(RuntimeWarning, match="choice is 'cudnn', expected 'sdpa', 'triton'"):
        assert chosen() == "sdpa"


@pytest.mark.parametrize(
    "launch_type",
    [
        RowLaunch(8, 4, 1152, 256, 2),
        TileLaunch(64, 64, 16, 4),
        forward_launch(256, 256, 16),
        backward_launch(256, 72),
        gemm_launch(65536, 4608, 1152, 2, 90, True, True),
    ],
)
def test_candidates_are_valid_and_hold_the_heuristic(launch_type: Any) -> None:
    found = list(launch_type.candidates())
    assert launch_type in found
    assert len(found) == len(set(found)) > 10
    fixed = set(launch_type.__dataclass_fields__) - set(launch_type.tunable)
    assert all(getattr(item, name) == getattr(launch_type, name) for item in found for name in fixed)


KERNELS = """
import triton
import triton.language as tl

SCALE = tl.constexpr({scale})

@triton.jit
def helper(x):
    return x {operator} SCALE

@triton.jit
def kernel(x_ptr):
    {docstring}
    tl.store(x_ptr, helper(tl.load(x_ptr)))  {comment}
"""


def test_source_hash_follows_calls_and_constants_but_not_words(tmp_path: Path) -> None:
    def source(number: int, **changes: Any) -> str:
        values = {"scale": 2, "operator": "+", "docstring": "", "comment": "", **changes}
        path = tmp_path / f"kernels_{number}.py"
        path.write_text(KERNELS.format(**values))
        spec = importlib.util.spec_from_file_location("hashed_kernels", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return tuned.source_hash(module.kernel)

    first = source(0)
    assert source(1, comment="# why", docstring='"""What."""') == first
    assert len({first, source(2, operator="*"), source(3, scale=3)}) == 3


def test_without_a_gpu_the_search_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["gated_residual"]) == 1
    assert capsys.readouterr().err == "tune: no CUDA device here; --dry-run walks the search without one\n"


def test_dry_run_walks_the_search_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["gated_residual", "--shape", "256", "256", "1152", "--dtypes", "bf16", "--dry-run"]
    assert tune.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"{FORWARD} [{KEY}]: 13 of 13 answers ran; heuristic 1.0, best 1.0 by RowLaunch("
    )
    assert lines[0].endswith("microseconds of a made-up timer")
    assert len(lines) == 2
    assert list(folder.iterdir()) == []


def test_a_table_is_written_after_each_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers are compiled before the first is timed; what is killed keeps what it has measured."""
    compiled: list[Any] = []

    def compile_answers(answers: Any, capability: int, jobs: int) -> list[str]:
        compiled.extend(answers)
        assert (capability, jobs) == (90, 3)
        return ["one of them: why"]

    def timer(function: Callable[[], Any]) -> float:
        assert len(compiled) == 26
        if path.exists():
            raise KeyboardInterrupt
        return 1.0

    path = tmp_path / "sm90.json"
    words = [
        "gated_residual",
        "--shape",
        "256",
        "256",
        "1152",
        "--dtypes",
        "bf16",
        "--jobs",
        "3",
        "--missing",
    ]
    words += ["--dry-run", "--out", str(path)]
    monkeypatch.setattr(tune, "compile_answers", compile_answers)
    monkeypatch.setattr(tune, "made_up_timer", timer)
    with pytest.raises(KeyboardInterrupt):
        tune.main(words)
    data = json.loads(path.read_text())
    assert list(data["launches"]) == [FORWARD]
    assert data["device"] == "none: a made-up timer"

    # The next call asks for the rest alone, and the one after it for nothing.
    compiled.clear()
    monkeypatch.setattr(tune, "made_up_timer", lambda function: 1.0)
    assert tune.main(words) == 0
    assert {answer.name for answer in compiled} == {"_gated_residual_bwd_kernel"}
    assert list(json.loads(path.read_text())["launches"]) == ["_gated_residual_bwd_kernel", FORWARD]
    compiled.clear()
    assert tune.main(words) == 0
    assert compiled == []
    # At another shape nothing is answered.
    words[2:5] = ["8", "256", "1152"]
    assert tune.main(words) == 0
    assert len(compiled) == 26


def test_tables_can_be_left_out(folder: Path) -> None:
    write(folder, table())
    heuristic = row_launch(*SHAPE, 2)
    for on, warps in ((True, 8), (False, heuristic.num_warps), (True, 8)):
        tuned.use_tables(on)
        assert recorded().num_warps == warps


@pytest.mark.slow
def test_an_answer_is_compiled_where_a_launch_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own launcher: once compiled for an architecture, it is found in the cache."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    launched = recorded()
    option = RowLaunch(4, 8, 1152, 256, 1)
    answer = Answer("gated_residual", SHAPE, "bf16", FORWARD, option)
    try:
        assert compile_answer(answer, 90) is None
        made = sorted(path.name for path in tmp_path.rglob(f"{FORWARD}.cubin"))
        assert made == [f"{FORWARD}.cubin"]
        # As another process would: nothing in memory, everything on disk.
        launched.kernel.device_caches.clear()
        seen = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert compile_answer(answer, 90) is None
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == seen
    finally:
        launched.kernel.device_caches.clear()


def test_a_provider_is_asked_what_it_asks_itself() -> None:
    """Launches of a provider that is not the default, with the answer that leads to them; one that is not there asks
    nothing and is never timed in another's name.
    """
    kernel, default = recorded().kernel, RowLaunch(8, 4, 1152, 256, 2)

    class Asking:
        def kernel(self) -> None:
            word = tuned.choice("operation", KEY, "", options=("fast", "absent"), capability=90)
            tuned.require(word != "absent", "the library")
            if word == "fast":
                tuned.config(kernel, KEY, default, 90)

    found = tune.questions(Asking(), 90)  # type: ignore[arg-type]
    assert [(request.name, given) for request, given in found] == [
        (FORWARD, {("choices", "operation"): "fast"}), ("operation", {}),
    ]  # fmt: skip
    assert tuned.require(False, "the library") is False
    with tuned.search({}), pytest.raises(ImportError, match="the library is not installed"):
        tuned.require(False, "the library")


def test_providers_are_compared_with_their_best_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timer for which every second answer is quick, the best launch is not the heuristic's."""
    seen: list[tuple[str, Any]] = []
    measure = tune.measure

    def measured(bench: Any, request: Any, *rest: Any) -> Measured:
        seen.append((request.name, rest[-1]))
        return measure(bench, request, *rest)

    times = iter(range(10**6, 0, -1))
    monkeypatch.setattr(tune, "measure", measured)
    found = list(tune.search(["mlp"], SHAPE, ["bf16"], "meta", 90, lambda _: float(next(times))))
    names = ["_gemm_gelu_fwd_kernel", "_gemm_gelu_bwd_kernel", "mlp"]
    assert [item.request.name for item in found if item.request.name in names] == names
    given = dict(seen)["mlp"]
    for item in found[:2]:
        assert given["launches", item.request.name] == item.best


@pytest.mark.parametrize(
    ("op", "kernel", "key", "fields"),
    [
        (
            "attention",
            "_attention_short_fwd_kernel",
            "T=256 K=72 heads=4096 bfloat16",
            {"block_m": 128, "steps": 2},
        ),
        ("attention", "_attention_short_bwd_kernel", "T=256 K=72 bfloat16", {"block_m": 64, "block_n": 64}),
        (
            "mlp",
            "_gemm_gelu_fwd_kernel",
            "rows=65536 N=4608 K=1152 bfloat16",
            {"block_m": 64, "num_stages": 3},
        ),
    ],
)
def test_tables_of_products(op: str, kernel: str, key: str, fields: dict[str, int], folder: Path) -> None:
    """The short attention and the products of an MLP follow the tables too."""
    bench = Bench(REGISTRY[op], SHAPE, "bf16", "meta")
    answers = {("choices", "mlp"): "triton"}
    with tuned.search(answers):
        source = tuned.source_hash(bench.launches(kernel, 90)[0].kernel)
    launches = {kernel: {"source": source, "entries": {key: {"config": fields}}}}
    choices = {"mlp": {"source": tuned.source_hash(*gemm.KERNELS), "entries": {}}}
    write(
        folder,
        {"schema": 1, "architecture": "sm90", **tuned.versions(), "launches": launches, "choices": choices},
    )
    spec = REGISTRY[op]
    keywords = {"epilogue": "triton"} if op == "mlp" else {}
    with warnings.catch_warnings(), record_launches(90) as found:
        warnings.simplefilter("error")
        bench.run(spec.op, kernels="triton", **keywords)
    (launched,) = [each for each in found if each.kernel.fn.__name__ == kernel]
    seen = {name.lower(): value for name, value in {**launched.arguments, **launched.options}.items()}
    assert {name: seen[name] for name in fields} == fields


def test_an_answer_that_does_not_compile_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(launch: Any) -> None:
        raise RuntimeError("out of registers\nlong story")

    monkeypatch.setattr(compile_ahead, "compile_as_launched", fail)
    answer = Answer("gated_residual", SHAPE, "bf16", FORWARD, "option")
    monkeypatch.setattr(Bench, "launches", lambda *_: [None])
    assert compile_answer(answer, 90) == f"{FORWARD} option: out of registers"


def test_the_search_writes_what_the_launches_read(folder: Path) -> None:
    """With a timer that likes the fourth answer to the first question."""
    times = iter([9.0, 9.0, 9.0, 5.0] + 1000 * [10.0])
    found = list(tune.search(["gated_residual"], SHAPE, ["bf16"], "meta", 90, lambda _: next(times)))
    path = folder / "sm90.json"
    tune.write_table(path, found, SHAPE, "a device", "a command")
    best = found[0].request.options[3]
    assert best != found[0].request.default
    tuned.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (recorded().arguments["ROWS"], recorded().num_warps) == (best.rows, best.num_warps)
    data = json.loads(path.read_text())
    entry = data["launches"][FORWARD]["entries"][KEY]
    assert (entry["us"], entry["heuristic_us"], entry["shape"]) == (5.0, 10.0, list(SHAPE))
    # A second run keeps what the first one measured.
    tune.write_table(path, found[1:], SHAPE, "a device", "a command")
    assert FORWARD in json.loads(path.read_text())["launches"]


def request(default: str = "separate") -> tuned.Request:
    return tuned.Request("choices", "mlp", "key", default, ("separate", "triton", "cublaslt"), "")


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ((10.0, 9.9, None), "separate"),
        ((10.0, 9.7, 9.5), "cublaslt"),
        ((None, None, None), "separate"),
    ],
)
def test_the_heuristic_stays_unless_clearly_beaten(times: tuple[float | None, ...], best: str) -> None:
    assert Measured(request(), times, heuristic=10.0).best == best


def test_a_heuristic_without_an_answer_of_its_own_is_not_written(tmp_path: Path) -> None:
    undecided = Measured(request(default=""), (10.0, 9.9, None), heuristic=10.0)
    decided = Measured(request(default=""), (10.0, 9.0, None), heuristic=10.0)
    path = tmp_path / "sm90.json"
    tune.write_table(path, [undecided], SHAPE, "a device", "a command")
    assert "choices" not in json.loads(path.read_text())
    tune.write_table(path, [decided], SHAPE, "a device", "a command")
    entry = json.loads(path.read_text())["choices"]["mlp"]["entries"]["key"]
    assert entry == {"choice": "triton", "us": 9.0, "heuristic_us": 10.0, "shape": list(SHAPE)}


def bench(op: Callable[..., Any]) -> Bench:
    spec = REGISTRY["gated_residual"]
    wrong = OpSpec(
        "wrong", op, spec.reference, spec.make_inputs, spec.forward_elements, spec.backward_elements
    )
    return Bench(wrong, (2, 8, 64), "fp32", "cpu")


def test_an_answer_that_is_wrong_is_not_timed() -> None:
    right = bench(REGISTRY["gated_residual"].op)
    assert right.disagreement() is None
    slightly = bench(lambda *inputs, kernels: 1.0001 * reference.gated_residual(*inputs))
    assert (slightly.disagreement() or "").startswith("result 0 has a relative error of 1.00e-04, PyTorch ")
    with pytest.raises(RuntimeError, match="result 0 has a relative error"):
        tune.measure(slightly, request(), 90, lambda _: 1.0, check=True, say=lambda _: None)


class Profiled:
    """A kernel that asks for its metadata when it is launched, as Triton does while a profiler listens."""

    launch_metadata: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(**arguments: Any) -> None:
            self.seen = self.launch_metadata(grid, SimpleNamespace(name="_gemm_fwd_kernel"), arguments)

        return run


def test_profilers_see_shape_bytes_and_flops() -> None:
    kernel, x, weight = Profiled(), torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(16, 8)
    work = Products(2 * 4 * 8 * 16, torch.bfloat16)
    launch(kernel, (1,), on=x, num_warps=4, products=work, x_ptr=x, weight_ptr=weight, bias_ptr=None, N=3)
    assert kernel.seen == {"name": "gemm_fwd[4x8 bfloat16,float32]", "bytes": 64 + 512, "flops16": 1024}
    launch(kernel, (1,), on=x, num_warps=4, x_ptr=x)
    assert kernel.seen == {"name": "gemm_fwd[4x8 bfloat16]", "bytes": 64}


def test_profilers_see_what_an_operation_moves() -> None:
    found = recorded()
    seen = describe(found.grid, SimpleNamespace(name=FORWARD), found.arguments)
    assert seen["name"] == "gated_residual_fwd[256x256x1152 bfloat16]"
    # x, branch and out; the gate, a strided view of the modulation, and the bias.
    assert seen["bytes"] == 2 * (3 * 256 * 256 * 1152 + 256 * 1152 + 1152)


@pytest.mark.parametrize(("num_warps", "registers"), [(1, 255), (8, 255), (16, 128)])
def test_a_program_is_never_given_more_registers_than_there_are(num_warps: int, registers: int) -> None:
    """With 255 of them a thread, a program of 16 warps compiles and cannot be launched."""
    x = torch.empty(4, device="meta")
    with record_launches() as launches:
        launch(None, (1,), x, num_warps)
    assert launches[0].options["maxnreg"] == registers
