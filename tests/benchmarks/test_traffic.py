"""The traffic count: Inductor's and ours at a small shape, what the rules count, and what it says when it cannot."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dit_fast.kernels  # noqa: F401  (registers the operations)
from benchmarks.analysis.traffic import (
    MODES,
    SUPPORTED_TORCH,
    Pass,
    Program,
    Traffic,
    TrafficError,
    count,
    fake_cuda,
    memory,
    ours,
    prices,
    report,
)
from benchmarks.analysis.traffic.__main__ import PLAIN, SETTINGS, main, parse_settings
from benchmarks.models.plain_dit import PlainAttention, PlainBlock, PlainLightningBlock
from dit_fast.model.blocks import DiTBlock, Stream
from dit_fast.model.layers import Layout
from dit_fast.model.positions import rotary_angles
from tests.tolerance import assert_close

SMALL = {
    "batch": 256,
    "tokens": 256,
    "width": 128,
    "heads": 2,
}  # nothing is computed: the batch costs nothing
U = Program("", **SMALL).unit
SIDES = {
    "plain": Program("benchmarks.analysis.traffic.blocks:plain", **SMALL),
    "ours": Program(
        "benchmarks.analysis.traffic.blocks:dit_fast", {"attention": "triton"}, {"mlp": "triton"}, **SMALL
    ),
    "memory": Program(
        "benchmarks.analysis.traffic.blocks:dit_fast",
        {"attention": "triton", "mlp_epilogue": "triton", "recompute": "cheap"},
        **SMALL,
    ),
    "extra": Program("tests.benchmarks.test_traffic:with_extra_pass", **SMALL),
}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class DoubledAttention(PlainAttention):
    """Attention with an elementwise pass between two library calls, where nothing can be fused with it."""

    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(2 * out.transpose(1, 2).reshape(N, T, D))


def with_extra_pass(program: Program):
    """Factory of the negative control."""
    from benchmarks.analysis.traffic.blocks import chain

    def block() -> PlainBlock:
        made = PlainBlock(program.width, program.heads, 4.0)
        made.attn = DoubledAttention(program.width, program.heads)
        return made

    return chain(program, block, lazy=False)


@pytest.fixture(scope="module")
def counted() -> dict[str, Traffic]:
    """One block and two of each kind, and one with an extra pass, counted in one process."""
    if not torch.__version__.startswith(f"{SUPPORTED_TORCH}.") or torch.version.cuda is not None:
        pytest.skip(f"Inductor's internals are read as they are in torch {SUPPORTED_TORCH} for the CPU")
    wanted = [(side, blocks) for side in ("plain", "ours", "memory") for blocks in (1, 2)] + [("extra", 1)]
    programs = [Program(**{**vars(SIDES[side]), "blocks": blocks}) for side, blocks in wanted]
    mixing = Program("benchmarks.analysis.traffic.chains:noise_mixing", mode="autocast", **SMALL)
    chains = [mixing, Program(**{**vars(mixing), "compiled": False})]
    names = [f"{side}{blocks}" for side, blocks in wanted] + ["mixing", "mixing without a compiler"]
    return dict(zip(names, count([*programs, *chains]), strict=True))


@pytest.mark.slow
def test_inductor_and_ours(counted: dict[str, Traffic]) -> None:
    """Per block in bf16. Passes over tokens are whole numbers of U; vectors and partial sums add little to them.

    Inductor forward: 8 for the GELU, 5 + 4 for the norms with their residual additions, -1 for what the chain's first
    block does instead. Backward: bias gradients 1 + 1, GELU 12, norms 2 x (2 + 5 + 2), stacked d_qkv 6, its bias
    gradient 3. Ours: norms 2 x 4 and the saved pre-activation 4; backward norms 2 x 6 and the pre-activation 4; least
    memory makes two norm outputs (2 each) and the activation (4) again and keeps 2 + 4 less.
    """
    plain, fused = counted["plain2"] - counted["plain1"], counted["ours2"] - counted["ours1"]
    small = counted["memory2"] - counted["memory1"]
    # x, y, qkv, attention, branch, x, y, pre, act, branch: 1 + 1 + 3 + 1 + 1 + 1 + 1 + 4 + 4 + 1.
    for traffic, forward, backward, kept in ((plain, 16, 41, 18), (fused, 12, 16, 18), (small, 12, 24, 12)):
        whole = {"forward": 0, "backward": 0}
        for one, launches in traffic.passes.items():
            if one.moved:
                whole[one.phase] += launches * (round(one.read / U) + round(one.write / U))
        assert whole == {"forward": forward, "backward": backward}
        assert forward * U <= traffic.moved("forward") <= 1.05 * forward * U
        # In so narrow a model the partial sums over tokens are more of it than at D = 1152.
        assert backward * U <= traffic.moved("backward") <= 1.08 * backward * U
        library = ("gemm", "attention")
        assert (traffic.launches("forward", library), traffic.launches("backward", library)) == (5, 9)
        assert kept * U <= traffic.kept <= (kept + 0.2) * U
    assert (plain.launches("forward"), fused.launches("forward")) == (8, 7)


@pytest.mark.slow
def test_an_extra_pass_costs_exactly_its_bytes(counted: dict[str, Traffic]) -> None:
    """One pass more reads and writes one token tensor each way, and keeps its result."""
    difference = counted["extra1"] - counted["plain1"]
    assert (difference.moved("forward"), difference.moved("backward")) == (2 * U, 2 * U)
    assert (difference.launches("forward"), difference.launches("backward")) == (1, 1)
    assert difference.kept == U


@pytest.mark.slow
def test_chain_with_and_without_a_compiler(counted: dict[str, Traffic]) -> None:
    """x_t: two latents in, one out, in one kernel; or two products with a table's row and their sum, 2 + 2 + 3."""
    latent = 256 * 4 * 32 * 32 * 4
    for name, launches, latents in (("mixing", 1, 3), ("mixing without a compiler", 4, 7)):
        assert counted[name].launches() == counted[name].launches("forward") == launches
        assert latents * latent <= counted[name].moved() <= latents * latent + 2**17


