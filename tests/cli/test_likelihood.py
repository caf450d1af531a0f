"""`dit-fast likelihood`: bits per dimension of a run's held-out images, and what it refuses."""

import json
import math

import pytest
import torch

from dit_fast.cli import likelihood, main
from dit_fast.data import open_data
from dit_fast.diffusion import FlowMatching
from dit_fast.diffusion.likelihood import GREY_LEVEL, log_likelihood
from dit_fast.interop import load_model
from dit_fast.models import DiT
from dit_fast.training import TrainConfig, train
from dit_fast.utils import keyed
from tests.tolerance import assert_close, largest

TINY = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "batch_size": 4, "steps": 1}


def trained(folder, **own):
    """One step at a rate of next to nothing: the model still answers 0, as it does when it is new."""
    train(TrainConfig(data="digits", lr=1e-12, **TINY, **own), folder)
    return folder


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("flow") / "run", objective="flow")


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("diffusion") / "run", diffusion_steps=50)


def bits(run, tmp_path, *words):
    out = tmp_path / "bits.json"
    assert main(["likelihood", "--ckpt", str(run), "--out", str(out), *words]) == 0
    return json.loads(out.read_text())


def test_a_flow_that_stands_still_has_the_prior_s_bits(flow, tmp_path):
    """Velocity 0: the density of the data is that of the noise."""
    found = bits(flow, tmp_path, "--num", "10", "--batch-size", "4", "--steps", "2")
    numbers = torch.arange(10)
    x = open_data("digits").heldout.batch(numbers)
    x = x + (keyed.uniform(keyed.key(0, "dequantise"), numbers, tuple(x.shape[1:])) - 0.5) * GREY_LEVEL
    nats = 0.5 * (x.double() ** 2 + math.log(2 * math.pi)).mean(dim=(1, 2, 3))
    expected = nats / math.log(2) - math.log2(GREY_LEVEL)
    assert_close(found["bits_per_dimension"], float(expected.mean()))
    assert_close(found["standard_error"], float(expected.std() / 10**0.5), scale=largest(expected))
    assert (found["images"], found["split"], found["measured"]) == (10, "held-out", "likelihood by the ODE")


def test_the_bound_of_a_diffusion_is_repeatable_and_by_seed(diffusion, tmp_path):
    first, again, other = (bits(diffusion, tmp_path, "--num", "6", "--seed", seed) for seed in "001")
    assert first == again
    assert first["measured"] == "variational bound"
    assert first["bits_per_dimension"] != other["bits_per_dimension"]
    assert first["bits_per_dimension"] == pytest.approx(other["bits_per_dimension"], rel=0.2)
    # Noise is an image's own, whatever the batch.
    apart = bits(diffusion, tmp_path, "--num", "6", "--seed", "0", "--batch-size", "4")
    assert_close(apart["bits_per_dimension"], first["bits_per_dimension"])


def test_images_are_cropped_to_a_model_that_is_not_square(tmp_path):
    DiT((8, 4), 4, 1, 16, 1, 2, num_classes=10).save_pretrained(tmp_path / "model")
    options = likelihood.LikelihoodOptions(ckpt=str(tmp_path / "model"), data="digits")
    data = likelihood._images(options, *load_model(tmp_path / "model"))
    whole = open_data("digits").heldout.batch(torch.arange(5))
    assert torch.equal(data.heldout.batch(torch.arange(5)), whole[..., 2:6])


def test_a_sample_s_probes_do_not_depend_on_its_batch():
    def model(x, t):
        return (x.flip(-1) * x).tanh()

    x, numbers = torch.randn(4, 1, 4, 4), torch.arange(4)
    together = log_likelihood(FlowMatching(), model, x, steps=3, numbers=numbers)
    apart = [
        log_likelihood(FlowMatching(), model, x[i : i + 1], steps=3, numbers=numbers[i : i + 1])
        for i in range(4)
    ]
    assert_close(together, torch.cat(apart))
    assert not torch.allclose(
        together, log_likelihood(FlowMatching(), model, x, steps=3, numbers=numbers + 4)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "nowhere is neither a folder nor a built-in set"),
    ],
)
def test_refusals(flow, words, message, capsys):
    assert main(["likelihood", "--ckpt", str(flow), *words]) == 1
    assert message in capsys.readouterr().err


def test_latents_have_no_bits(tmp_path, capsys):
    DiT(8, 2, 4, 16, 1, 2, num_classes=2).save_pretrained(tmp_path / "latents")
    assert main(["likelihood", "--ckpt", str(tmp_path / "latents")]) == 1
    assert "the model generates latents of an autoencoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--solver", "dopri5", "--steps", "4"), "--steps 4 applies only to --solver heun; remove it"),
        (("--rtol", "0.01"), "--rtol 0.01 applies only to --solver dopri5; remove it"),
    ],
)
def test_options_of_the_other_solver_are_refused(flow, capsys, words, line):
    assert main(["likelihood", "--ckpt", str(flow), *words]) == 1
    assert line in capsys.readouterr().err
