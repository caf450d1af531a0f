"""Runs that start from weights: what is kept, drawn, regridded and frozen."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_fast.cli import main
from dit_fast.data import ImageSet, from_arrays
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.interop import DIFFUSERS, load_model, save_diffusers
from dit_fast.models import DiT
from dit_fast.training import TrainConfig, Trainer, resume, train
from dit_fast.training import run as training_run
from dit_fast.training.config import build_model
from dit_fast.training.initial import freeze, read_initial
from tests.small_models import small_model
from tests.tolerance import assert_trained_alike

SIZES: dict[str, Any] = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2}
TABLE = "y_embedder.embedding_table.weight"


def images(classes: str = "abcde", size: int = 8, channels: int = 3) -> ImageSet:
    rng = np.random.default_rng(0)
    shape = (4 * len(classes), size, size) + (() if channels == 1 else (channels,))
    labels = np.arange(shape[0]) % len(classes)
    return from_arrays("set", rng.integers(0, 255, shape, dtype=np.uint8), labels, list(classes))


def config(path: Path | str | None, **changes: Any) -> TrainConfig:
    options = {"data": "set", **SIZES, "batch_size": 4, "lr": 1e-2, "device": "cpu", **changes}
    return TrainConfig(**options, init_from=path and str(path))


def start(path: Path, data: ImageSet, **changes: Any) -> Trainer:
    made = config(path, **changes)
    return Trainer(made, data, initial=read_initial(made, data))


def saved(folder: Path, **changes: Any) -> tuple[Path, DiT]:
    model = small_model(3, **{"depth": 2, "num_classes": 5, "in_channels": 3, **changes})
    model.save_pretrained(folder)
    return folder, model


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {
        name
        for name in one
        if one[name].shape != other[name].shape or not torch.equal(one[name], other[name])
    }


def fresh(data: ImageSet, **changes: Any) -> dict[str, Tensor]:
    made = config(None, **changes)
    torch.manual_seed(made.seed)
    return build_model(made, data).state_dict()


def lines(trainer: Trainer) -> str:
    assert trainer.origin is not None
    return "\n".join(trainer.origin["lines"])


def test_every_tensor_is_kept_and_the_average_starts_from_it(tmp_path):
    path, model = saved(tmp_path / "model")
    trainer = start(path, images())
    assert not differing(trainer.model.state_dict(), model.state_dict())
    assert "31 of 31 tensors kept" in lines(trainer)
    trainer.train_step(*trainer.stream.batch(0))
    before, after = model.state_dict(), trainer.ema_state()
    # Two parts of eleven are the average before the first step.
    now = trainer.model.state_dict()
    name = "blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(after[name], (2 * before[name] + 9 * now[name]) / 11)


def test_other_classes_are_drawn_with_the_seed(tmp_path):
    path, model = saved(tmp_path / "model")
    data = images("xyz")
    trainer = start(path, data, seed=7)
    state = trainer.model.state_dict()
    assert differing(state, model.state_dict()) == {TABLE}
    assert torch.equal(state[TABLE][:3], fresh(data, seed=7)[TABLE][:3])
    assert torch.equal(state[TABLE][3], model.state_dict()[TABLE][5])
    assert "label table: 0 of 3 classes kept, drawn: x, y, z; the null class is kept" in lines(trainer)


def run_folder(tmp_path: Path, monkeypatch, data: ImageSet, **changes: Any) -> Path:
    monkeypatch.setattr(training_run, "open_set", lambda config: data)
    return train(config(None, steps=2, **changes), tmp_path / "old").run


def test_classes_are_kept_by_name_and_by_map(tmp_path, monkeypatch, capsys):
    path = run_folder(tmp_path, monkeypatch, images("abcde"))
    old = load_model(path)[0].state_dict()[TABLE]
    data = images("exb")
    state = start(path, data, keep_classes="names").model.state_dict()[TABLE]
    drawn = fresh(data)[TABLE]
    assert torch.equal(state, torch.stack([old[4], drawn[1], old[1], old[5]]))
    assert "--keep-classes keeps b, e" in lines(start(path, data))
    renamed = tmp_path / "map.json"
    renamed.write_text(json.dumps({"x": "c", "b": 0}))
    state = start(path, data, keep_classes=str(renamed)).model.state_dict()[TABLE]
    assert torch.equal(state, old[[4, 2, 0, 5]])
    renamed.write_text(json.dumps({"w": "c"}))
    with pytest.raises(ConfigError, match="w: no such class in set, whose classes are e, x, b"):
        start(path, data, keep_classes=str(renamed))
    renamed.write_text(json.dumps({"x": "w"}))
    with pytest.raises(ConfigError, match=r"w: no such class in .*old, whose classes are a, b, c, d, e"):
        start(path, data, keep_classes=str(renamed))
    with pytest.raises(ConfigError, match=r"no class of set .x, y. is one of"):
        start(path, images("xy"), keep_classes="names")


def test_a_file_without_names_takes_numbers(tmp_path):
    path, model = saved(tmp_path / "model")
    with pytest.raises(ConfigError, match="does not record the names of its 5 classes"):
        start(path, images("xyz"), keep_classes="names")
    renamed = tmp_path / "map.json"
    renamed.write_text(json.dumps({"y": 4, "z": "0"}))
    state = start(path, images("xyz"), keep_classes=str(renamed)).model.state_dict()[TABLE]
    assert torch.equal(state[1:], model.state_dict()[TABLE][[4, 0, 5]])


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope"])
def test_another_resolution_regrids_the_positions(tmp_path, positions):
    path, _ = saved(tmp_path / "model", positions=positions)
    trainer = start(path, images(size=16), positions=positions)
    expected = load_model(path, input_size=16)[0].state_dict()
    assert not differing(trainer.model.state_dict(), expected)
    assert ("4x4 to 8x8" in lines(trainer)) == (positions != "rope")


def test_another_patch_size_and_other_channels_draw_the_patch_layers(tmp_path):
    path, model = saved(tmp_path / "model")
    for data, patch in ((images(), 4), (images(channels=1), 2)):
        trainer = start(path, data, patch_size=patch)
        state = trainer.model.state_dict()
        changed = differing(state, model.state_dict()) - {"pos_embed"}
        assert changed == {
            f"{layer}.{kind}"
            for layer in ("x_embedder.proj", "final_layer.linear")
            for kind in ("weight", "bias")
        }
        own = fresh(data, patch_size=patch)
        assert not {name for name in changed if not torch.equal(state[name], own[name])}
        assert "drawn: patch embedding and output layer" in lines(trainer)


def test_the_variance_is_drawn_or_left_out(tmp_path):
    path, model = saved(tmp_path / "model", learn_sigma=False)
    learned = start(path, images(), learn_sigma=True).model
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 500]), torch.tensor([0, 5])
    out = learned(x, t, y)
    torch.testing.assert_close(out[:, :3], model(x, t, y))
    assert not out[:, 3:].any()
    path, model = saved(tmp_path / "learned", learn_sigma=True)
    trainer = start(path, images(), objective="flow")
    torch.testing.assert_close(trainer.model(x, t, y), model(x, t, y)[:, :3])
    assert "objective diffusion to flow, prediction epsilon to velocity" in lines(trainer)


def test_an_unconditional_run_starts_as_the_null_class(tmp_path):
    path, model = saved(tmp_path / "model")
    trainer = start(path, images(), num_classes=0)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 500])
    torch.testing.assert_close(trainer.model(x, t), model(x, t, torch.tensor([5, 5])))
    assert "the null class, in the bias" in lines(trainer)


def test_weights_of_diffusers_and_of_train_py(tmp_path):
    model = small_model(3, depth=2, in_channels=3)
    save_diffusers(model, tmp_path / "diffusers", conventions=DIFFUSERS)
    trainer = start(tmp_path / "diffusers", images())
    assert not differing(trainer.model.state_dict(), model.state_dict())
    other = small_model(4, depth=2, in_channels=3)
    torch.save({"model": other.state_dict(), "ema": model.state_dict()}, tmp_path / "file.pt")
    for weights, expected in (("ema", model), ("model", other)):
        # The file does not record the number of heads, and the paper has no model of this size.
        state = start(tmp_path / "file.pt", images(), init_weights=weights).model.state_dict()
        assert not differing(state, expected.state_dict())


def test_another_architecture_is_refused_with_options_that_fit(tmp_path):
    path, _ = saved(tmp_path / "model", qk_norm=True)
    with pytest.raises(
        CheckpointError,
        match=r"depth is 2 there and 3 here, qk_norm is True there and False here; give --model DiT-S/2 "
        r"--hidden-size 32 --depth 2 --num-heads 2 --qk-norm$",
    ):
        start(path, images(), depth=3)


def test_options_without_init_from_are_refused():
    with pytest.raises(ConfigError, match="--keep-classes applies only to --init-from"):
        config(None, keep_classes="names")


def test_frozen_parameters_stay_and_resume(tmp_path, monkeypatch):
    data = images()
    monkeypatch.setattr(training_run, "open_set", lambda config: data)
    path, model = saved(tmp_path / "model")
    patterns = ("blocks.0", "*embedder.*")
    whole = train(config(path, steps=4, freeze=patterns), tmp_path / "whole")
    train(config(path, steps=2, freeze=patterns), tmp_path / "parts")
    # The resumed run does not read the checkpoint again.
    (path / "model.safetensors").unlink()
    parts = resume(tmp_path / "parts", {"steps": 4})
    state = {
        name: load_model(result.run, weights=name)[0].state_dict()
        for result in (parts,)
        for name in ("model", "ema")
    }
    assert not differing(state["model"], load_model(whole.run, weights="model")[0].state_dict())
    for found in state.values():
        trained = differing(found, model.state_dict())
        assert trained
        assert all(name.startswith(("blocks.1.", "final_layer.")) for name in trained)
    manifest = json.loads((parts.checkpoint / "manifest.json").read_text())
    assert manifest["init_from"]["path"] == str(path)
    assert manifest["init_from"] == json.loads((whole.checkpoint / "manifest.json").read_text())["init_from"]


def test_patterns_that_match_nothing_or_everything_are_refused():
    model = small_model()
    with pytest.raises(
        ConfigError, match=r"--freeze blocks\.7 matches no parameter; the closest are blocks\.0"
    ):
        freeze(model, ["x_embedder", "blocks.7"])
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(model, ["*"])


def test_a_repeated_flag_adds_patterns(tmp_path, capsys):
    path, _ = saved(tmp_path / "model", in_channels=1, num_classes=10)
    arguments = ["train", "--data", "digits", "--init-from", str(path), "--out", str(tmp_path / "run")]
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    patterns = ["--freeze", "blocks", "x_embedder", "--freeze", "nothing"]
    assert main([*arguments, *sizes, *patterns]) != 0
    assert "--freeze nothing matches no parameter" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def reference_training(made: TrainConfig, data: ImageSet, steps: int) -> tuple[DiT, dict[str, Tensor], Any]:
    """Steps with torch.optim.AdamW over all parameters, as DiT's train.py makes them, on the draws of `Trainer`."""
    torch.manual_seed(1)
    model = small_model(3, depth=2, in_channels=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=made.lr, weight_decay=0)
    ema = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(made, data)
    for step in range(steps):
        trainer.state.step.fill_(step)
        x, t, noise, y, _ = trainer.work.draw(*trainer.stream.batch(step))
        batch = trainer.objective.add_noise(x, t, noise)
        loss = trainer.objective.loss(model(batch.x_t, batch.model_t, y), batch)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(made.ema_decay, (1 + step + 1) / (10 + step + 1))
        for name, tensor in model.state_dict().items():
            ema[name].lerp_(tensor, 1 - decay)
    return model, ema, optimizer