@pytest.mark.slow
def test_the_caller_is_left_as_it_was(counted: dict[str, Traffic]) -> None:
    assert counted["plain1"].launches() > 0
    assert not torch.cuda.is_available()
    assert torch.cuda.get_device_properties.__module__ == "torch.cuda"


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def in_units(operation: str, *arguments: object) -> list[tuple[str, str, float, float]]:
    """What an operation launches, bytes as rounded multiples of U."""
    B, T, D = 32, 64, 128
    found = ours.launches(getattr(torch.ops.dit_fast, operation).default, arguments, {})
    unit = B * T * D * 2
    return [(kind, name, round(read / unit, 1), round(write / unit, 1)) for kind, name, read, write in found]


@pytest.mark.parametrize(
    ("epilogue", "moved"), [("separate", ("dit_fast", "gelu_fwd_kernel", 4, 4)), ("triton", None)]
)
def test_rules_count_what_a_product_moves_beside_it(epilogue: str, moved: tuple | None) -> None:
    """GELU of its own reads and writes 4 U each; in an epilogue only the saved pre-activation is extra, 4 U."""
    B, T, D = 32, 64, 128
    inputs = meta(B, T, D), meta(4 * D, D), meta(4 * D), meta(D, 4 * D), True, True, epilogue
    launches = in_units("mlp", *inputs)
    counted = [launch for launch in launches if launch[0] not in ("gemm", "attention")]
    assert counted == [moved or ("epilogue", "gemm_gelu_fwd_kernel", 0, 4)]
    assert sum(launch[0] == "gemm" for launch in launches) == 2


def test_launches_read_what_was_written_before() -> None:
    """Partial sums are written by the kernel, then read by PyTorch's sum; what the caller gives is read."""
    B, T, D = 32, 64, 128
    launches = in_units("gated_residual_backward", meta(B, T, D), meta(B, T, D), meta(B, D), meta(D))
    kind, name, read, write = launches[0]
    assert (kind, name, read) == ("dit_fast", "gated_residual_bwd_kernel", 2)
    assert write > 1
    names = [name for _, name, _, _ in launches[1:]]
    assert names == ["aten::sum.dim_IntList", "aten::_to_copy", "aten::sum.dim_IntList", "aten::_to_copy"]
    assert launches[1][2] > 0


