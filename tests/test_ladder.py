"""The ladder of training steps: what it times trains one and the same model, and what fails leaves no figure."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import ladder
from benchmarks.ladder import RUNGS, Result, Rung, check_losses, climb, main, table
from dit_fast.models import DiT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")
CPU = torch.device("cpu")
BY_NAME = {rung.name: rung for rung in RUNGS}


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    return DiT(input_size=8, hidden_size=32, depth=1, num_heads=2)


def test_rungs_train_the_same_model(model: DiT) -> None:
    rungs = [BY_NAME["plain fp32"], BY_NAME["ours, fp32"], BY_NAME["+ TF32"]]
    plain, ours, skipped = climb(model, rungs, batch=32, repeats=2, device=CPU, say=lambda text: None)
    assert plain.failed is None
    assert ours.failed is None
    assert skipped.failed == "needs a CUDA device"
    assert ours.first_losses[0] == pytest.approx(plain.first_losses[0], rel=0.1)
    assert plain.images_per_second == pytest.approx(32e3 / plain.median_ms)
    assert (plain.mfu, plain.peak_memory_gb, plain.launches) == (None, None, None)


def test_a_rung_that_fails_has_no_figure(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory: 1 GB\nlong story")

    monkeypatch.setattr(ladder, "our_step", fail)
    said: list[str] = []
    plain, ours = climb(model, [BY_NAME["plain fp32"], BY_NAME["ours"]], 4, 2, CPU, said.append)
    assert ours == Result("ours", 4, failed="out of memory: 1 GB")
    assert plain.median_ms is not None
    assert said.count("ours: out of memory: 1 GB") == 1


@pytest.mark.parametrize("loss", [2.0, float("nan")])
def test_another_model_is_refused(loss: float) -> None:
    results = check_losses(
        [Result("a", 1, 5.0, first_losses=(1.0,)), Result("b", 1, 1.0, first_losses=(loss,))]
    )
    assert results[0].median_ms == 5.0
    assert results[1].median_ms is None
    assert "first loss" in results[1].failed


def test_table_is_relative_to_the_compiled_plain_step() -> None:
    found = table([
        Result("+ torch.compile", 8, 20.0, 19.0, 21.0, 400.0, 0.2, 30.0, 900),
        Result("ours", 8, 16.0, 15.0, 17.0, 500.0, 0.25, 25.0, 500),
        Result("ours + fp8", 8, failed="no torchao"),
    ]).splitlines()  # fmt: skip
    assert found[2].startswith("| + torch.compile | 8 | 20.0 | 19.0 - 21.0 | 400.0 | 1.00 | 20.0%")
    assert "| 500.0 | 1.25 | 25.0% | 25.0 | 500 |" in found[3]
    assert found[4].startswith("| ours + fp8 | 8 | no torchao |")


def test_plain_attention_without_sdpa_is_step_by_step(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    kernel = ladder.sdpa_kernel
    monkeypatch.setattr(ladder, "sdpa_kernel", lambda kind: asked.append(kind) or kernel(kind))
    x, y = torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
    ladder.plain_step(model, Rung("a"), CPU)(x, y)
    assert asked == [ladder.SDPBackend.MATH]
    ladder.plain_step(model, Rung("b", sdpa=True), CPU)(x, y)
    assert len(asked) == 1


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: DiT, monkeypatch) -> None:
    monkeypatch.setattr(ladder, "random_model", lambda name, size: model)
    out = tmp_path / "deep" / "ladder.json"
    assert main(["--only", "plain fp32", "--batch", "2", "--repeats", "2", "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert [row["rung"] for row in data["results"]] == ["plain fp32"]
    assert data["environment"]["torch"] == torch.__version__
    assert "| plain fp32 | 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "DiT-S/2", "--image-size", "100"])
