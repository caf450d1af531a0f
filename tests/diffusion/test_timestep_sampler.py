"""Importance sampling of timesteps, on one process and on two."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_fast.diffusion import create_diffusion
from dit_fast.diffusion.timestep_sampler import (
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from dit_fast.errors import ConfigError
from tests.patience import PATIENCE

FOUR_STEPS = create_diffusion("4")


def test_names():
    assert type(create_named_schedule_sampler("uniform", FOUR_STEPS)) is UniformSampler
    assert type(create_named_schedule_sampler("loss-second-moment", FOUR_STEPS)) is LossSecondMomentResampler
    with pytest.raises(
        ConfigError, match="unknown timestep sampler 'loss'; known: uniform, loss-second-moment"
    ):
        create_named_schedule_sampler("loss", FOUR_STEPS)


def test_uniform_sampling_draws_from_the_global_numpy_generator():
    np.random.seed(3)
    timesteps, weights = UniformSampler(FOUR_STEPS).sample(100, "cpu")
    np.random.seed(3)
    np.testing.assert_array_equal(timesteps, np.random.choice(4, size=(100,), p=[0.25] * 4))
    assert timesteps.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert (weights == 1).all()
    assert set(timesteps.tolist()) == {0, 1, 2, 3}


def test_second_moment_weights_by_hand():
    sampler = LossSecondMomentResampler(FOUR_STEPS, history_per_term=2, uniform_prob=0.1)
    sampler.update_with_all_losses([0, 0, 1, 1, 2, 2, 3], [9.0, 3.0, 1.0, 7.0, 2.0, 2.0, 5.0])
    np.testing.assert_array_equal(sampler.weights(), np.ones(4))
    # Step 0 forgets its 9 for a 4; the history of step 3 is complete only now.
    sampler.update_with_local_losses(torch.tensor([3, 0]), torch.tensor([5.0, 4.0]))
    root_mean_square = np.sqrt([(9 + 16) / 2, (1 + 49) / 2, 4, 25])
    expected = 0.9 * root_mean_square / root_mean_square.sum() + 0.1 / 4
    np.testing.assert_allclose(sampler.weights(), expected)
    assert sampler.weights().sum() == pytest.approx(1)

    timesteps, weights = sampler.sample(4000, "cpu")
    np.testing.assert_allclose(weights, 1 / (4 * expected[timesteps]), rtol=1e-6)
    frequency = np.bincount(timesteps, minlength=4) / 4000
    np.testing.assert_allclose(frequency, expected, atol=0.03)
    # The mean of weight * loss is the plain mean over timesteps.
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])[timesteps]
    assert (weights * losses).mean().item() == pytest.approx(2.5, abs=0.15)


def test_default_history_is_ten_losses():
    sampler = LossSecondMomentResampler(FOUR_STEPS)
    sampler.update_with_all_losses(list(range(4)) * 9, [1.0] * 36)
    assert not sampler.history.complete()
    sampler.update_with_all_losses(list(range(4)), [3.0] * 4)
    assert sampler.history.complete()
    np.testing.assert_allclose(sampler.weights(), 0.25)


@pytest.mark.parametrize("options", [{"history_per_term": 0}, {"uniform_prob": -0.1}, {"uniform_prob": 1.5}])
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        LossSecondMomentResampler(FOUR_STEPS, **options)


WORKER = """
import json, sys
import torch
import torch.distributed as dist
from dit_fast.diffusion import create_diffusion
from dit_fast.diffusion.timestep_sampler import LossSecondMomentResampler

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
sampler = LossSecondMomentResampler(create_diffusion("4"), history_per_term=3)
timesteps, losses = [([0, 0, 1], [0.5, 1.5, 2.5]), ([0, 0], [3.5, 4.5])][rank]
sampler.update_with_local_losses(torch.tensor(timesteps), torch.tensor(losses))
print(json.dumps([sampler.history.losses[:-1].tolist(), sampler.history.counts.tolist()]))
dist.destroy_process_group()
"""


def test_ranks_share_their_losses_in_rank_order(tmp_path):
    root = Path(__file__).parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for rank in range(2)
    ]
    answers = [json.loads(worker.communicate(timeout=PATIENCE)[0]) for worker in workers]
    # Batches of 3 and 2: step 0 saw 0.5, 1.5, 3.5, 4.5 in this order and keeps the last three.
    expected = [[[4.5, 1.5, 3.5], [2.5, 0.0, 0.0], [0.0] * 3, [0.0] * 3], [4, 1, 0, 0]]
    assert answers == [expected, expected]
