"""What a DiT may be besides the paper's: positions, RMSNorm, SwiGLU, QK-norm, no classes, any size and channels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_fast.cli import main
from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError
from dit_fast.interop import DIFFUSERS, load_model, save_diffusers
from dit_fast.interop.infer_config import infer_config
from dit_fast.kernels.recompute import adaln_from_moments
from dit_fast.kernels.reference import rotate
from dit_fast.model.backends import Backends
from dit_fast.model.blocks import CONDITIONING, Stream, normed
from dit_fast.model.cost import kept_bytes
from dit_fast.model.layers import Attention, Layout, RMSNorm, SwiGLU, make_norm
from dit_fast.model.positions import rotary_angles
from dit_fast.models import DiT, DiT_models
from dit_fast.sampling import Guidance, Sampler, SamplerConfig
from dit_fast.sampling.explain import attention_maps
from tests.golden import CONFIG, golden_model, seeded
from tests.tolerance import assert_close

T, Y = torch.tensor([0, 500, 999]), torch.tensor([1, 2, 4])
OPTIONS = (
    {"positions": "learned"},
    {"positions": "rope"},
    {"norm": "rmsnorm"},
    {"mlp": "swiglu"},
    {"qk_norm": True},
    {"num_classes": 0},
    {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True},
)
EVERY = OPTIONS[-1]
RECTANGLES = ((8, 8), (4, 12), (12, 6))


def x(height: int = 8, width: int = 8) -> Tensor:
    return seeded("options", 3, 4, height, width)


def model_of(**options: object) -> DiT:
    """A small model whose tensors, but fixed positions, are all drawn anew, so that nothing is zero; eval mode."""
    model = DiT(**{**CONFIG, **options})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed" or p.requires_grad:
                one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                p.copy_(one + seeded(name, *p.shape) * (0.08 if p.ndim > 1 else 0.1))
    return model.eval()


def gradients(model: DiT) -> dict[str, Tensor]:
    model.zero_grad()
    (model(x(), T, Y) * seeded("ag", 4, 8, 8, 8)[:3]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ids(options: dict[str, object]) -> str:
    return "-".join(str(value) for value in options.values())


each_option = pytest.mark.parametrize("options", OPTIONS, ids=ids)


# What each option computes


def test_rotation_is_multiplication_by_complex_numbers() -> None:
    """Su et al. 2021, equation 12, pair by pair: the first half of a head by its row, the second by its column."""
    q = seeded("q", 2, 6, 3, 8).double()
    angles = rotary_angles((2, 3), 8)
    turned = rotate(q, torch.stack([angles.cos(), angles.sin()], -1)[None])
    for token in range(6):
        row, column = divmod(token, 3)
        for pair in range(4):
            place = (row, row, column, column)[pair]
            angle = place * 10000 ** -((pair % 2) / 2)
            before = torch.complex(q[:, token, :, 2 * pair], q[:, token, :, 2 * pair + 1])
            after = before * complex(math.cos(angle), math.sin(angle))
            assert_close(turned[:, token, :, 2 * pair], after.real, dtype=torch.float32)
            assert_close(turned[:, token, :, 2 * pair + 1], after.imag, dtype=torch.float32)


def test_rotary_attention_depends_on_offsets_only() -> None:
    """The same query and key at every place: their product is a function of the difference of places, of both axes."""
    rows, columns = 5, 7
    angles = rotary_angles((rows, columns), 16)
    rotation = torch.stack([angles.cos(), angles.sin()], -1)[None]
    q, k = (rotate(seeded(n, 1, 1, 1, 16).expand(1, 35, 1, 16), rotation)[0, :, 0] for n in "qk")
    logits = (q @ k.T).view(rows, columns, rows, columns)
    assert_close(logits[:-1, :, :-1], logits[1:, :, 1:])
    assert_close(logits[:, :-1, :, :-1], logits[:, 1:, :, 1:])
    # And it does depend on them, along each axis.
    assert (logits[0, 0, 1, 0] - logits[0, 0, 0, 0]).abs() > 1e-2
    assert (logits[0, 0, 0, 1] - logits[0, 0, 0, 0]).abs() > 1e-2


def test_a_rotary_model_adds_no_positions_and_still_tells_places_apart() -> None:
    model = model_of(positions="rope")
    assert model.pos_embed.abs().max() == 0
    assert not model.pos_embed.requires_grad
    images = x()
    moved = images.roll(2, -1)
    # One patch to the right, around the edge: the answer would move along if places were not told.
    assert (model(moved, T, Y) - model(images, T, Y).roll(2, -1)).abs().max() > 1e-3


def test_sines_and_rotary_positions_are_both_there() -> None:
    model, sines = model_of(positions="sincos_rope"), model_of()
    assert torch.equal(model.pos_embed, sines.pos_embed)
    assert not model.pos_embed.requires_grad
    turned = model._tokens(x(), model.t_embedder(T)).layout
    alone = model_of(positions="rope")._tokens(x(), model.t_embedder(T)).layout
    assert torch.equal(turned.rotation, alone.rotation)
    assert (model(x(), T, Y) - sines(x(), T, Y)).abs().max() > 1e-3
    with pytest.raises(
        ConfigError, match="mode 'interpolate': choose 'extend' where positions='sincos_rope'"
    ):
        model.regrid(16, "interpolate")


def test_condition_tokens_in_context_are_not_rotated() -> None:
    model = model_of(positions="rope", conditioning="in_context")
    c = model.condition(model.t_embedder(T), model.embed_labels(Y))
    rotation = model._tokens(x(), c).layout.rotation
    assert rotation.shape == (1, 16 + 2, 8, 2)
    assert torch.equal(rotation[0, 16:], torch.tensor([1.0, 0.0]).expand(2, 8, 2))
    assert (rotation[0, 1:16] - torch.tensor([1.0, 0.0])).abs().amax((1, 2)).min() > 0.1


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_attention_with_qk_norm_and_rotation_is_the_plain_formula(mode: str) -> None:
    attention = Attention(32, 4, qkv_bias=True, qk_norm=True, backends=Backends(mode))
    with torch.no_grad():
        for name, p in attention.named_parameters():
            p.copy_(seeded(name, *p.shape) * 0.3)
    tokens, angles = seeded("tokens", 2, 6, 32), rotary_angles((2, 3), 8)
    layout = Layout(torch.stack([angles.cos(), angles.sin()], -1)[None])

    def prepared(part: int, norm: RMSNorm) -> Tensor:
        rows = slice(32 * part, 32 * part + 32)
        heads = (tokens @ attention.qkv.weight[rows].T + attention.qkv.bias[rows]).view(2, 6, 4, 8)
        heads = heads / (heads.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        turned = torch.view_as_complex(heads.reshape(2, 6, 4, 4, 2).contiguous())
        turned = turned * torch.polar(torch.ones_like(angles), angles)[None, :, None]
        return torch.view_as_real(turned).flatten(-2).transpose(1, 2)

    q, k = prepared(0, attention.q_norm), prepared(1, attention.k_norm)
    v = (tokens @ attention.qkv.weight[64:].T + attention.qkv.bias[64:]).view(2, 6, 4, 8).transpose(1, 2)
    expected = ((q @ k.transpose(2, 3)) / math.sqrt(8)).softmax(-1) @ v
    out = attention.attend(tokens, layout)
    assert_close(out, expected.transpose(1, 2).reshape(2, 6, 32))


def test_swiglu_is_its_formula_with_two_thirds_of_the_width() -> None:
    module = SwiGLU(24, 96)
    assert module.w12.weight.shape == (128, 24)
    assert SwiGLU(40, 100).w3.weight.shape == (40, 72)  # 66.7 up to a multiple of 8
    tokens = seeded("tokens", 2, 5, 24)
    gate = tokens @ module.w12.weight[:64].T + module.w12.bias[:64]
    value = tokens @ module.w12.weight[64:].T + module.w12.bias[64:]
    expected = (gate * gate.sigmoid() * value) @ module.w3.weight.T + module.w3.bias
    assert_close(module(tokens), expected)
    gelu, swiglu = (
        sum(p.numel() for p in DiT_models["DiT-S/2"](mlp=mlp, depth=1).blocks[0].mlp.parameters())
        for mlp in ("gelu", "swiglu")
    )
    assert swiglu == pytest.approx(gelu, rel=1e-3)


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_rms_norm_is_its_formula(mode: str) -> None:
    """Modulated, on a stream with a branch pending; the kernels can make it again from what they keep."""
    tokens, branch = seeded("tokens", 2, 5, 24), seeded("branch", 2, 5, 24)
    gate, shift, scale = (seeded(name, 2, 24) for name in ("gate", "shift", "scale"))
    h = normed(Stream(tokens, branch, None, gate), make_norm("rmsnorm", 24, False), mode, shift, scale)
    added = tokens + gate[:, None] * branch
    rms = added.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    assert_close(h.x, added)
    expected = added / rms * (1 + scale[:, None]) + shift[:, None]
    assert_close(h.y, expected)
    assert (h.recipe is None) == (mode == "reference")
    if h.recipe is not None:
        assert_close(adaln_from_moments(*h.recipe), expected)


def test_rms_norm_keeps_no_more_for_the_backward_pass_than_a_layer_norm() -> None:
    assert kept_bytes({**CONFIG, "norm": "rmsnorm"}, 4) == kept_bytes(CONFIG, 4)


def test_rms_norm_rounds_once() -> None:
    """bfloat16 in and out, a float32 weight: the nearest bfloat16 of the exact value, but for ties."""
    norm = RMSNorm(512, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * seeded("weight", 512))
    tokens = seeded("tokens", 64, 512).bfloat16()
    wide = tokens.double()
    exact = wide / wide.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt() * norm.weight.double()
    out = norm(tokens)
    assert out.dtype == torch.bfloat16
    assert (out != exact.bfloat16()).float().mean() < 1e-3


# Every option in the whole model


@each_option
def test_gradients_are_finite_and_there(options: dict[str, object]) -> None:
    model = model_of(**options)
    found = gradients(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert min(gradient.abs().max() for gradient in found.values()) > 1e-5
    assert ("pos_embed" in found) == (options.get("positions") == "learned")


@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])
def test_fused_operations_around_the_options_change_nothing(conditioning: str, recompute: str) -> None:
    options = {**EVERY, "conditioning": conditioning}
    plain = model_of(**options, kernels="reference")
    fused = model_of(**options, kernels="triton", recompute=recompute)
    assert_close(fused(x(), T, Y), plain(x(), T, Y))
    expected = gradients(plain)
    for name, gradient in gradients(fused).items():
        assert_close(gradient, expected[name], what=name)


# All but two are slow: one more operation in a block breaks no graph that these do not.
@pytest.mark.parametrize(
    "options",
    [pytest.param(o, id=ids(o), marks=() if o in (OPTIONS[0], EVERY) else pytest.mark.slow) for o in OPTIONS],
)
def test_one_graph(options: dict[str, object]) -> None:
    torch._dynamo.reset()
    model = model_of(**options, depth=1, kernels="triton")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x(), T, Y), model(x(), T, Y))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_one_graph_forward_and_backward_of_every_size(mode: str) -> None:
    torch._dynamo.reset()
    model = model_of(**EVERY, kernels=mode)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in RECTANGLES:
        out, expected = compiled(x(*size), T, Y), model(x(*size), T, Y)
        assert_close(out, expected)
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(out.square().mean(), parameters)
        for one, other in zip(found, torch.autograd.grad(expected.square().mean(), parameters), strict=True):
            assert_close(one, other)


@each_option
def test_bfloat16_in_weights_and_by_autocast(options: dict[str, object]) -> None:
    model = model_of(**options)
    expected = model(x(), T, Y)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x(), T, Y)
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()
    assert (model.bfloat16()(x().bfloat16(), T, Y) - expected).abs().max() < 0.05 * expected.abs().max()


@each_option
@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_macs_are_those_that_pytorch_counts(options: dict[str, object], conditioning: str) -> None:
    model = model_of(**options, conditioning=conditioning, kernels="reference")
    for size in ((8, 8), (4, 12)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(x(*size)[:1], T[:1], Y[:1])
        assert counter.get_total_flops() == 2 * model.macs(size)


@each_option
def test_saved_model_comes_back(options: dict[str, object], tmp_path: Path) -> None:
    model = model_of(**options)
    model.save_pretrained(tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())
    assert {name: named[name] for name in options} == options
    loaded = DiT.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(x(), T, Y), model(x(), T, Y))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


@each_option
@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention"])
def test_any_way_in_finds_the_model(options: dict[str, object], conditioning: str, tmp_path: Path) -> None:
    model = model_of(**options, conditioning=conditioning)
    model.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(x(), T, Y), model(x(), T, Y))
    # Shapes alone tell all but positions, the kind of a norm without parameters, and what a width was rounded from.
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    told = infer_config(shapes, "a", {"num_heads": 4, "positions": options.get("positions", "sincos")})
    untold = {"mlp_ratio", *({"norm"} if conditioning == "adaln_zero" else ())}
    assert {k: v for k, v in told.items() if k not in untold} == {
        k: v for k, v in model.config.items() if k not in untold
    }


@each_option
def test_files_that_cannot_say_it_are_refused(options: dict[str, object], tmp_path: Path) -> None:
    model = model_of(**options)
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"diffusers' DiT is the paper's, this model has {name}={value!r}"):
        save_diffusers(model, tmp_path / "diffusers", conventions=DIFFUSERS)
    model.save_pretrained(tmp_path / "model")
    command = ["export", "--ckpt", str(tmp_path / "model"), "--format", "pt", "--out", str(tmp_path / "a.pt")]
    assert main(command) == 1
    assert not (tmp_path / "a.pt").exists()


def test_the_papers_model_names_no_option() -> None:
    model = golden_model(positions="sincos", norm="layernorm", mlp="gelu", qk_norm=False)
    assert model.config.keys() == {*CONFIG, "mlp_ratio", "class_dropout_prob", "learn_sigma"}


@each_option
def test_what_depends_on_the_condition_alone_is_made_before_the_loop(options: dict[str, object]) -> None:
    for conditioning in CONDITIONING:
        model = model_of(**options, conditioning=conditioning)
        with torch.no_grad():
            made = model.modulations(T, Y)
            assert made.shape == (3, sum(model.modulation_widths()))
            assert torch.equal(model.forward_modulated(x(), made), model(x(), T, Y))


@each_option
def test_sampling(options: dict[str, object]) -> None:
    """The sampler draws what the plain loop of the diffusion process draws."""
    model, process = model_of(**options), create_diffusion("3")
    labels = torch.zeros(2, dtype=torch.int64) if model.null_class is None else torch.tensor([1, 7])
    config = SamplerConfig(mode="reference", guidance=Guidance(1.0))
    drawn = Sampler(model, process, config)(labels, seed=3)
    torch.manual_seed(3)
    noise = torch.randn(2, 4, 8, 8)
    expected = process.p_sample_loop(
        model, (2, 4, 8, 8), noise, clip_denoised=False, model_kwargs={"y": labels}, device="cpu"
    )
    assert_close(drawn, expected, terms=4096)


def test_attention_maps_are_of_normalised_and_rotated_queries() -> None:
    model = model_of(**EVERY)
    kept: list[Tensor] = []
    attention = model.blocks[1].attn
    handle = attention.register_forward_pre_hook(lambda module, args: kept.append(module.project(*args)))
    model(x(), T, Y)
    handle.remove()
    q, k, _ = kept[0].permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(2, 3) / math.sqrt(16)).softmax(-1).view(3, 4, 16, 4, 4)
    assert_close(attention_maps(model, x(), T, Y, 1), expected)


# Classes and channels


def test_an_unconditional_model_has_no_labels() -> None:
    model = model_of(num_classes=0)
    assert (model.num_classes, model.null_class, model.y_embedder) == (0, None, None)
    assert not any(name.startswith("y_embedder") for name in model.state_dict())
    out = model(x(), T)
    assert torch.equal(out, model(x(), T, Y))
    assert model.config["class_dropout_prob"] == 0
    with pytest.raises(ConfigError, match="guidance needs a null class"):
        model.forward_with_cfg(x(), T, Y, 2.0)
    with pytest.raises(ConfigError, match="trained without classes: use scale 1"):
        Sampler(model, create_diffusion("2"), SamplerConfig(guidance=Guidance(2.0)))
    with pytest.raises(ConfigError, match="label 1 is out of range: the model is unconditional"):
        Sampler(model, create_diffusion("2"), SamplerConfig(guidance=Guidance(1.0)))([0, 1])


def test_a_model_with_classes_wants_labels() -> None:
    with pytest.raises(ValueError, match="y is NoneType: the model has 10 classes"):
        model_of()(x(), T)


@pytest.mark.parametrize("num_classes", [1, 3, 1000, 1001])
def test_the_null_class_is_the_one_after_the_last(num_classes: int) -> None:
    model = model_of(num_classes=num_classes)
    assert model.null_class == num_classes
    drawn = Sampler(model, create_diffusion("1"), SamplerConfig(guidance=Guidance(2.0, None)))([0])
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[num_classes] += 1
    changed = Sampler(model, create_diffusion("1"), SamplerConfig(guidance=Guidance(2.0, None)))([0])
    assert (changed - drawn).abs().max() > 1e-4


@pytest.mark.parametrize(("channels", "patch"), [(1, 4), (3, 8), (16, 2), (32, 1)])
def test_any_channels_and_pixels(channels: int, patch: int) -> None:
    model = model_of(in_channels=channels, patch_size=patch)
    images = seeded("channels", 3, channels, 8, 8)
    assert model(images, T, Y).shape == (3, 2 * channels, 8, 8)


# Any size


@each_option
def test_a_mixed_batch_gives_what_separate_batches_give(options: dict[str, object]) -> None:
    for conditioning in CONDITIONING:
        model = model_of(**options, conditioning=conditioning)
        images = [x(*size)[i] for i, size in enumerate(RECTANGLES)]
        with torch.no_grad():
            mixed = model.forward_mixed(images, T, Y)
            for i, image in enumerate(images):
                alone = model(image[None], T[i : i + 1], Y[i : i + 1])[0]
                assert mixed[i].shape == (8, *image.shape[1:])
                assert_close(mixed[i], alone, what=(conditioning, image.shape))


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_gradients_of_a_mixed_batch_are_those_of_separate_ones(mode: str) -> None:
    model = model_of(**EVERY, kernels=mode).double()
    images = [x(*size)[i].double() for i, size in enumerate(RECTANGLES)]
    outs = model.forward_mixed(images, T, Y)
    mixed = torch.autograd.grad(
        sum(out.square().mean() for out in outs), [p for p in model.parameters() if p.requires_grad]
    )
    apart = sum(
        model(image[None], T[i : i + 1], Y[i : i + 1]).square().mean() for i, image in enumerate(images)
    )
    separate = torch.autograd.grad(apart, [p for p in model.parameters() if p.requires_grad])
    for one, other in zip(mixed, separate, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("positions", ["sincos", "rope", "sincos_rope"])
def test_another_size_is_answered_as_by_a_model_of_that_size(positions: str) -> None:
    model, fresh = model_of(positions=positions), model_of(positions=positions, input_size=(4, 12))
    assert_close(model(x(4, 12), T, Y), fresh(x(4, 12), T, Y))
    assert torch.equal(model.regrid((4, 12))(x(4, 12), T, Y), fresh(x(4, 12), T, Y))


def test_learned_positions_are_resized() -> None:
    model = model_of(positions="learned")
    table = model.pos_embed.detach().reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(table, (8, 6), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 48, 64)
    before = model(x(16, 12), T, Y)
    model.regrid((16, 12))
    assert model.pos_embed.requires_grad
    assert_close(model.pos_embed, expected)
    assert_close(model(x(16, 12), T, Y), before)


def test_positions_refuse_what_they_have_not() -> None:
    with pytest.raises(ConfigError, match="mode 'extend': choose 'interpolate' where positions='learned'"):
        model_of(positions="learned").regrid(16, "extend")
    with pytest.raises(ConfigError, match="mode 'interpolate': choose 'extend' where positions='rope'"):
        model_of(positions="rope").regrid(16, "interpolate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "alibi"}, "positions='alibi': choose one of 'sincos', 'learned', 'rope'"),
        ({"norm": "batchnorm"}, "norm='batchnorm': choose one of 'layernorm', 'rmsnorm'"),
        ({"mlp": "relu"}, "mlp='relu': choose one of 'gelu', 'swiglu'"),
        ({"qk_norm": "yes"}, "qk_norm='yes': choose one of False, True"),
        ({"positions": "rope", "hidden_size": 60, "num_heads": 4}, "a head of 15 is not a multiple of 4"),
        ({"positions": "rope", "hidden_size": 72, "num_heads": 12}, "a head of 6 is not a multiple of 4"),
        ({"mlp": "swiglu", "mlp_epilogue": "triton"}, "applies a GELU, which mlp='swiglu' has not: give 'auto' or"),
        ({"input_size": (8, 11)}, "input_size 8x11 is not a positive multiple of patch_size 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_when_the_model_is_built(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DiT(**{**CONFIG, **options})


def test_learned_positions_take_any_width() -> None:
    """Only the sines need a multiple of four."""
    assert (
        DiT(**{**CONFIG, "hidden_size": 66, "num_heads": 6, "positions": "learned"}).pos_embed.shape[-1] == 66
    )
    assert np.isclose(DiT(**CONFIG, positions="learned").pos_embed.std().item(), 0.02, rtol=0.1)
