"""The training step and loop: numbers, exact resumption, and what stops a run."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_fast.checkpoint import folder as checkpoint
from dit_fast.checkpoint import writer as checkpoint_writer
from dit_fast.data import ImageSet, from_arrays
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError, OutputError
from dit_fast.models import DiT
from dit_fast.training import TrainConfig, Trainer, load_checkpoint, resume, train
from dit_fast.training import run as training_run
from dit_fast.training.config import build_model, resumed_config
from dit_fast.training.log import LineFile, plot_loss, read_log
from dit_fast.training.step import TrainStep
from dit_fast.utils import keyed
from tests.tolerance import assert_close, assert_trained_alike

TINY = dict(
    data="set", hidden_size=16, depth=1, num_heads=2, patch_size=4, batch_size=4, lr=1e-2, ema_decay=0.9
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def image_set(**kwargs: Any) -> ImageSet:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (20, 8, 8), dtype=np.uint8)
    return from_arrays("set", images, np.arange(20) % 2, ["a", "b"], **kwargs)


@pytest.fixture
def data(monkeypatch) -> ImageSet:
    opened = image_set()
    monkeypatch.setattr(training_run, "open_set", lambda config: opened)
    return opened


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, **changes})


def state(path: Path) -> dict[str, Tensor]:
    loaded = load_checkpoint(path)
    parts = {"model": loaded.model, "ema": loaded.ema, "optimizer": loaded.optimizer}
    # Loaded tensors are views of the mapped file, which some tests then damage.
    return {
        f"{part}.{name}": tensor.clone()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_step_is_the_plain_recipe(learn_sigma):
    """Three steps against AdamW on the same draws, written out with PyTorch alone."""
    data, options = image_set(), tiny(learn_sigma=learn_sigma, seed=5)
    trainer = Trainer(options, data)
    torch.manual_seed(5)
    model = build_model(options, data).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    diffusion = create_diffusion("", learn_sigma=learn_sigma)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for step in range(3):
        images, labels = trainer.stream.batch(step)
        trainer.train_step(images, labels)
        numbers = torch.arange(4 * step, 4 * step + 4)
        t = keyed.integers(keyed.key(5, "timestep"), numbers, 1000)
        noise = keyed.normal(keyed.key(5, "noise"), numbers, (1, 8, 8))
        dropped = keyed.uniform(keyed.key(5, "label drop"), numbers) < 0.1
        y = torch.where(dropped, 2, labels)
        loss = diffusion.training_losses(model, images, t, {"y": y}, noise)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        decay = min(0.9, (1 + step + 1) / (10 + step + 1))
        for name, p in model.named_parameters():
            ema[name] = decay * ema[name] + (1 - decay) * p.detach()
    assert_trained_alike(dict(trainer.model.named_parameters()), dict(model.named_parameters()), 3e-2)
    assert_trained_alike(trainer.ema_state(), ema, 3e-2)
    assert_close([value.loss for value in trainer.values()], losses)
    assert trainer.values() == []


def test_steps_touch_no_global_generator():
    trainer = Trainer(tiny(), image_set())
    before = torch.get_rng_state()
    trainer.train_step(*trainer.stream.batch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_are_dropped_at_the_rate_asked_for():
    trainer = Trainer(tiny(class_dropout_prob=0.25, batch_size=20), image_set())
    seen = []
    trainer.model.y_embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for step in range(60):
        trainer.train_step(*trainer.stream.batch(step))
    labels = torch.cat(seen)
    assert (labels == 2).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert set(labels.unique().tolist()) == {0, 1, 2}
    whole = Trainer(tiny(class_dropout_prob=0.0), image_set())
    whole.train_step(*whole.stream.batch(0))
    assert whole.model.y_embedder.embedding_table.num_embeddings == 2


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(data, tmp_path):
    whole = train(tiny(steps=6, log_every=1), tmp_path / "whole")
    train(tiny(steps=3, log_every=1), tmp_path / "parts")
    resumed = resume(tmp_path / "parts", {"steps": 6})
    assert (whole.step, resumed.step, whole.stopped_by) == (6, 6, None)
    assert_equal_states(state(whole.checkpoint), state(resumed.checkpoint))
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "mse", "vb", "grad_norm"):
        assert [line[key] for line in logs[0]] == [line[key] for line in logs[1]]
    other = train(tiny(steps=6, seed=1), tmp_path / "other")
    assert not torch.equal(state(other.checkpoint)["model.final_layer.linear.weight"],
                           state(whole.checkpoint)["model.final_layer.linear.weight"])  # fmt: skip


def test_resuming_from_an_earlier_step_drops_later_log_lines(data, tmp_path):
    first = train(tiny(steps=6, log_every=1, ckpt_every=3, keep_checkpoints=0), tmp_path / "run")
    expected = state(first.checkpoint)
    (first.checkpoint / "model.safetensors").write_bytes(b"damaged")
    resumed = resume(tmp_path / "run", {})
    assert_equal_states(state(resumed.checkpoint), expected)
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_non_finite_step_makes_no_update(bad, at_once):
    trainer = Trainer(tiny(), image_set())
    trainer.checks_every_step = at_once
    for step in range(2):
        trainer.train_step(*trainer.stream.batch(step))
    tensors = {**trainer.model.state_dict(), **trainer.optimizer_state()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    averages = {name: tensor.clone() for name, tensor in trainer.ema_state().items()}

    images, labels = trainer.stream.batch(2)
    if bad == "loss":
        images[0, 0, 0, 0] = float("nan")
    else:
        trainer.model.final_layer.linear.bias.register_hook(lambda gradient: gradient * float("inf"))
    if at_once:
        with pytest.raises(NonFiniteError, match="step 3: "):
            trainer.train_step(images, labels)
    else:
        # On the device the flag is read later: steps in between must not move anything either.
        trainer.train_step(images, labels)
        trainer.train_step(*trainer.stream.batch(3))
        with pytest.raises(NonFiniteError, match="step 3: "):
            trainer.check_finite()
    after = {**trainer.model.state_dict(), **trainer.optimizer_state()}
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert_equal_states(averages, trainer.ema_state())
    with pytest.raises(NonFiniteError, match="step 3: "):
        trainer.save(Path("unused"))


def test_a_non_finite_run_keeps_its_last_checkpoint(data, tmp_path, monkeypatch):
    draw = TrainStep.draw

    def poisoned(self, images, labels):
        images, t, noise, *rest = draw(self, images, labels)
        return images, t, noise * float("nan") if int(self.state.step) == 4 else noise, *rest

    monkeypatch.setattr(TrainStep, "draw", poisoned)
    with pytest.raises(NonFiniteError, match="step 5: the loss or the gradient norm is not finite"):
        train(tiny(steps=8, ckpt_every=2), tmp_path / "run")
    folders = checkpoint.step_folders(tmp_path / "run")
    assert [path.name for path in folders] == ["step-0000002", "step-0000004"]
    assert all(tensor.isfinite().all() for tensor in state(folders[-1]).values())


def test_training_lowers_the_loss(data, tmp_path):
    train(tiny(steps=120, log_every=20, batch_size=16), tmp_path / "run")
    losses = [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert len(losses) == 6
    assert 0.5 < losses[0] < 1.1, "an untrained model predicts no noise: its mean squared error is near 1"
    assert losses[-1] < 0.6 * losses[0]


def test_the_log_and_manifest_say_what_happened(data, tmp_path, capsys):
    result = train(tiny(steps=5, log_every=2, seed=9), tmp_path / "run")
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        assert_close(line["loss"], line["mse"] + line["vb"])
        assert line["lr"] == 1e-2
        assert line["images_per_second"] > 0
        assert line["grad_norm"] > 0
        assert line["mfu"] is None
        assert 0 <= line["data_wait"] <= 1
        assert line["peak_memory"] > 1 << 20
        assert (len(line["loss_by_timestep"]), line["skipped"], line["loss_scale"]) == (4, 0, 1.0)
    assert lines[0]["seconds"] < lines[1]["seconds"] < lines[2]["seconds"]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in printed] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "img/s" in printed[0]
    assert printed[-1].endswith("0:00:00 left")

    manifest = checkpoint.read_manifest(result.checkpoint)
    assert (manifest["step"], manifest["samples_seen"], manifest["seed"]) == (5, 20, 9)
    assert manifest["class_names"] == ["a", "b"]
    assert manifest["data"] == data.describe()
    assert manifest["diffusion"] == {
        "objective": "diffusion",
        "prediction": "epsilon",
        "noise_schedule": "linear",
        "learn_sigma": True,
        "learned_range": True,
        "sigma_small": False,
        "use_kl": False,
        "rescale_learned_sigmas": True,
        "min_snr_gamma": None,
        "diffusion_steps": 1000,
    }
    assert TrainConfig(**manifest["train_config"]) == tiny(steps=5, log_every=2, seed=9, precision="fp32")
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_cut_short_by_a_kill_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert [line["step"] for line in read_log(path)] == [1, 2]
    LineFile(path, lambda line: line["step"] <= 1).reduce()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


def test_without_matplotlib_the_run_is_whole(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = train(tiny(steps=2), tmp_path / "run")
    assert "[plot]'" in caplog.text
    assert load_checkpoint(result.checkpoint).step == 2
    monkeypatch.undo()
    plot_loss(tmp_path / "run" / "log.jsonl", tmp_path / "again.png")


def test_epochs_set_the_length(data, tmp_path):
    assert tiny(epochs=3).total_steps(20) == 15
    assert tiny(epochs=1, batch_size=8).total_steps(20) == 3
    assert tiny().total_steps(20) == 400_000
    assert train(tiny(epochs=1), tmp_path / "run").step == 5
    assert resume(tmp_path / "run", {"epochs": 2}).step == 10


def test_a_finished_run_stays_as_it_is(data, tmp_path):
    train(tiny(steps=2), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for asked in ({}, {"steps": 2}, {"steps": 1}):
        result = resume(tmp_path / "run", asked)
        assert (result.was_finished, result.step, result.stopped_by) == (True, 2, None)
        assert load_checkpoint(result.checkpoint).step == 2
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == before
    assert not resume(tmp_path / "run", {"steps": 3}).was_finished


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "DiT-S/3"}, "--model DiT-S/3 is unknown; nearest: .*DiT-S/2"),
        ({"model": "dit-xl2"}, "nearest: .*DiT-XL/2"),
        ({"lr": 0.0}, "--lr 0.0: give a number above 0, up to"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"batch_size": 0}, "--batch-size 0: give a whole number from 1 to"),
        ({"class_dropout_prob": 1.0}, "--class-dropout-prob 1.0: give a number from 0, below 1"),
        ({"ema_decay": 1.5}, "--ema-decay 1.5"),
        ({"precision": "int8"}, "--precision 'int8': give one of auto, bf16, fp16, fp32, tf32, fp8"),
        (
            {"residual": "bf16", "precision": "fp32"},
            "--residual bf16 goes with --precision bf16 or fp8, not fp32",
        ),
        ({"accumulate": 3}, "--batch-size 4 does not divide into --accumulate 3"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm 0.0: give a number above 0"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0: give a number from 0"),
        ({"lr_schedule": "linear"}, "--lr-schedule 'linear': give one of constant, cosine"),
        ({"optimizer": "sgd"}, "--optimizer 'sgd': give one of adamw_ema, torch, apex"),
        ({"keep_checkpoints": 1}, "--keep-checkpoints 1: give 0 or a whole number from 2"),
        ({"steps": 5, "epochs": 5}, "both set the length"),
        ({"noise_schedule": "cosine"}, "--noise-schedule 'cosine': give one of linear, squaredcos_cap_v2"),
        ({"seed": -1}, "--seed -1"),
        ({"depth": 10**9}, "--depth 1000000000: give a whole number from 1 to 4096"),
        ({"hidden_size": 10**9}, "--hidden-size 1000000000: give a whole number from 1 to 65536"),
        ({"diffusion_steps": 10**9}, "--diffusion-steps 1000000000: give a whole number from 1 to 1048576"),
    ],
)
def test_options_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_sizes_that_do_not_fit(data, tmp_path):
    with pytest.raises(
        ConfigError, match="image size 8 is not a multiple of the patch size 3; give --image-size 9"
    ):
        train(tiny(patch_size=3), tmp_path / "run")
    with pytest.raises(ConfigError, match="hidden_size 16 is not a multiple of num_heads 3"):
        train(tiny(num_heads=3), tmp_path / "run")
    with pytest.raises(DataError, match="give --batch-size 20 or less"):
        train(tiny(batch_size=21), tmp_path / "run")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cuda: this PyTorch sees no CUDA device"):
            train(tiny(device="cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing is written for a run that cannot start"


def test_a_folder_that_holds_a_run_is_left_alone(data, tmp_path):
    train(tiny(steps=1), tmp_path / "run")
    # Not those of folders: the lock comes and goes.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        OutputError, match=r"already holds a run; continue it with --resume .* or give another --out"
    ):
        train(tiny(steps=1), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_output_path_that_takes_no_files(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        OutputError, match=r"cannot write to .*file/run/checkpoints \(Not a directory\); choose another"
    ):
        train(tiny(steps=1), tmp_path / "file" / "run")


def test_a_full_disk_is_found_before_the_first_step(data, tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=10 << 10))
    with pytest.raises(OutputError, match=r"\d\.\d MiB needed, 0\.0 MiB free"):
        train(tiny(steps=1), tmp_path / "run")
    assert read_log(tmp_path / "run" / "log.jsonl") == []


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(data, tmp_path, monkeypatch, caplog):
    write, failed = checkpoint_writer.write_checkpoint, []

    def full_at_step_two(run, config, pieces, needed, manifest, *rest):
        if manifest["step"] == 2:
            failed.append(2)
            raise OutputError("no space")
        return write(run, config, pieces, needed, manifest, *rest)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", full_at_step_two)
    with caplog.at_level(logging.WARNING):
        result = train(tiny(steps=4, ckpt_every=1, keep_checkpoints=0), tmp_path / "run")
    assert failed == [2]
    assert "no space; training continues" in caplog.text
    assert [path.name[-1] for path in checkpoint.step_folders(tmp_path / "run")] == ["1", "3", "4"]
    assert result.step == 4


def test_resumption_refuses_another_recipe_or_data(data, tmp_path, monkeypatch):
    train(tiny(steps=2), tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        resume(tmp_path / "run", {"depth": 2, "seed": 7, "steps": 4, "log_every": 1})
    message = str(caught.value)
    assert "--depth is 1 there and 2 here" in message
    assert "--seed is 0 there and 7 here" in message
    assert "steps" not in message
    changed = image_set(holdout=0.2)
    monkeypatch.setattr(training_run, "open_set", lambda config: changed)
    with pytest.raises(
        CheckpointError, match=r"other data: num_train is 20 there and 16 here; num_heldout is 0 .*holdout"
    ):
        resume(tmp_path / "run", {"steps": 4})
    with pytest.raises(CheckpointError, match="no such run folder"):
        resume(tmp_path / "missing", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        resume(tmp_path / "empty", {})
    with pytest.raises(CheckpointError, match="options that this version does not know: _target_"):
        resumed_config({"data": "set", "_target_": "os.system"}, {}, "file")
    with pytest.raises(CheckpointError, match="options that cannot be: --lr 'fast': give a number"):
        resumed_config({"data": "set", "lr": "fast"}, {}, "file")


def test_a_run_that_is_older_than_an_option_goes_on_with_its_default():
    saved = {"data": "set", "steps": 2}
    assert resumed_config(saved, {"conditioning": "adaln_zero"}, "file").conditioning == "adaln_zero"
    with pytest.raises(CheckpointError, match="--conditioning is adaln_zero there and adaln here"):
        resumed_config(saved, {"conditioning": "adaln"}, "file")


def test_bf16_autocast_trains_float32_weights():
    trainer = Trainer(tiny(precision="bf16"), image_set())
    plain = Trainer(tiny(), image_set())
    for step in range(3):
        trainer.train_step(*trainer.stream.batch(step))
        plain.train_step(*plain.stream.batch(step))
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    low, full = (sum(value.loss for value in each.values()) for each in (trainer, plain))
    assert low == pytest.approx(full, rel=2e-2)
    assert low != full


def test_compilation_without_a_compiler_falls_back(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    trainer = Trainer(tiny(compile=True), image_set())
    assert "forward" not in vars(trainer.model.blocks[0])
    assert "no C++ compiler" in caplog.text
    trainer.train_step(*trainer.stream.batch(0))


def test_every_size_of_the_registry_is_reachable():
    model = build_model(TrainConfig(data="set", model="DiT-S/8"), image_set())
    assert isinstance(model, DiT)
    assert (model.patch_size, len(model.blocks), model.in_channels) == (8, 12, 1)
    assert model.y_embedder.num_classes == 2