def test_an_expanded_tensor_counts_its_elements_once() -> None:
    assert ours.tensor_bytes(meta(1, 8).expand(1000, 8)) == 16
    assert ours.tensor_bytes(meta(0, 8)) == 0
    assert ours.tensor_bytes(meta(4, 16)[:, :8]) == 64


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            "__version__ = '2.14.1+cpu'\ncuda = None\n",
            rf"torch 2\.14\.1\+cpu is installed.*{SUPPORTED_TORCH}",
        ),
        (f"__version__ = '{SUPPORTED_TORCH}.0+cu130'\ncuda = '13.0'\n", "built for CUDA"),
    ],
)
def test_another_torch_is_named(
    version: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(version)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(TrafficError, match=message):
        fake_cuda._torch_folder()


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_cuda.shutil, "which", lambda name: None)
    with pytest.raises(TrafficError, match=r"g\+\+ is not on PATH"):
        fake_cuda._library(Path(torch.__file__).parent)


def test_loading_after_torch_is_refused() -> None:
    with pytest.raises(TrafficError, match="imported already"):
        fake_cuda.load()


@pytest.mark.parametrize(
    ("factory", "mode", "message"),
    [
        ("benchmarks.analysis.traffic.blocks:absent", "bf16", "module:function"),
        ("benchmarks.analysis.traffic.blocks:plain", "fp8", "mode 'fp8': choose bf16, autocast, copies"),
    ],
)
def test_a_bad_program_is_one_line(factory: str, mode: str, message: str) -> None:
    with pytest.raises(TrafficError, match=message) as error:
        count([Program(factory, mode=mode, **SMALL)])
    assert "\n" not in str(error.value)


def committed(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("block", "moved", "kept"),
    [
        ("bf16: least traffic", 31, 18.3),
        ("bf16: least traffic, standalone GELU", 47, 18.3),
        ("autocast: least traffic", 41, 20.4),
        ("bf16: least memory", 41, 13),
    ],
)
def test_committed_figures_are_within_the_targets(block: str, moved: float, kept: float) -> None:
    """U per block, training, with the compiler's at least what it was measured to be: 61.1 and 79.4."""
    results = committed("traffic")
    counted = {name: Traffic.from_json(value) for name, value in results["blocks"].items()}
    assert counted[block].moved() <= moved * results["unit"]
    assert counted[block].kept <= kept * results["unit"]
    sums = [round(counted[f"{mode}: Inductor"].moved() / results["unit"], 1) for mode in ("bf16", "autocast")]
    assert sums == [61.1, 79.4]


def test_committed_figures_of_tangents_are_within_the_target() -> None:
    """Twice the forward pass, and what the backward pass of the values alone moves and keeps."""
    results = committed("traffic")
    counted = {name: Traffic.from_json(value) for name, value in results["blocks"].items()}
    for mode in MODES:
        plain, along = (
            counted[f"{mode}: {name}"] for name in ("least traffic, standalone GELU", "with tangents")
        )
        assert along.moved("forward") <= 2.1 * plain.moved("forward")
        assert along.moved("backward") == plain.moved("backward")
        assert along.kept == plain.kept


def test_committed_figures_of_lightningdit_s_block() -> None:
    """Its trunk in fused operations moves less than two thirds of what the compiler makes of it."""
    results = committed("traffic_lightningdit")
    moved = {name: Traffic.from_json(value).moved() for name, value in results["blocks"].items()}
    for mode in ("bf16", "autocast"):
        assert moved[f"{mode}: least traffic"] < 0.62 * moved[f"{mode}: Inductor"]
        assert moved[f"{mode}: dit_fast, defaults"] < 0.67 * moved[f"{mode}: Inductor"]


def test_the_plain_block_of_lightningdit_is_ours() -> None:
    """What is counted as the compiler's answers as our block does: of the same weights, within 1e-5."""
    torch.manual_seed(0)
    plain, block = PlainLightningBlock(24, 2), DiTBlock(24, 2, norm="rmsnorm", mlp="swiglu", qk_norm=True)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain.load_state_dict(block.state_dict())
    angles = rotary_angles((2, 3), 12)[None]
    rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
    x, c = torch.randn(2, 6, 24), torch.randn(2, 24)
    ours = block(Stream(x, layout=Layout(rotation)), c).add("reference")
    assert_close(plain(x, c, rotation), ours)


