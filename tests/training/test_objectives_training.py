"""Objectives in the training step, in checkpoints and on the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dit_fast.checkpoint.manifest import read_manifest
from dit_fast.cli import main
from dit_fast.diffusion import create_objective
from dit_fast.diffusion.timestep_sampler import LossHistory, TimestepSampling
from dit_fast.errors import ConfigError
from dit_fast.interop import load_model
from dit_fast.training import PRESETS, TrainConfig, find_checkpoint
from dit_fast.training.config import resumed_config
from dit_fast.training.step import TrainStep
from dit_fast.utils import keyed
from tests.tolerance import assert_close, assert_trained_alike
from tests.training.test_step import TINY, image_set, run, trainer, weights

IMPORTANCE: dict[str, Any] = {"timestep_sampling": "importance", "diffusion_steps": 25, "batch_size": 64}


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
@pytest.mark.parametrize("kind", ["uniform", "logit-normal"])
def test_timesteps_are_functions_of_seed_and_sample(objective, kind):
    process = create_objective(objective)
    index = torch.arange(40_000)
    t, importance = TimestepSampling(process, 3, kind).draw(index)
    assert importance is None
    places = t / 1000 if objective == "diffusion" else t
    assert 0 <= places.min() < 0.05 < 0.95 < places.max() <= 1
    part = TimestepSampling(process, 3, kind).draw(index[[7, 3, 9_999]])[0]
    assert torch.equal(part, t[[7, 3, 9_999]])
    assert not torch.equal(TimestepSampling(process, 4, kind).draw(index)[0], t)
    # Quartiles: of the uniform distribution 1/4 and 3/4, of the sigmoid of a normal value that of +-0.6745.
    expected = torch.tensor([0.25, 0.75]) if kind == "uniform" else torch.tensor([-0.6745, 0.6745]).sigmoid()
    found = torch.quantile(places.float(), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_uniform_timesteps_are_those_of_earlier_versions():
    index = torch.arange(100)
    expected = keyed.integers(keyed.key(3, "timestep"), index, 1000)
    assert torch.equal(TimestepSampling(create_objective(), 3).draw(index)[0], expected)


def test_importance_draws_follow_the_losses_and_leave_the_mean_alone():
    history = LossHistory(4, kept=2, uniform_prob=0.0)
    history.update(torch.arange(4).repeat(2), torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(2))
    t, importance = history.draw(keyed.uniform(0, torch.arange(20_000)))
    frequency = torch.bincount(t, minlength=4) / 20_000
    torch.testing.assert_close(frequency, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.012, rtol=0)
    values = torch.tensor([5.0, -1.0, 2.0, 10.0])
    assert (importance * values[t]).mean().item() == pytest.approx(4.0, abs=0.1)


def test_training_s_history_is_the_paper_s():
    """Nichol & Dhariwal 2021, section 3.3: ten losses of each timestep."""
    history = TimestepSampling(create_objective(), 0, "importance").history
    assert history.losses.shape == (1000 + 1, 10)
    assert history.uniform_prob == 0.001


def test_a_history_keeps_the_newest_losses_and_none_of_a_void_step():
    history = LossHistory(2, kept=3)
    history.update(torch.tensor([1, 0, 1, 1, 1, 1]), torch.tensor([1.0, 9.0, 2.0, 3.0, 4.0, 5.0]))
    assert sorted(history.losses[1].tolist()) == [3, 4, 5]
    assert history.counts.tolist() == [1, 5]
    kept = history.losses[:-1].clone()
    history.update(torch.tensor([0, 1]), torch.tensor([float("nan"), 7.0]), torch.tensor(False))
    assert torch.equal(history.losses[:-1], kept)
    assert history.counts.tolist() == [1, 5]
    history.update(torch.tensor([1]), torch.tensor([6.0]))
    assert sorted(history.losses[1].tolist()) == [4, 5, 6]


def test_importance_sampling_is_the_same_in_micro_batches_and_on_two_ranks():
    whole, cut = trainer(300, **IMPORTANCE), trainer(300, **IMPORTANCE, accumulate=4)
    for each in (whole, cut):
        run(each, 12)
    one, other = (each.timestep_sampling.history for each in (whole, cut))
    assert one.complete()
    assert torch.equal(one.counts, other.counts)
    assert_close(other.losses[:-1], one.losses[:-1], dtype=torch.float32)
    assert_trained_alike(cut.trained, whole.trained, 12 * TINY["lr"])
    # Each rank draws its rows from the history that all of them share.
    stored = whole.stream.stored(12)
    drawn = whole.work.draw(*stored)
    assert drawn[4].std() > 0.01
    for rows in (slice(0, 32), slice(32, 64)):
        work = whole.work
        share = TrainStep(
            work.model, work.optimizer, work.objective, work.options, work.state, torch.arange(64)[rows],
            timesteps=whole.timestep_sampling,
        ).draw(*whole.stream.stored(12, rows))  # fmt: skip
        assert all(torch.equal(a, b[rows]) for a, b in zip(share, drawn, strict=True))
    x, t, noise, y, importance = drawn
    losses = whole.objective.training_losses(whole.work.denoise, x, t, {"y": y}, noise=noise)["loss"]
    weight = whole.model.final_layer.linear.weight
    (gradient,) = torch.autograd.grad((importance * losses).mean(), weight)
    losses = losses.detach()
    run(whole, 1)
    assert_close(weight.grad, gradient, terms=4096)
    assert_close(whole.values()[-1].loss, float((importance * losses).mean()), terms=4096)
    # What it learns from is the loss itself; one of each timestep is its newest.
    newest = one.losses[t] - losses[:, None]
    assert (newest.abs().amin(dim=1) < 1e-4 * losses).all()


def test_the_history_of_importance_sampling_is_in_the_checkpoint(tmp_path):
    """Twelve steps, and six continued by six, are the same to the bit."""
    through, first = trainer(300, **IMPORTANCE), trainer(300, **IMPORTANCE)
    run(through, 12)
    run(first, 6)
    with first.writer(tmp_path) as writer:
        first.save(writer)
        path = writer.wait()
    again = trainer(300, **IMPORTANCE)
    again.restore(path, read_manifest(path))
    run(again, 6)
    assert torch.equal(again.timestep_sampling.history.counts, through.timestep_sampling.history.counts)
    assert torch.equal(
        again.timestep_sampling.history.losses[:-1], through.timestep_sampling.history.losses[:-1]
    )
    assert torch.equal(weights(again), weights(through))


@pytest.mark.parametrize(
    "options",
    [
        {"prediction": "v", "loss_weighting": "min-snr", "timestep_sampling": "logit-normal"},
        {"learn_sigma": False, "sigma_small": True, "prediction": "x0"},
        {"learned_range": False},
        {"use_kl": True},
        {"objective": "flow"},
        {"objective": "flow", "path": "gvp", "prediction": "epsilon", "loss_weighting": "velocity"},
        {"objective": "flow", "path": "vp", "prediction": "score", "loss_weighting": "likelihood"},
        {"objective": "flow", "prediction": "x0", "timestep_sampling": "logit-normal"},
        {"objective": "flow", "direction_loss": True},
    ],
)
def test_every_objective_takes_steps(options):
    each = trainer(batch_size=16, **options)
    before = weights(each)
    run(each, 2)
    values = each.values()
    assert all(0 < value.loss < 1e6 and value.applied == 1 for value in values)
    assert sum(values[0].bucket_counts) == 16
    assert len(each.drawn(1)["timesteps"]) == 16
    assert not torch.equal(weights(each), before)
    rebuilt = create_objective(**each.manifest()["diffusion"])
    assert rebuilt.prediction == each.objective.prediction


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"objective": "flow", "learn_sigma": True},
            "--learn-sigma True applies only to --objective diffusion",
        ),
        ({"objective": "flow", "use_kl": True}, "--use-kl True applies only to --objective diffusion"),
        (
            {"objective": "flow", "learned_range": False},
            "--learned-range False applies only to --objective diffusion",
        ),
        (
            {"learn_sigma": False, "learned_range": False},
            "--no-learned-range applies only to a learned variance",
        ),
        (
            {"objective": "flow", "noise_schedule": "squaredcos_cap_v2"},
            "--noise-schedule squaredcos_cap_v2 applies only to",
        ),
        (
            {"objective": "flow", "loss_weighting": "min-snr"},
            "--loss-weighting min-snr does not apply to --objective flow",
        ),
        ({"objective": "flow", "loss_weighting": "velocity"}, "a model of the velocity takes none"),
        ({"objective": "flow", "prediction": "v"}, "prediction 'v' is not of flow matching"),
        ({"objective": "flow", "timestep_sampling": "importance"}, "those of flow matching are continuous"),
        ({"objective": "flows"}, "--objective 'flows': give one of diffusion, flow"),
        ({"path": "vp"}, "--path vp applies only to --objective flow; remove it"),
        ({"direction_loss": True}, "--direction-loss True applies only to --objective flow; remove it"),
        (
            {"objective": "flow", "prediction": "x0", "direction_loss": True},
            "direction loss is of the velocity",
        ),
        ({"prediction": "velocity"}, "prediction 'velocity' does not apply to diffusion in discrete steps"),
        ({"prediction": "score"}, "prediction 'score' does not apply to diffusion in discrete steps"),
        ({"loss_weighting": "likelihood"}, "give none or min-snr"),
        ({"loss_weighting": "min-snr", "use_kl": True}, "the bound has its own weights"),
        (
            {"loss_weighting": "min-snr", "min_snr_gamma": -1.0},
            r"--min-snr-gamma -1\.0: give a number above 0",
        ),
        ({"sigma_small": True}, "give --no-learn-sigma too"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(options, line):
    with pytest.raises(ConfigError, match=line) as caught:
        TrainConfig(data="set", **options)
    assert "\n" not in str(caught.value)


def test_runs_of_before_prediction_was_an_option_go_on():
    saved = {"data": "set", "predict_xstart": True, "learn_sigma": True}
    assert resumed_config(saved, {}, "run").prediction == "x0"
    assert resumed_config({**saved, "predict_xstart": False}, {}, "run").prediction == "epsilon"
    assert TrainConfig(**PRESETS["demo"]).prediction == "x0"


@pytest.mark.parametrize("name", ["dit", "sit", "lightningdit"])
def test_published_recipes_train(name, tmp_path, monkeypatch):
    """Each on a tiny model; all else of the recipe is in the checkpoint."""
    monkeypatch.setattr("dit_fast.training.run.open_set", lambda config: image_set())
    sizes = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "batch_size": 8, "steps": 2}
    flags = [text for field, size in sizes.items() for text in (f"--{field.replace('_', '-')}", str(size))]
    run_of = ["--preset", name, "--data", "set", "--threads", "1", "--out", str(tmp_path / "run")]
    assert main(["train", *run_of, *flags]) == 0
    model, info = load_model(tmp_path / "run")
    saved = read_manifest(find_checkpoint(tmp_path / "run"))["train_config"]
    assert saved == {**saved, **PRESETS[name], **sizes}
    assert info.diffusion["objective"] == ("diffusion" if name == "dit" else "flow")
    assert model.learn_sigma is (name == "dit")
    assert model.options["positions"] == ("sincos_rope" if name == "lightningdit" else "sincos")


def test_the_documented_table_of_recipes_is_what_they_are():
    lines = (Path(__file__).parents[2] / "docs" / "sit.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in lines if line.startswith("| `--")]
    said = {flag.strip("`").removeprefix("--").replace("-", "_"): values for flag, *values in rows}
    words = {True: "on", False: "off"}
    for place, name in enumerate(("dit", "sit", "lightningdit")):
        written = {field: values[place] for field, values in said.items() if values[place]}
        assert written == {
            field: words[value] if isinstance(value, bool) else str(value)
            for field, value in PRESETS[name].items()
        }


def test_a_flow_model_is_trained_and_sampled_by_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dit_fast.training.run.open_set", lambda config: image_set())
    model = [
        "--hidden-size",
        "16",
        "--depth",
        "1",
        "--num-heads",
        "2",
        "--patch-size",
        "4",
        "--batch-size",
        "8",
    ]
    flow = [
        "--objective",
        "flow",
        "--path",
        "gvp",
        "--prediction",
        "epsilon",
        "--timestep-sampling",
        "logit-normal",
    ]
    out = [
        "--data",
        "set",
        "--steps",
        "2",
        "--log-every",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["train", *model, *flow, *out]) == 0
    for solver in (None, "heun", "sde-sbdm"):
        words = ["--num", "2", "--steps", "4", "--out", str(tmp_path / f"{solver}")]
        words += [] if solver is None else ["--solver", solver, "--last-step", "tweedie"]
        assert main(["sample", "--ckpt", str(tmp_path / "run"), *words]) == 0
        assert f"4 {solver or 'euler'} steps" in capsys.readouterr().out
        assert (tmp_path / f"{solver}" / "sample.png").exists()
    assert (
        main(["sample", "--ckpt", str(tmp_path / "run"), "--solver", "ddpm", "--out", str(tmp_path / "x")])
        == 1
    )
    assert "solver ddpm applies only to diffusion models" in capsys.readouterr().err


@pytest.mark.nightly
def test_each_block_trains_with_each_objective(tmp_path):
    """The loss falls below its bound, and samples are finite: benchmarks/studies/objectives.py, 56 runs."""
    from benchmarks.studies.objectives import table

    unsound = [outcome for outcome in table(120, tmp_path) if not outcome.sound]
    assert not unsound


def test_blocks_are_compared_seed_by_seed(tmp_path):
    from benchmarks.analysis.conditioning import draw, table, wins

    losses = {
        "adaln_zero": (0.1, 0.3),
        "adaln": (0.2, 0.2),
        "cross_attention": (0.4, 0.5),
        "in_context": (0.1, 0.6),
    }
    runs = [
        {
            "conditioning": block,
            "seed": seed,
            "heldout_loss": loss,
            "losses": [(10, 1.0), (20, 0.5)],
            "distances": [(10, 9.0), (20, 10 * loss + seed)],
        }
        for block, pair in losses.items()
        for seed, loss in enumerate(pair)
    ]
    assert wins(runs, "adaln_zero", "adaln") == (1, 1)
    assert wins(runs, "adaln_zero", "in_context") == (1, 1)
    assert wins(runs, "adaln_zero", "cross_attention") == (2, 2)
    lines = table(runs).splitlines()
    assert lines[0] == "| block | held-out loss | distance at 10 | distance at 20 | adaln_zero is better |"
    cells = (
        "0.4500 (0.4000 to 0.5000)",
        "9.0 (9.0 to 9.0)",
        "5.0 (4.0 to 6.0)",
        "loss 2, distance 2 of 2 seeds",
    )
    assert f"| cross_attention | {' | '.join(cells)} |" in lines
    draw(runs, tmp_path / "conditioning.png")
    assert (tmp_path / "conditioning.png").stat().st_size > 10_000


@pytest.mark.nightly
def test_adaln_zero_trains_faster_than_the_other_blocks(tmp_path):
    """At equal steps on the demo data (Peebles & Xie 2023, figure 5)."""
    from benchmarks.analysis.conditioning import compare, draw

    runs = compare(300, 1, tmp_path)
    draw(runs, tmp_path / "conditioning.png")
    losses = {run["conditioning"]: run["heldout_loss"] for run in runs}
    assert min(losses, key=losses.__getitem__) == "adaln_zero", losses
