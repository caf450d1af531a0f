"""Hooks, adapters, offloading, casting, pruning and quantized weights take effect, also where the kernels run."""

import copy
import functools
import re
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError
from dit_fast.model.dit import DiT
from dit_fast.sampling import Guidance, Sampler, SamplerConfig
from tests.interop.habits import HABITS, MODELS, build, largest_difference, run
from tests.reference_layout import ReferenceDiT, inputs
from tests.tolerance import assert_close, largest, relative

# "triton" runs the registered operations, whose CPU side is their reference; tests/kernels/test_habits.py interprets
# the kernels.
MODES = ("auto", "triton")
PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


@pytest.mark.parametrize("title", HABITS)
def test_a_habit_has_the_effect_that_it_has_on_a_plain_model(title: str) -> None:
    found = {mode: largest_difference(title, mode) for mode in MODES}
    assert max(found.values()) <= 1e-5, found


def test_the_page_lists_every_habit() -> None:
    """Of its figures only the size is the same on every machine."""
    rows = re.findall(r"^\| (.+?) \| (\S+) \| (\S+) \|$", PAGE.read_text(), re.M)
    listed = {title: max(float(auto), float(triton)) for title, auto, triton in rows if title != "habit"}
    assert list(listed) == list(HABITS)
    assert max(listed.values()) <= 1e-5


def pair(mode: str) -> tuple[ReferenceDiT, DiT]:
    plain, model = ReferenceDiT(), DiT(8, 2, 4, 32, 2, 4, num_classes=10, kernels=mode).eval()
    model.load_state_dict(plain.state_dict())
    return plain, model


def hook(module: nn.Module, kind: str) -> None:
    """Multiply by 1.3 what goes into the module or comes out of it, forward or backward."""
    if kind == "forward":
        module.register_forward_hook(lambda module, args, out: 1.3 * out)
    elif kind == "forward_pre":
        module.register_forward_pre_hook(
            lambda module, args: (1.3 * args[0] if args[0].is_floating_point() else args[0], *args[1:])
        )
    elif kind == "full_backward":
        module.register_full_backward_hook(
            lambda module, into, out: tuple(None if each is None else 1.3 * each for each in into)
        )
    else:
        module.register_full_backward_pre_hook(lambda module, out: tuple(1.3 * each for each in out))


