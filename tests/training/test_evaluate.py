"""Frechet distances while a run goes on: of the averaged weights, without disturbing it, shared by the ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_fast.cli import main
from dit_fast.data import LatentSet
from dit_fast.distributed.world import World
from dit_fast.errors import ConfigError
from dit_fast.evaluation import features
from dit_fast.training import TrainConfig, Trainer, resume, train
from dit_fast.training import run as training_run
from dit_fast.training.callbacks import Evaluation, EvaluationError, score_line
from dit_fast.training.log import read_log, read_scores
from tests.cli.test_evaluate import SmallNetwork, pictures, write_npz
from tests.tolerance import assert_same_distance
from tests.training.test_step import TINY, image_set, run, trainer


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small network in Inception's place, grey pictures to compare with, a few samples of a few levels."""
    monkeypatch.setattr(features, "InceptionFeatures", SmallNetwork)
    monkeypatch.setattr(training_run, "open_set", lambda config: image_set())
    real = write_npz(tmp_path / "real.npz", arr_0=pictures(30, 1)[..., :1])
    return {
        "evaluate_every": 2, "evaluate_samples": 10, "evaluate_against": str(real), "evaluate_weights": "unused.pth",
        "sample_steps": 3,
    }  # fmt: skip


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, "log_every": 3, **changes})


def test_scores_are_logged_and_disturb_nothing(tmp_path, options, capsys):
    scored = train(tiny(steps=5, **options), tmp_path / "scored")
    plain = train(tiny(steps=5), tmp_path / "plain")
    files = [(result.checkpoint / "model.safetensors").read_bytes() for result in (scored, plain)]
    assert files[0] == files[1]
    log = tmp_path / "scored" / "log.jsonl"
    scores = read_scores(log)
    assert [line["step"] for line in scores] == [2, 4, 5], "every second step, and the end"
    assert len({line["fid"] for line in scores}) == 3
    assert all(line["fid"] > 0 and line["num_samples"] == 10 for line in scores)
    assert [line["step"] for line in read_log(log)] == [3, 5]
    assert f"step 2: FID: {scores[0]['fid']:.6g}" in capsys.readouterr().out

    # Stopped at step 2 and continued: the same scores, none twice.
    train(tiny(steps=2, **options), tmp_path / "resumed")
    resume(tmp_path / "resumed", {"steps": 5})
    assert read_scores(tmp_path / "resumed" / "log.jsonl") == scores

    sizes = []
    for name in ("scored", "plain"):
        assert main(["plot", str(tmp_path / name), "--out", str(tmp_path / f"{name}.png")]) == 0
        sizes.append((tmp_path / f"{name}.png").read_bytes()[16:24])
    heights = [int.from_bytes(size[4:]) for size in sizes]
    assert heights[0] == 2 * heights[1], "a panel for the scores"


def test_a_score_is_what_dit_fast_evaluate_says_of_the_same_samples(tmp_path, options):
    each = trainer(**options)
    run(each, 3)
    evaluation = Evaluation(each)
    line = score_line(3, evaluation.score())
    with evaluation.sampler.averages():
        images = evaluation._draw(evaluation.numbers, 0)
    samples = write_npz(tmp_path / "samples.npz", arr_0=images)
    asked = ["--against", options["evaluate_against"], "--weights", "unused.pth", "--metrics", "fid"]
    out = tmp_path / "scores.json"
    assert main(["evaluate", str(samples), *asked, "--out", str(out), "--device", "cpu"]) == 0
    assert_same_distance(json.loads(out.read_text())["fid"], line["fid"])
    assert (line["step"], line["extractor"], line["proxy"]) == (3, "small network", False)
    assert (len(evaluation.sampler.schedule), evaluation.sampler.config.guidance.active) == (3, False)


class OneOfTwo(World):
    """Rank `rank` of two; `gather` answers with what the other one said."""

    said: Any = None

    def gather(self, value: Any, background: bool = False) -> list[Any]:
        return [value, self.said] if self.rank == 0 else [self.said, value]

    def first(self, action: Any) -> Any:
        return action()


def test_ranks_share_the_samples(options):
    each = trainer(**options)
    run(each, 2)
    alone = Evaluation(each).score()
    evaluations = []
    for rank in range(2):
        each.world = OneOfTwo(rank=rank, size=2)
        evaluations.append(Evaluation(each))
    assert sorted(torch.cat([one.numbers for one in evaluations]).tolist()) == list(range(10))
    with evaluations[1].sampler.averages():
        drawn = evaluations[1]._features()
    each.world = OneOfTwo(rank=0, size=2)
    object.__setattr__(each.world, "said", drawn)
    shared = evaluations[0].score()
    assert_same_distance(shared.fid, alone.fid)
    object.__setattr__(each.world, "said", "2 of 5 samples have NaN")
    with pytest.raises(EvaluationError, match="rank 1: 2 of 5 samples have NaN"):
        evaluations[0].score()


def test_samples_that_are_not_finite_are_said_and_the_run_goes_on(tmp_path, options, monkeypatch, caplog):
    average = Trainer.ema_state
    monkeypatch.setattr(
        Trainer,
        "ema_state",
        lambda self, *state: {name: t * np.nan for name, t in average(self, *state).items()},
    )
    result = train(tiny(steps=2, **options), tmp_path / "run")
    assert "the score of samples: 10 of 10 samples have NaN or infinite values" in caplog.text
    assert result.step == 2


def test_what_cannot_be_scored_is_said_before_the_first_step(tmp_path, options):
    with pytest.raises(
        ConfigError, match="--evaluate-features inception with --evaluate-weights None: inception"
    ):
        tiny(**{**options, "evaluate_weights": None})
    with pytest.raises(ConfigError, match=r"--evaluate-samples 1: give a whole number from 2"):
        tiny(**{**options, "evaluate_samples": 1})
    each = trainer(**options)
    each.world = OneOfTwo(rank=0, size=64)
    with pytest.raises(ConfigError, match="--evaluate-samples 10: give one for each rank, 64"):
        Evaluation(each)
    other = write_npz(tmp_path / "other.npz", mu=np.zeros(6), sigma=np.eye(6), num=9, extractor="VGG")
    with pytest.raises(
        ConfigError, match="the reference statistics belong to VGG features, the samples' to small"
    ):
        Evaluation(trainer(**{**options, "evaluate_against": str(other)}))
    each = trainer(**{**options, "evaluate_against": None})
    each.data = LatentSet.__new__(LatentSet)
    with pytest.raises(ConfigError, match="set holds latents; give real images or their statistics"):
        Evaluation(each)
