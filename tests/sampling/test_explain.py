"""Pictures of trajectories, sweeps and attention: the right images in the right places, and the maps' own maths."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.cli import main
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError
from dit_fast.sampling import Guidance, Sampler, SamplerConfig, diffusion_schedule, draw_grid, to_uint8
from dit_fast.sampling.explain import (
    attention_film,
    attention_maps,
    film_strip,
    guidance_sweep,
    overlay,
    steps_sweep,
    thinned,
)
from dit_fast.utils.locks import FolderLock
from tests.small_models import small_model as build
from tests.tolerance import assert_close

LABELS = torch.tensor([1, 4])


small_model = partial(build, std=0.2, in_channels=3, depth=2)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    torch.manual_seed(0)
    return Sampler(small_model(), create_diffusion("8"), SamplerConfig(clip=True, guidance=Guidance(2.0)))


def same(picture: Image.Image, rows) -> bool:
    return np.array_equal(np.asarray(picture), np.asarray(draw_grid(rows)))


def keep(states):
    return states


def test_sweeps_are_the_sampler_s_own_answers_and_leave_it_as_it_was(sampler):
    before = (sampler.config, sampler.schedule)

    def drawn(scale: float, steps: str) -> np.ndarray:
        other = Sampler(
            sampler.model, create_diffusion(steps), SamplerConfig(clip=True, guidance=Guidance(scale))
        )
        return to_uint8(other(LABELS, seed=3))

    rows = [(f"scale {scale:g}", drawn(scale, "8")) for scale in (1, 3)]
    assert same(guidance_sweep(sampler, LABELS, (1, 3), keep, seed=3), rows)
    assert not np.array_equal(rows[0][1], rows[1][1])
    picture = steps_sweep(sampler, LABELS, (8, 1), keep, seed=3)
    assert picture.size == draw_grid([("8 steps", rows[0][1]), ("1 steps", rows[0][1])]).size
    full = draw_grid([("8 steps", drawn(2, "8")), ("1 steps", rows[0][1])])
    half = picture.height // 2 - 4
    assert np.array_equal(np.asarray(picture)[:half], np.asarray(full)[:half])
    assert (sampler.config, sampler.schedule) == before
    with pytest.raises(ConfigError, match="9 steps: choose 1 to 8"):
        steps_sweep(sampler, LABELS, (9,), keep)


def test_thinned_schedules_run_from_the_same_noise_to_the_same_end():
    nodes = diffusion_schedule(create_diffusion("10"))
    for steps in (1, 2, 5, 10):
        few = thinned(nodes, steps)
        assert (len(few), few.times[0], few.alphas[-1], few.sigmas[-1]) == (steps, nodes.times[0], 1.0, 0.0)
        assert (np.diff(few.times) < 0).all()
        assert np.isin(few.sigmas, nodes.sigmas).all()


def test_a_film_strip_ends_with_the_sample(sampler):
    seen = []

    def decode(states):
        seen.append(states)
        return states

    picture = film_strip(sampler, LABELS, ["a", "b"], decode, seed=3, frames=5)
    assert len(seen) == 4
    # At the first step the clean image is the noise prediction times this.
    gain = sampler.schedule.sigmas[0] / sampler.schedule.alphas[0]
    assert_close(seen[-1], sampler(LABELS, seed=3), scale=gain)
    film = np.stack([to_uint8(states) for states in seen], axis=1)
    assert same(picture, [("a", film[0]), ("b", film[1])])


def attention_of_pieces(model, x, t, y) -> torch.Tensor:
    """The first block's attention from its definition."""
    tokens = model.x_embedder(x, model.pos_embed)
    c = model.t_embedder(t) + model.y_embedder(y, False)
    block = model.blocks[0]
    shift, scale = block.adaLN_modulation(c).chunk(6, dim=1)[:2]
    h = (
        torch.nn.functional.layer_norm(tokens, tokens.shape[2:], eps=1e-6) * (1 + scale[:, None])
        + shift[:, None]
    )
    q, k, _ = block.attn.qkv(h).chunk(3, dim=2)
    q, k = (part.unflatten(2, (2, 16)).permute(0, 2, 1, 3) for part in (q, k))
    return torch.softmax(torch.einsum("nhqd,nhkd->nhqk", q, k) / 4, dim=3)


def test_attention_maps_are_the_softmax_of_the_block():
    model = small_model()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([10, 500]), LABELS
    with torch.no_grad():
        maps, expected, plain = (
            attention_maps(model, x, t, y, 0),
            attention_of_pieces(model, x, t, y),
            model(x, t, y),
        )
    assert maps.shape == (2, 2, 16, 4, 4)
    assert_close(maps.flatten(3), expected)
    assert_close(maps.sum(dim=(3, 4)), 1)
    assert not model.blocks[0].attn._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(x, t, y), plain)


def test_overlays_are_red_where_the_attention_is():
    images = np.full((1, 8, 8, 1), 100, np.uint8)
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 3] = 0.25
    mixed = overlay(images, maps)
    assert mixed.shape == (1, 8, 8, 3)
    assert mixed[0, 0, 7].tolist() == [193, 64, 40]
    assert mixed[0, 7, 0].tolist() == [100, 100, 100]


def test_an_attention_film_has_two_rows_an_image(sampler):
    picture = attention_film(sampler, LABELS, ["a", "b"], keep, 1, 0, seed=3, frames=5)
    mean = attention_film(sampler, LABELS, ["a", "b"], keep, 1, None, seed=3, frames=5)
    tiles = np.zeros((3, 8, 8, 3), np.uint8)
    assert picture.size == draw_grid([("attention", tiles)] * 4).size
    assert not np.array_equal(np.asarray(picture), np.asarray(mean))
    for block, head, line in [
        (2, 0, "block 2: the model has blocks 0 to 1"),
        (0, 2, "head 2: block 0 has heads 0 to 1"),
    ]:
        with pytest.raises(ConfigError, match=line):
            attention_film(sampler, LABELS, ["a", "b"], keep, block, head)


def test_the_command_writes_its_pictures(tmp_path, capsys):
    small_model(in_channels=1).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    ask = [
        "explain",
        "--ckpt",
        str(tmp_path / "model"),
        "--steps",
        "6",
        "--classes",
        "0,3",
        "--out",
        str(out),
    ]
    assert main([*ask, "--block", "0", "--head", "1", "--scales", "1", "4", "--frames", "4"]) == 0
    names = ["attention.png", "film.png", "guidance.png", "steps.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(np.asarray(Image.open(out / name)).std() > 1 for name in names)
    assert capsys.readouterr().out.count("wrote ") == 4
    with FolderLock(out, "explain"):  # pictures of two commands are not mixed
        assert main(ask) == 1
    assert f"{out} is in use: dit-fast explain, process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--block", "7"], "block 7: the model has blocks 0 to 1"),
        (["--step-counts", "3", "9"], "9 steps: choose 1 to 6"),
        (["--steps", "1"], "--steps 1: one step has no trajectory to show"),
    ],
)
def test_bad_requests_are_one_line_and_draw_nothing(tmp_path, capsys, options, line):
    small_model().save_pretrained(tmp_path / "model")
    ask = [
        "explain",
        "--ckpt",
        str(tmp_path / "model"),
        "--vae",
        "none",
        "--steps",
        "6",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*ask, *options]) == 1
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))
