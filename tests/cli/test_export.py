"""dit-fast export: the averaged weights of a run, written by one rank or by several, for other programs."""

import multiprocessing
import os
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dit_fast.checkpoint.folder import Retention, model_config, write_checkpoint
from dit_fast.checkpoint.tensors import Piece
from dit_fast.cli import main
from dit_fast.interop import DIFFUSERS, ConvertedDiT, load_model
from dit_fast.models import DiT, load_weights
from tests.latent_sets import in_child
from tests.patience import PATIENCE
from tests.tolerance import assert_close


def build(fill: float) -> DiT:
    torch.manual_seed(0)
    model = DiT(8, 2, 4, hidden_size=16, depth=2, num_heads=2, num_classes=3).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(fill)
    return model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose averaged weights end in a bias of 2, its plain ones in a bias of 1."""
    model, average = build(1.0), build(2.0)
    states = {
        "model": model.state_dict(),
        "ema": average.state_dict(),
        "optimizer": {"exp_avg.x": torch.zeros(1)},
    }
    pieces = {
        part: {name: Piece(tensor, (0,) * tensor.ndim) for name, tensor in state.items()}
        for part, state in states.items()
    }
    manifest = {"step": 3, "train_config": {}, "data": {}}
    write_checkpoint(tmp_path / "run", model_config(model), pieces, 0, manifest, Retention())
    return tmp_path / "run"


def outputs(model: torch.nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([3, 999]), torch.tensor([0, 2])
    with torch.no_grad():
        return model(x, t, y)


@pytest.mark.parametrize(("weights", "fill"), [("ema", 2.0), ("model", 1.0)])
def test_safetensors_and_pt_hold_the_weights_asked_for(run, tmp_path, capsys, weights, fill) -> None:
    folder, file = tmp_path / "exported", tmp_path / "exported.pt"
    for arguments in (["--out", str(folder)], ["--out", str(file), "--format", "pt"]):
        assert main(["export", "--ckpt", str(run), "--weights", weights, *arguments]) == 0
    said = capsys.readouterr().out
    assert (
        f"wrote {folder}: {'EMA weights' if weights == 'ema' else 'raw weights (not EMA)'} at step 3" in said
    )
    expected = build(fill)
    assert torch.equal(outputs(DiT.from_pretrained(folder)), outputs(expected))
    state = torch.load(file, weights_only=True)
    assert list(state) == list(expected.state_dict())
    model = build(0.0)
    model.load_state_dict(state)
    assert torch.equal(outputs(model), outputs(expected))
    assert load_model(file, num_heads=2)[0].config == expected.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "exported.pt", "run"]


def test_diffusers_loads_its_folder(run, tmp_path, capsys) -> None:
    diffusers = pytest.importorskip("diffusers")
    assert main(["export", "--ckpt", str(run), "--out", str(tmp_path / "d"), "--format", "diffusers"]) == 0
    assert "its outputs differ by more than rounding" in capsys.readouterr().out
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "d").eval()
    draw = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([3, 999]), torch.tensor([0, 2])
    with torch.no_grad():
        got = theirs(x, timestep=t, class_labels=y).sample
    same = ConvertedDiT(**build(2.0).config, conventions=DIFFUSERS).eval()
    load_weights(same, build(2.0).state_dict(), "the model")
    assert_close(got, outputs(same))


def test_what_cannot_be_written(run, tmp_path, capsys) -> None:
    (tmp_path / "taken").mkdir()
    for arguments, message in (
        (["--out", str(tmp_path / "taken")], "taken exists already: give another, or remove it"),
        (["--out", str(tmp_path / "x.bin"), "--format", "pt"], "a file of --format pt is named *.pt"),
        (["--out", str(run / "checkpoints" / "step-0000003" / "config.json" / "x")], "give another --out"),
    ):
        assert main(["export", "--ckpt", str(run), *arguments]) == 1
        assert message in capsys.readouterr().err
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        status = main(["export", "--ckpt", str(run), "--out", str(tmp_path / "full")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert status == 1
    assert "cannot write" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["run", "taken"]


def test_two_processes_at_once_write_one_whole_folder(run, tmp_path, monkeypatch) -> None:
    """Both find the folder absent and write their files; one puts its folder in place, the other reports one error."""
    out = tmp_path / "both"
    barrier = multiprocessing.get_context("fork").Barrier(2)
    save = DiT.save_pretrained

    def save_and_wait(self, folder) -> None:
        save(self, folder)
        barrier.wait(PATIENCE)

    monkeypatch.setattr(DiT, "save_pretrained", save_and_wait)

    def export() -> None:
        descriptor = os.open(tmp_path / f"{os.getpid()}.err", os.O_CREAT | os.O_WRONLY)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w")
        status = main(["export", "--ckpt", str(run), "--out", str(out)])
        sys.stderr.flush()
        assert status == 0

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(in_child, [export, export])) == [0, 1]
    errors = [path.read_text() for path in tmp_path.glob("*.err")]
    assert sorted(map(len, errors))[0] == 0
    said = max(errors, key=len).splitlines()[0]
    assert (
        said == f"dit-fast: error: --out {out} was written by another process in the meantime; give another"
    )
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert_close(outputs(DiT.from_pretrained(out)), outputs(build(2.0)))
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".err") == ["both", "run"]