@pytest.mark.parametrize("optimizer", ["adamw_ema", "torch"])
def test_a_dictionary_of_train_py_continues_as_if_never_interrupted(tmp_path, optimizer):
    data = images()
    made = config(None, steps=8, ema_decay=0.9)
    model, ema, past = reference_training(made, data, 4)
    content = {
        "model": model.state_dict(),
        "ema": ema,
        "opt": past.state_dict(),
        "args": argparse.Namespace(lr=1e-2),
    }
    torch.save(content, tmp_path / "0000004.pt")
    trainer = start(
        tmp_path / "0000004.pt", data, steps=8, ema_decay=0.9, init_optimizer=True, optimizer=optimizer
    )
    assert (trainer.step, trainer.total_steps) == (4, 8)
    assert "continuing at step 4" in lines(trainer)
    while trainer.step < trainer.total_steps:
        trainer.train_step(*trainer.stream.batch(trainer.step))
    model, ema, _ = reference_training(made, data, 8)
    assert_trained_alike(trainer.model.state_dict(), model.state_dict(), 3e-2)
    assert_trained_alike(trainer.ema_state(), ema, 3e-2)


def test_a_dictionary_of_sit_continues_without_its_unused_channels(tmp_path):
    data = images()
    model, ema, past = reference_training(config(None, steps=8), data, 2)
    arguments = argparse.Namespace(path_type="Linear", prediction="velocity")
    content = {"model": model.state_dict(), "ema": ema, "opt": past.state_dict(), "args": arguments}
    torch.save(content, tmp_path / "0000002.pt")
    trainer = start(tmp_path / "0000002.pt", data, steps=8, init_optimizer=True, objective="flow")
    name = "final_layer.linear.weight"
    assert "changed" not in lines(trainer).replace("changed: lr", "")
    rows = past.state_dict()["state"][list(model.state_dict()).index(name)]["exp_avg"].unflatten(0, (4, 6))
    assert torch.equal(trainer.optimizer_state()[f"exp_avg.{name}"], rows[:, :3].flatten(0, 1))
    assert torch.equal(trainer.ema_state()[name], ema[name].unflatten(0, (4, 6))[:, :3].flatten(0, 1))
    trainer.train_step(*trainer.stream.batch(2))


