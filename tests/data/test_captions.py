"""Models that are told captions: padding, the null caption, guidance, sizes, files, counts."""

import dataclasses
import json

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_fast.cli import main
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError
from dit_fast.interop import load_model
from dit_fast.models import DiT, DiT_models
from dit_fast.sampling import Guidance, Sampler, SamplerConfig
from dit_fast.sampling.trajectory import KeyedNoise
from tests.tolerance import assert_close, largest

E, S = 12, 5
CONDITIONINGS = ("cross_attention", "in_context")
T = torch.tensor([3, 500, 999])


def build(conditioning: str, **options: object) -> DiT:
    torch.manual_seed(0)
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4}
    model = DiT(conditioning=conditioning, caption_dim=E, **{**sizes, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def x() -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def captions() -> Tensor:
    """Three captions of 5, 2 and no tokens."""
    y = torch.randn(3, S, E, generator=torch.Generator().manual_seed(2))
    y[1, 2:] = 0
    y[2] = 0
    return y


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_padding_has_no_influence(conditioning, monkeypatch):
    model, y = build(conditioning), captions()
    out = model(x(), T, y)
    # A set of tokens: order counts for nothing.
    assert_close(out[:2], model(x(), T, y.flip(1))[:2])
    assert_close(out, model(x(), T, torch.nn.functional.pad(y, (0, 0, 0, 7))))
    assert_close(out[1:], model(x()[1:], T[1:], y[1:, :2]))
    assert (out[0] - model(x(), T, y + (y != 0) * 0.5)[0]).abs().max() > 1e-3  # what is said counts

    # Whatever stands in the padding's place behind the mask: the same bits.
    told = (model.condition(model.t_embedder(T), model.embed_labels(y)) != 0).any(dim=-1)
    assert told.tolist() == [[True] * 6, [True] * 3 + [False] * 3, [True] * 2 + [False] * 4]
    stream = DiT._stream

    def disturbed(self: DiT, tokens: Tensor, c: Tensor, *rest: object) -> object:
        made = stream(self, tokens, c, *rest)
        if conditioning == "in_context":
            made.x[:, -6:][~told] = 7.0
        return made

    expected = out
    if conditioning == "in_context":
        monkeypatch.setattr(DiT, "_stream", disturbed)
        assert torch.equal(model(x(), T, y), expected)
    else:
        cross = model.blocks[0].cross
        kv, q = torch.randn(3, 6, 64), torch.randn(3, 16, 32)
        changed = torch.where(told[..., None], kv, 7.0)
        assert torch.equal(cross(q, None, told, kv), cross(q, None, told, changed))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradients_are_finite_and_reach_the_null_token(conditioning):
    model, y = build(conditioning, recompute="blocks").train(), captions()
    model.y_embedder.dropout_prob = 0.0
    model(x(), T, y).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())
    assert gradients["y_embedder.null_token"].abs().max() > 0
    assert gradients["y_embedder.mlp.0.weight"].abs().max() > 0


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_training_drops_captions(conditioning):
    model, y = build(conditioning, class_dropout_prob=0.999).train(), captions()
    assert torch.equal(model(x(), T, y), model.eval()(x(), T, torch.zeros_like(y)))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_guidance(conditioning):
    model, y = build(conditioning), captions()
    both = torch.cat([y, torch.zeros_like(y)])
    twice, times = torch.cat([x(), x()]), torch.cat([T, T])
    guided = model.forward_with_cfg(twice, times, both, 3.0)
    told, null = model(x(), T, y), model(x(), T, torch.zeros_like(y))
    # Three times one, and twice the other, are what is rounded.
    size = 5 * max(largest(told), largest(null))
    assert_close(guided[:3, :3], null[:, :3] + 3 * (told - null)[:, :3], scale=size)
    assert_close(guided[2, :3], null[2, :3], scale=size)  # its caption is the null caption
    with pytest.raises(ConfigError, match="null class"):
        build(conditioning, class_dropout_prob=0.0).forward_with_cfg(twice, times, both, 3.0)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_tokens_made_before_a_loop_are_what_forward_makes(conditioning):
    model, y = build(conditioning, positions="rope"), captions()
    made = model.modulations(T, y)
    assert made.shape == (3, sum(model.modulation_widths(S))) == (3, (S + 1) * 32)
    assert torch.equal(model.forward_modulated(x(), made), model(x(), T, y))


def test_images_of_several_sizes():
    model, y = build("in_context"), captions()
    images = [torch.randn(4, 8, 8), torch.randn(4, 4, 8), torch.randn(4, 12, 4)]
    for number, out in enumerate(model.forward_mixed(images, T, y)):
        alone = model(images[number][None], T[number : number + 1], y[number : number + 1])[0]
        assert_close(out, alone)


def test_a_saved_model_is_the_same(tmp_path):
    model = build("cross_attention")
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path)
    assert (again.caption_dim, again.num_classes, again.null_class, again.has_null) == (E, 0, None, True)
    assert torch.equal(again(x(), T, captions()), model(x(), T, captions()))
    # A bare file of weights tells the same, but for the heads.
    bare, _ = load_model(tmp_path / "model.safetensors", num_heads=4)
    assert bare.config == model.config


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_sampler_draws_what_the_reference_loop_draws(conditioning):
    """Two prompts in one batch, guided, against `p_sample_loop` with `forward_with_cfg`; in segments as well."""
    model, y = build(conditioning, learn_sigma=False), captions()[[0, 1, 0]]
    diffusion = create_diffusion("4", learn_sigma=False)
    config = SamplerConfig(solver="ddim", guidance=Guidance(2.0), graph="never")
    sampler = Sampler(model, diffusion, config)
    drawn = sampler(y, seed=5)
    start = KeyedNoise(5, torch.arange(3), (4, 8, 8)).start()
    with torch.no_grad():
        expected = diffusion.ddim_sample_loop(
            model.forward_with_cfg,
            (6, 4, 8, 8),
            torch.cat([start, start]).float(),
            clip_denoised=False,
            model_kwargs={"y": torch.cat([y, torch.zeros_like(y)]), "cfg_scale": 2.0},
            device="cpu",
        )[:3]
    assert_close(drawn[:, :3], expected[:, :3], terms=4096)
    assert (drawn[0] - drawn[2]).abs().max() > 0.1  # noise of their own
    alone = sampler(y[1:2, :2], seed=5, numbers=torch.tensor([1]))
    assert_close(alone[0], drawn[1], terms=4096)
    sampler.config = dataclasses.replace(config, table_bytes=1)
    assert_close(sampler(y, seed=5), drawn, terms=4096)