# Not the modules of the second block, which are those of the first.
NAMES = [
    name
    for name, module in pair("auto")[1].named_modules()
    if name and not isinstance(module, nn.ModuleList) and not name.startswith("blocks.1.")
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_on_any_module_does_what_it_does_in_the_reference(kind: str, mode: str) -> None:
    for name in NAMES:
        results = []
        for model in pair(mode):
            hook(model.get_submodule(name), kind)
            out = model(*inputs())
            out.square().sum().backward()
            slopes = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
            results.append((out, slopes))
        (plain, expected), (found, slopes) = results
        assert relative(found, plain) <= 1e-5, name
        scale = max(largest(slope) for slope in expected.values())
        assert slopes.keys() == expected.keys()
        for key, slope in expected.items():
            assert largest(slopes[key] - slope) <= 1e-5 * scale, (name, key)


@pytest.mark.parametrize("mode", MODES)
def test_another_scale_of_attention_is_used(mode: str) -> None:
    plain, model = pair(mode)
    for each in (plain, model):
        each.blocks[1].attn.scale *= 1.7
    assert relative(model(*inputs()), plain(*inputs())) <= 1e-5


@pytest.mark.parametrize("path", ["attn", "attn.proj", "mlp", "mlp.act", "norm1", "adaLN_modulation"])
def test_the_forward_of_a_class_may_be_replaced(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair("triton")
    hooked = copy.deepcopy(model)
    kind = type(model.blocks[0].get_submodule(path))
    for module in hooked.modules():
        if type(module) is kind:
            hook(module, "forward")
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", functools.wraps(forward)(lambda *args: 1.3 * forward(*args)))
    found = model(*inputs())
    monkeypatch.undo()
    assert relative(found, hooked(*inputs())) <= 1e-5


def overlapping(conv: nn.Conv2d) -> nn.Conv2d:
    return nn.Conv2d(4, 32, 4, stride=2, padding=1)


def dilated(conv: nn.Conv2d) -> nn.Conv2d:
    return nn.Conv2d(4, 32, 2, stride=2, dilation=3, padding=1)


def grouped(conv: nn.Conv2d) -> nn.Conv2d:
    return nn.Conv2d(4, 32, 2, stride=2, groups=2)


def unbiased(conv: nn.Conv2d) -> nn.Conv2d:
    return nn.Conv2d(4, 32, 2, stride=2, bias=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [overlapping, dilated, grouped, unbiased])
def test_another_convolution_embeds_patches(make, mode: str) -> None:
    plain, model = pair(mode)
    plain.x_embedder.proj = model.x_embedder.proj = make(model.x_embedder.proj)
    assert relative(model(*inputs()), plain(*inputs())) <= 1e-5


@pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_have_the_gradients_of_the_plain_model(name: str, recompute: str) -> None:
    slopes = []
    for mode, saved in (("reference", "none"), ("triton", recompute)):
        model = build(name, mode)
        model.recompute = saved
        adapted = HABITS["peft LoRA: qkv, proj, fc1, fc2"](model).module
        run(adapted, name).square().sum().backward()
        slopes.append({key: each.grad for key, each in adapted.named_parameters() if each.requires_grad})
    expected, found = slopes
    assert found.keys() == expected.keys()
    for key, slope in expected.items():
        assert relative(found[key], slope) <= 1e-4, key


@pytest.mark.parametrize("mode", MODES)
def test_recomputed_blocks_drop_what_they_dropped(mode: str) -> None:
    slopes = []
    for recompute in ("none", "blocks"):
        _, model = pair(mode)
        model.recompute, model.y_embedder.dropout_prob = recompute, 0.0
        config = peft.LoraConfig(target_modules=["qkv"], lora_dropout=0.5, init_lora_weights=False)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config).train()
        model.blocks[1].mlp.act.register_forward_hook(lambda module, args, out: out * torch.rand(1))
        adapted(*inputs()).square().sum().backward()
        slopes.append({key: each.grad for key, each in adapted.named_parameters() if each.requires_grad})
    assert_close(slopes[1], slopes[0])


@pytest.mark.parametrize("mode", MODES)
def test_an_mlp_needs_no_biases(mode: str) -> None:
    plain, model = pair(mode)
    for each in (plain, model):
        each.blocks[0].mlp.fc1.bias = each.blocks[1].mlp.fc2.bias = each.blocks[1].attn.qkv.bias = None
    assert relative(model(*inputs()), plain(*inputs())) <= 1e-5


COMPILED = ("forward hooks on every layer", "peft LoRA: qkv, proj, fc1, fc2", "torchao int8 weights")


@pytest.mark.parametrize(
    "title",
    [title if title in COMPILED else pytest.param(title, marks=pytest.mark.nightly) for title in HABITS],
)
def test_habits_are_compiled(title: str) -> None:
    torch._dynamo.reset()
    applied = HABITS[title](build("adaln_zero", "triton"))
    compiled = torch.compile(applied.module, backend="aot_eager")
    with torch.no_grad():
        assert relative(run(compiled, "adaln_zero"), run(applied.plain, "adaln_zero")) <= 1e-5


def test_peft_keeps_the_classes() -> None:
    model = build("adaln_zero")
    HABITS['peft LoRA: modules_to_save=["y_embedder"]'](model)
    assert (model.num_classes, model.null_class, model.config["num_classes"]) == (10, 10, 10)
    assert Sampler(model, create_diffusion("2"))([0, 9]).shape == (2, 4, 8, 8)
    with pytest.raises(ConfigError, match="give a label for each image"):
        model(*inputs()[:2])


@pytest.mark.parametrize("name", MODELS)
def test_what_is_called_and_not_fused_is_reported(name: str) -> None:
    model = build(name)
    assert model.called_layers() == {}
    model.blocks[1].attn.proj.register_forward_hook(lambda module, args, out: None)
    model.blocks[0].forward = model.blocks[0].forward.__call__
    HABITS["peft LoRA: qkv, proj, fc1, fc2"](model)
    found = model.called_layers()
    assert found["blocks.1.attn.qkv"] == "a peft.tuners.lora.layer.Linear in place of Linear"
    assert found["blocks.0"] == "its forward was replaced"
    model = build(name)
    HABITS["torchao int8 weights"](model)
    assert model.called_layers()["blocks.1.attn.qkv"] == "its parameters are Int8Tensor"
    assert not any("norm" in layer for layer in model.called_layers())


@pytest.mark.parametrize(
    ("title", "line"),
    [
        ("torch.nn.utils.parametrize", "remove_parametrizations"),
        ("prune.global_unstructured", r"torch\.nn\.utils\.prune\.remove"),
        ("weight_norm and spectral_norm by hooks", "call torch.nn.utils"),
        ("peft LoRA: all-linear", r"merge_and_unload\(\)"),
        ("peft LoRA: modules_to_save of norms, embedders, final layer", r"merge_and_unload\(\)"),
        ("accelerate.cpu_offload", "remove_hook_from_submodules"),
        ("diffusers group offloading: leaf_level", "is offloaded: save the model before"),
        ("diffusers layerwise casting: float8", r"stored as torch\.float8_e4m3fn"),
        ("diffusers layerwise casting: bfloat16, every layer", r"stored as torch\.bfloat16"),
        ("torchao int4 weights", r"quantized or sharded \(IntxUnpackedToInt8Tensor\)"),
        ("torch.ao.quantization.quantize_dynamic", "put the plain layer back"),
    ],
)
def test_saving_a_changed_model_says_what_to_call(title: str, line: str, tmp_path: Path) -> None:
    model = build("adaln_zero")
    applied = HABITS[title](model)
    if title.startswith("torch.ao"):
        model = applied.module
    with pytest.raises(ConfigError, match=line) as error:
        model.save_pretrained(tmp_path / "saved")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "saved").exists()