def test_what_cannot_be_continued_is_refused(tmp_path):
    data = images()
    model, ema, past = reference_training(config(None, steps=8), data, 1)
    content = {"model": model.state_dict(), "ema": ema, "opt": past.state_dict()}
    file = tmp_path / "file.pt"
    torch.save(content, file)
    for changes, message in (
        ({"steps": 1}, r"--steps 1: .*file.pt has 1 steps already; give more"),
        ({"patch_size": 4}, "has other parameters in x_embedder.proj.weight.*drawn: patch embedding"),
        ({"ema_snapshot_every": 2}, "--ema-snapshot-every averages all steps"),
    ):
        with pytest.raises(ConfigError, match=message):
            start(file, data, **{"steps": 8, "init_optimizer": True, **changes})
    with pytest.raises(
        ConfigError, match=r"has other parameters in y_embedder.*label table: 0 of 3 classes kept"
    ):
        start(file, images("xyz"), steps=8, init_optimizer=True)
    content["opt"]["state"][1], content["opt"]["state"][2] = (content["opt"]["state"][n] for n in (2, 1))
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="the order of the parameters is not that of the model"):
        start(file, data, steps=8, init_optimizer=True)
    torch.save(model.state_dict(), file)
    with pytest.raises(CheckpointError, match=r"needs the dictionary of a train.py, with model, ema and opt"):
        start(file, data, steps=8, init_optimizer=True)