@pytest.mark.parametrize(
    "y", [torch.tensor([1, 2]), torch.zeros(2, S, E + 1), torch.full((2, S, E), torch.nan)]
)
def test_sampler_refuses_what_is_no_caption(y):
    with pytest.raises(ConfigError, match=r"captions (are|contain)"):
        Sampler(build("in_context"), create_diffusion("4"))(y)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_multiply_adds(conditioning):
    model = build(conditioning)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x()[:1], T[:1], captions()[:1])
    assert counter.get_total_flops() == 2 * model.macs(caption_tokens=S)


def test_info_counts_captions(capsys):
    usual = ["info", "DiT-S/8", "--conditioning", "in_context", "--json", "--batch-size", "2"]
    assert main([*usual, "--caption-dim", "768", "--caption-tokens", "20"]) == 0
    told = json.loads(capsys.readouterr().out)
    with torch.device("meta"):
        model = DiT_models["DiT-S/8"](conditioning="in_context", caption_dim=768)
    assert (told["macs"], told["config"]["caption_dim"]) == (model.macs(caption_tokens=20), 768)
    assert main(usual) == 0
    assert json.loads(capsys.readouterr().out)["macs"] < told["macs"]


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln"])
def test_conditioning_by_a_vector_is_refused(conditioning):
    with pytest.raises(ConfigError, match="caption is many tokens: give 'cross_attention' or 'in_context'"):
        build(conditioning)


@pytest.mark.parametrize("y", [None, torch.tensor([1, 2, 3]), torch.zeros(3, S, E + 1)])
def test_what_is_no_caption_is_refused(y):
    with pytest.raises(ValueError, match=rf"captions, give their tokens \(N, S, {E}\)"):
        build("in_context")(x(), T, y)


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_compiled(conditioning):
    model = build(conditioning)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x(), T, captions()), model(x(), T, captions()))


def test_a_model_of_classes_refuses_captions():
    model = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=3).eval()
    with pytest.raises(
        ValueError, match=r"y is \(3, 5, 12\): the model has 3 classes, give a label for each image"
    ):
        model(x(), T, captions())
    with pytest.raises(ConfigError, match=r"labels are torch.float32 \(3, 5, 12\), expected one integer"):
        Sampler(model, create_diffusion("4"))(captions())
