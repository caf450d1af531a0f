"""The drop-in diffusion against numbers that the reference implementation gave (float32, CPU)."""

import numpy as np
import pytest
import torch

from dit_fast.diffusion import create_diffusion
from tests.golden import GOLDEN, golden_model, seeded
from tests.tolerance import assert_close

RESPACINGS = ["", "250", "ddim50"]
LABELS = torch.tensor([0, 1, 2, 4])
X = seeded("ax", 4, 4, 8, 8)


@pytest.fixture(scope="module")
def model():
    return golden_model()


def four_timesteps(steps: int) -> torch.Tensor:
    return torch.tensor([0, 1, steps // 2, steps - 1])


@pytest.mark.parametrize("respacing", RESPACINGS)
def test_timesteps_and_betas(respacing):
    diffusion = create_diffusion(respacing)
    np.testing.assert_array_equal(diffusion.timestep_map, GOLDEN[f"a.ts.{respacing}"])
    np.testing.assert_array_equal(diffusion.betas, GOLDEN[f"a.betas.{respacing}"])


@torch.no_grad()
@pytest.mark.parametrize("respacing", RESPACINGS)
def test_training_losses(model, respacing):
    diffusion = create_diffusion(respacing)
    t = four_timesteps(diffusion.num_timesteps)
    terms = diffusion.training_losses(model, X, t, {"y": LABELS}, noise=seeded("an", 4, 4, 8, 8))
    assert set(terms) == {"loss", "mse", "vb"}
    for name, value in terms.items():
        assert_close(value, GOLDEN[f"a.loss.{respacing}.{name}"], what=name)


@torch.no_grad()
@pytest.mark.parametrize("respacing", RESPACINGS)
def test_posterior(model, respacing):
    diffusion = create_diffusion(respacing)
    t = four_timesteps(diffusion.num_timesteps)
    out = diffusion.p_mean_variance(model, X, t, clip_denoised=False, model_kwargs={"y": LABELS})
    for name in ("mean", "variance", "log_variance"):
        assert_close(out[name], GOLDEN[f"a.pmv.{respacing}.{name}"], what=name)
    # x_0 takes up to 157 times the model's output, and its rounding errors too.
    gain = diffusion.sqrt_recip_alphas_cumprod[t].reshape(4, 1, 1, 1)
    expected = GOLDEN[f"a.pmv.{respacing}.pred_xstart"] / gain
    assert_close(out["pred_xstart"].numpy() / gain, expected, dtype=torch.float32)


def test_posterior_from_the_recorded_model_output():
    """Without a model in between, the diffusion's arithmetic is the reference's to the last bits."""
    rows = [0, 2, 3]
    output = torch.from_numpy(GOLDEN["a.fwd"])[rows]
    out = create_diffusion("").p_mean_variance(
        lambda x, t: output, X[rows], torch.tensor([0, 500, 999]), clip_denoised=False
    )
    for name in ("mean", "variance", "log_variance", "pred_xstart"):
        expected = GOLDEN[f"a.pmv..{name}"][rows]
        # Row by row, for their sizes differ; a value is a sum of two products, of which one is a sum of two.
        for row in range(3):
            assert_close(out[name][row], expected[row], terms=4, what=f"{name} of row {row}")


def test_ddim_trajectory(model):
    diffusion = create_diffusion("ddim25")
    arguments = {"clip_denoised": False, "model_kwargs": {"y": LABELS}, "device": "cpu", "eta": 0.0}
    sample = diffusion.ddim_sample_loop(model, X.shape, noise=X, **arguments).numpy()
    expected = GOLDEN["a.ddim25"]
    assert_close(sample, expected)

    exact = diffusion.ddim_sample_loop(
        golden_model().double(), X.shape, noise=X.double(), **arguments
    ).numpy()
    # The recorded one has the rounding of another machine: one of the same size, not the same.
    assert np.abs(sample - exact).max() <= 4 * np.abs(expected - exact).max()