def test_the_recipe_changes_on_resume_and_the_log_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_run, "open_set", lambda config: images())
    run = train(config(None, steps=3, log_every=1), tmp_path / "run").run
    changes = {"steps": 6, "lr": 1e-3, "lr_schedule": "cosine", "weight_decay": 0.1}
    resume(run, changes)
    assert "after step 3: --lr 0.01 is now 0.001" in capsys.readouterr().out
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 3, 4, 5, 6]
    assert log[3]["changed"] == {
        "steps": [3, 6], "lr": [0.01, 0.001], "lr_schedule": ["constant", "cosine"], "weight_decay": [0.0, 0.1]
    }  # fmt: skip
    assert [line["lr"] for line in log if "lr" in line][3:] == pytest.approx(
        [5e-4, 2.5e-4, 6.699e-5], rel=1e-3
    )
    # Written in the checkpoint: the next resumption has nothing new to report.
    resume(run, {"steps": 7})
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["changed"] for line in log if "changed" in line][1:] == [{"steps": [6, 7]}]
    for options, message in (
        ({"warmup_steps": 2}, "--warmup-steps 2: .* has 7 steps, its warmup is over"),
        ({"class_dropout_prob": 0.0}, "--class-dropout-prob is 0.1 there and 0.0 here: .* has a null class"),
        ({"batch_size": 8}, "--batch-size is 4 there and 8 here"),
        ({"freeze": ("blocks",)}, "--freeze is .. there and .'blocks',. here"),
        ({"init_from": "other"}, "--init-from is None there and other here"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resume(run, {"steps": 9, **options})