def test_what_the_message_names_makes_it_savable(tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    for number, title in enumerate(("accelerate.cpu_offload", "peft LoRA: all-linear", "prune.remove")):
        applied = HABITS[title](build("adaln_zero"))
        model = applied.module
        if "LoRA" in title:
            model = model.merge_and_unload()
        elif "offload" in title:
            remove_hook_from_submodules(model)
        model.save_pretrained(tmp_path / str(number))
        loaded = DiT.from_pretrained(tmp_path / str(number))
        assert_close(run(loaded, "adaln_zero"), run(applied.plain, "adaln_zero"))


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_blocks_take_effect_in_the_sampler(name: str) -> None:
    """Blocks whose hooks load their weights, or look at the condition, compute their modulation themselves."""
    model = build(name, "triton")
    flipped = copy.deepcopy(model)
    seen = []
    flipped.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    flipped.blocks[1].register_forward_hook(lambda module, args, out: out.flip(1))
    labels = torch.randn(2, 5, 16) if model.caption_dim else [3, 7]
    plain, drawn = (
        Sampler(each, create_diffusion("3"), SamplerConfig())(labels) for each in (model, flipped)
    )
    assert seen[0].shape[-1] == 32
    assert relative(drawn, plain) > 1e-3
    t, y = torch.tensor([10, 700]), torch.as_tensor(labels)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert_close(flipped.forward_modulated(x, flipped.modulations(t, y)), flipped(x, t, y))


@pytest.mark.parametrize(
    ("title", "found"),
    [
        ("torchao int8 weights", "quantized or stored in 8 bits"),
        ("diffusers layerwise casting: float8", "quantized or stored in 8 bits"),
        ("accelerate.dispatch_model to CPU and disk", "not in memory"),
    ],
)
def test_a_sampler_casts_no_quantized_and_no_offloaded_weights(title: str, found: str) -> None:
    model = build("adaln_zero")
    HABITS[title](model)
    with pytest.raises(ConfigError, match=found):
        Sampler(model, create_diffusion("2"), SamplerConfig(precision="bf16"))


class Halved(DiT):
    def forward(self, *inputs):
        return 0.5 * super().forward(*inputs)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_forward_of_the_model_itself_takes_effect_in_the_sampler(name: str, guided: bool) -> None:
    """The last layers do the same."""
    model = build(name)
    hooked, subclass, monkeypatched, expected = (copy.deepcopy(model) for _ in range(4))
    hooked.register_forward_hook(lambda module, args, out: 0.5 * out)
    subclass.__class__ = Halved
    forward = monkeypatched.forward
    monkeypatched.forward = lambda *inputs: 0.5 * forward(*inputs)
    with torch.no_grad():
        for parameter in expected.final_layer.linear.parameters():
            parameter *= 0.5
    labels = torch.randn(2, 5, 16) if model.caption_dim else [3, 7]
    config = SamplerConfig(guidance=Guidance(3.0 if guided else 1.0))
    plain, *drawn = (
        Sampler(each.train(), create_diffusion("3"), config)(labels)
        for each in (expected, hooked, subclass, monkeypatched)
    )
    for found in drawn:
        assert_close(found, plain)


def test_a_sampler_captures_no_hooks_and_no_offloaded_model() -> None:
    model = build("adaln_zero")
    sampler = Sampler(model, create_diffusion("2"))
    model.final_layer.linear.register_forward_hook(lambda module, args, out: None)
    sampler([1])
    assert "final_layer.linear" in str(sampler.eager_reason)
    model = build("adaln_zero")
    HABITS["accelerate.cpu_offload"](model)
    with pytest.raises(ConfigError, match="not in memory"):
        Sampler(model, create_diffusion("2"))