@pytest.mark.parametrize(("block", "file"), [("dit", "traffic"), ("lightningdit", "traffic_lightningdit")])
def test_committed_tables_are_those_of_the_committed_counts(block: str, file: str) -> None:
    """Every row of the table is made again from its counts, and the settings are those of the command."""
    results, table = committed(file), (RESULTS / f"{file}.md").read_text()
    ours = {words[0] for words in SETTINGS[block]}
    # The copies of the weights are ours alone, and were not counted for LightningDiT's block yet.
    modes = {"bf16": {"Inductor", *ours}, "autocast": {"Inductor", *ours}}
    if block == "dit":
        modes["copies"] = ours
    assert set(results["blocks"]) == {f"{mode}: {name}" for mode, names in modes.items() for name in names}
    for label, value in results["blocks"].items():
        mode, _, name = label.partition(": ")
        assert name in ("Inductor", *(words[0] for words in SETTINGS[block]))
        assert report.row(mode, name, Traffic.from_json(value), results["unit"]) in table


def test_committed_memory_fits_only_ours() -> None:
    """DiT-XL/2 at 256 px and batch 256 in bfloat16: 80 GB hold least memory, and not the compiled plain block."""
    found = committed("memory")["memory"]
    assert {label: row["fits"] for label, row in found.items() if label.startswith("bf16")} == {
        "bf16: Inductor": "no",
        "bf16: dit_fast, defaults": "no",
        "bf16: least traffic": "no",
        "bf16: least traffic, standalone GELU": "no",
        "bf16: least memory": "yes",
        "bf16: least memory, standalone GELU": "yes",
    }


def test_memory_adds_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks by the difference of two counts, layers around them of either model, 22 bytes for a parameter."""
    gemm = Pass("backward", "gemm", "mm", 5, 7)

    def counts(programs: list[Program]) -> list[Traffic]:
        def one(program: Program) -> Traffic:
            if program.factory.startswith(prices.MODULE):
                return Traffic(Counter(), kept=10 if "our_" in program.factory else 100)
            passes = {
                gemm: 2,
                Pass("forward", "gemm", "mm", 5, 9): 1,
                Pass("backward", "epilogue", "e", 0, 7): 1,
            }
            each = 1000 if program.settings else 3000
            return Traffic(Counter({p: n * program.blocks for p, n in passes.items()}), each * program.blocks)

        return [one(program) for program in programs]

    monkeypatch.setattr(memory, "count", counts)
    plain = Program(PLAIN["dit"], **SMALL)
    rows = memory.measure(plain, [("ours", Program("", {"recompute": "cheap"}, **SMALL))], ["bf16"], depth=3)
    held = 22 * memory.parameters(plain, 3)
    assert [(mode, name, found) for mode, name, _, found in rows] == [
        ("bf16", "Inductor", memory.Memory(9000, 600, held, 14)),
        ("bf16", "ours", memory.Memory(3000, 420, held, 14)),
    ]
    document, _ = memory.document(plain, rows, 3, "torch")
    assert f"| bf16 | ours | {1000 / U:.1f} | 0.0 |" in document
    with pytest.raises(TrafficError, match="--tokens 250: the memory of a model needs a square number"):
        memory.measure(Program(PLAIN["dit"], tokens=250), [], ["bf16"], 3)


def test_parameters_are_the_papers() -> None:
    """DiT-XL/2 without its frozen positions."""
    assert memory.parameters(Program(PLAIN["dit"]), 28) == 675_129_632 - 256 * 1152


@pytest.mark.parametrize(
    ("kept", "fits"), [(0, "yes"), (63 * 10**9, "yes"), (71 * 10**9, "open"), (75 * 10**9, "no")]
)
def test_what_fits_in_80_gb(kept: int, fits: str) -> None:
    """Yes by the upper bound and 80e9 bytes, no by the lower bound and 80 * 2^30."""
    assert memory.Memory(kept, 0, 11 * 10**9, 3 * 10**9).fits == fits


def test_settings_and_choices() -> None:
    words = ["least traffic", "attention=triton", "depth=3", "choice.mlp=triton"]
    assert parse_settings(words) == ("least traffic", {"attention": "triton", "depth": 3}, {"mlp": "triton"})
    with pytest.raises(SystemExit, match="error: --ours x: 'attention' is not key=value"):
        main(["--ours", "x", "attention"])
