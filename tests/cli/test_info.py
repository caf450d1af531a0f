"""`dit-fast info`: counts against PyTorch's, against memory that a real step holds, and against what is committed."""

import functools
import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_fast.cli import main
from dit_fast.model.backends import RECOMPUTE
from dit_fast.model.blocks import CONDITIONING
from dit_fast.model.cost import count, kept_bytes, table
from dit_fast.models import DiT

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SMALL = {"input_size": 16, "patch_size": 4, "in_channels": 3, "hidden_size": 48, "depth": 3, "num_heads": 6}


def info(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["info", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["info", *map(str, arguments)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("dit-fast: error: ")


# The paper's model


def test_the_largest_model_of_the_paper(capsys):
    found = json.loads(info(capsys, "DiT-XL/2", "--json"))
    assert found["parameters"] == 675_129_632
    assert found["fixed"] == 256 * 1152
    assert found["tokens"] == 256
    assert found["macs"] == pytest.approx(118.62e9, rel=1e-4)
    assert found["forward_flops"] == 2 * found["macs"]
    assert found["training_flops"] == 3 * found["forward_flops"]
    trained = 675_129_632 - 256 * 1152
    assert list(found["training_step"]["state_bytes"].values()) == [n * trained for n in (4, 4, 8, 4)]


def test_tokens_of_the_condition_are_told_apart(capsys):
    size = ("DiT-S/8", "--batch-size", 2)
    assert "16 tokens\n" in info(capsys, *size)
    assert "16 tokens, and 2 of the condition\n" in info(capsys, *size, "--conditioning", "in_context")
    captions = ("--conditioning", "cross_attention", "--caption-dim", 64, "--caption-tokens", 5)
    found = json.loads(info(capsys, *size, *captions, "--json"))
    assert (found["tokens"], found["condition_tokens"]) == (16, 1 + 5)


def test_the_row_of_table_4_at_512_pixels():
    """Its others, at 256 pixels, are in test_conditioning.py."""
    with torch.device("meta"):
        counts = count(DiT(input_size=64))
    assert counts.macs / 1e9 == pytest.approx(524.60, rel=5e-3)
    assert round(counts.trained / 1e6) == 675


def test_committed_table_is_what_the_command_prints(capsys, monkeypatch):
    counted = list(table())
    monkeypatch.setattr("dit_fast.cli.info.table", lambda: counted)
    assert (RESULTS / "table4.md").read_text() == info(capsys, "--table")
    assert (RESULTS / "table4.json").read_text() == info(capsys, "--table", "--json")
    rows = json.loads((RESULTS / "table4.json").read_text())
    assert len({(row["model"], row["conditioning"]) for row in rows}) == 12 * 4


# Against PyTorch


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mlp_ratio": 2.5, "learn_sigma": False, "patch_size": 2},
        {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True},
        {"positions": "learned", "num_classes": 0, "input_size": (8, 24)},
    ],
)
def test_macs_are_those_that_pytorch_counts_without_memory(conditioning, options):
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model = DiT(**{**SMALL, **options}, conditioning=conditioning, kernels="reference").eval()
        with torch.no_grad():
            model(
                torch.empty(1, 3, *model.x_embedder.img_size),
                torch.zeros(1),
                torch.zeros(1, dtype=torch.int64),
            )
    assert counter.get_total_flops() == count(model).forward_flops


@pytest.mark.parametrize(
    "options",
    [*({"conditioning": c} for c in CONDITIONING), {"mlp": "swiglu"}],
    ids=lambda o: next(iter(o.values())),
)
@pytest.mark.parametrize(("recompute", "precision"), [("none", "fp32"), ("cheap", "fp32"), ("cheap", "bf16")])
def test_kept_bytes_are_what_a_real_forward_pass_holds(options, recompute, precision):
    """To the byte in float32. Under autocast the CPU's attention keeps bfloat16 where CUDA's keeps float32: a row's
    log-sum-exp.
    """
    model = DiT(**SMALL, **options, kernels="triton", recompute=recompute).eval()
    held: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return held.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model(torch.randn(2, 3, 16, 16), torch.tensor([1, 2]), torch.tensor([3, 4]))
    real = sum(held[place].untyped_storage().nbytes() for place in held.keys() - own)
    exactly = pytest.approx(real, rel=0 if precision == "fp32" else 5e-3)
    assert kept(precision, **options)[recompute] == exactly


@functools.cache
def kept(precision: str, **options: str) -> dict[str, int]:
    return kept_bytes(DiT(**SMALL, **options).config, 2, precision=precision)


def test_kept_bytes_agree_with_what_the_compiler_keeps():
    """`benchmarks.analysis.traffic --memory` reads what it takes off the compiled backward pass: within a percent."""
    measured = json.loads((RESULTS / "memory.json").read_text())["memory"]
    with torch.device("meta"):
        config = DiT().config
    kept = kept_bytes(config, 256)
    for recompute, name in (
        ("none", "autocast: dit_fast, defaults"),
        ("cheap", "autocast: least memory, standalone GELU"),
    ):
        assert kept[recompute] == pytest.approx(measured[name]["blocks"] + measured[name]["around"], rel=0.01)


def test_memory_grows_with_batch_and_falls_with_what_is_made_again():
    with torch.device("meta"):
        config = DiT(**SMALL).config
    small, large = (kept_bytes(config, batch, precision="fp32") for batch in (8, 16))
    assert small.keys() == set(RECOMPUTE)
    assert small["none"] > small["cheap"] > small["blocks"]
    assert all(large[what] == pytest.approx(2 * small[what], rel=0.01) for what in RECOMPUTE)
    assert kept_bytes(config, 8, residual="bf16")["none"] < small["none"]


# Other models, and what is refused


def test_options_and_checkpoints_describe_a_model(tmp_path, capsys):
    options = ("--hidden-size", 48, "--depth", 3, "--num-heads", 6, "--patch-size", 4, "--num-classes", 7)
    built = json.loads(
        info(capsys, *options, "--input-size", 16, "--in-channels", 3, "--batch-size", 2, "--json")
    )
    model = DiT(**SMALL, num_classes=7)
    assert f"{model.macs() / 1e9:.4g} GMAC an image" in info(
        capsys, *options, "--input-size", 16, "--in-channels", 3
    )
    assert built["parameters"] == sum(p.numel() for p in model.parameters())
    assert built["macs"] == model.macs()
    assert built["config"] == model.config
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads(info(capsys, tmp_path / "saved", "--batch-size", 2, "--json"))
    assert {**saved, "model": ""} == {**built, "model": ""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DiT-XL/3"], "--model DiT-XL/3 is unknown; nearest: DiT-XL/2"),
        (["DiT-S/2", "--model", "DiT-B/2"], "DiT-S/2 and --model DiT-B/2 both name the model: give one"),
        (["DiT-S/2", "--input-size", "31"], "image size 31 is not a multiple of the patch size 2"),
        (["DiT-S/2", "--num-heads", "7"], "hidden_size 384 is not a multiple of num_heads 7"),
        (["DiT-S/2", "--table"], "--table prints the models of the paper: remove DiT-S/2"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, capsys):
    assert refused(capsys, *arguments).startswith(message)


def test_a_checkpoint_takes_no_options(tmp_path, capsys):
    DiT(**SMALL).save_pretrained(tmp_path / "saved")
    assert "defines its own model: remove --depth" in refused(capsys, tmp_path / "saved", "--depth", 2)
