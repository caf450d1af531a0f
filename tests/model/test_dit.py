"""The drop-in model: golden numbers, sizes, the two kernel paths, re-gridding, saving and loading."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.kernels.launch import record_launches
from dit_fast.model.layers import make_norm
from dit_fast.models import DiT, DiT_models
from tests.golden import CONFIG, GOLDEN, golden_model, seeded
from tests.reference_layout import randomise
from tests.tolerance import FEW, SUM, assert_close, rounding

T = torch.tensor([0, 17, 500, 999])
Y = torch.tensor([0, 1, 2, 4])
MODES = ("reference", "triton")
GRADIENT = SUM + 2 * 64
"""Terms: of a sum over features forward and backward, and over a batch's 64 tokens."""
ANGLES = (999 // 4) ** 2
"""Terms where cosines of a timestep's angles are read: rounded, an angle of 999 is wrong by 999 units of 1."""

# Parameters with the frozen positions, and tensors in the state dict, of the reference's 12 models.
COUNTS = {
    "DiT-XL/2": (675_129_632, 292), "DiT-XL/4": (675_074_432, 292), "DiT-XL/8": (675_683_072, 292),
    "DiT-L/2": (458_102_816, 252), "DiT-L/4": (458_053_760, 252), "DiT-L/8": (458_594_816, 252),
    "DiT-B/2": (130_512_416, 132), "DiT-B/4": (130_475_648, 132), "DiT-B/8": (130_881_536, 132),
    "DiT-S/2": (32_963_360, 132), "DiT-S/4": (32_945_024, 132), "DiT-S/8": (33_148_160, 132),
}  # fmt: skip


def images() -> Tensor:
    return seeded("ax", 4, 4, 8, 8)


def loss(model: DiT, x: Tensor | None = None) -> Tensor:
    return (model(images() if x is None else x, T, Y) * seeded("ag", 4, 8, 8, 8)).sum()


def gradients(model: DiT) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, ANGLES if "t_embedder" in name else GRADIENT, what=name)


# The reference's numbers


@pytest.mark.parametrize("mode", MODES)
def test_forward_is_the_references(mode: str) -> None:
    assert_close(golden_model(kernels=mode)(images(), T, Y), GOLDEN["a.fwd"])


@pytest.mark.parametrize("mode", MODES)
def test_guidance_is_the_references(mode: str) -> None:
    model = golden_model(kernels=mode)
    y = torch.tensor([1, 2, 10, 10])
    out = model.forward_with_cfg(images(), torch.tensor([30, 40, 30, 40]), y, 4.0)
    assert_close(out, GOLDEN["a.cfg"])


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_references(mode: str) -> None:
    expected = {
        name.removeprefix("a.grad."): torch.from_numpy(GOLDEN[name])
        for name in GOLDEN.files
        if name.startswith("a.grad.")
    }
    assert_same_gradients(gradients(golden_model(kernels=mode)), expected)


def test_state_dict_is_the_references() -> None:
    state = DiT(**CONFIG).state_dict()
    assert list(state) == GOLDEN["a.keys"].tolist()
    shapes = [tuple(map(int, re.findall(r"\d+", shape))) for shape in GOLDEN["a.shapes"].tolist()]
    assert [tuple(tensor.shape) for tensor in state.values()] == shapes


def test_a_seed_gives_the_references_initial_weights() -> None:
    torch.manual_seed(0)
    sums = [p.detach().double().abs().sum().item() for p in DiT(**CONFIG).parameters()]
    np.testing.assert_allclose(sums, GOLDEN["a.init_sum"], rtol=rounding(FEW))


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_are_the_papers(name: str) -> None:
    with torch.device("meta"):
        model = DiT_models[name](input_size=32)
    state = model.state_dict()
    assert (sum(p.numel() for p in model.parameters()), len(state)) == COUNTS[name]
    assert next(iter(dict(model.named_parameters()))) == "pos_embed"


def test_registry_holds_the_12_models() -> None:
    assert list(DiT_models) == list(COUNTS)
    assert DiT_models["DiT-S/4"].__name__ == "DiT_S_4"


def test_a_new_model_answers_zero() -> None:
    assert DiT(**CONFIG)(images(), T, Y).abs().max() == 0


# What the model does with its inputs


def test_channels_of_guidance() -> None:
    model, x, y = golden_model(), images(), torch.tensor([1, 2, 10, 10])
    t = torch.tensor([30, 40, 30, 40])
    cond, uncond = model(torch.cat([x[:2], x[:2]]), t, y).chunk(2)
    guided = uncond + 4.0 * (cond - uncond)
    for channels, number in ((3, 3), (None, 4), (1, 1), (9, 4)):
        first, second = model.forward_with_cfg(x, t, y, 4.0, cfg_channels=channels).chunk(2)
        assert_close(first, torch.cat([guided[:, :number], cond[:, number:]], 1))
        assert_close(second, torch.cat([guided[:, :number], uncond[:, number:]], 1))


def test_guidance_reads_only_the_first_half_of_the_images() -> None:
    model, x, y = golden_model(), images(), torch.tensor([1, 2, 10, 10])
    other = torch.cat([x[:2], torch.full_like(x[2:], torch.nan)])
    assert_close(model.forward_with_cfg(other, T, y, 2.0), model.forward_with_cfg(x, T, y, 2.0), 0)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_model(mode: str) -> None:
    model = golden_model(kernels=mode).bfloat16()
    out = model(images().bfloat16(), T, Y)
    assert out.dtype == torch.bfloat16
    expected = torch.from_numpy(GOLDEN["a.fwd"])
    assert (out.float() - expected).abs().max() < 0.03 * expected.abs().max()
    loss(model, images().bfloat16()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_fractional_timesteps() -> None:
    model, x = golden_model(), images()
    assert_close(model(x, T.double(), Y), model(x, T, Y), 0)
    below, between, above = (model(x, T.float() + step, Y) for step in (0.0, 0.5, 1.0))
    assert (between - below).abs().max() > 1e-3
    assert (between - above).abs().max() > 1e-3


def test_labels_are_dropped_in_training_only() -> None:
    model = golden_model(class_dropout_prob=0.5)
    null = torch.full_like(Y, 10)
    model.train()
    torch.manual_seed(2)
    dropped = torch.rand(4) < 0.5
    assert dropped.any()
    assert not dropped.all()
    torch.manual_seed(2)
    trained = model(images(), T, Y)
    model.eval()
    assert_close(trained, model(images(), T, torch.where(dropped, null, Y)), 0)
    assert (model(images(), T, Y) - trained).abs().max() > 1e-3
    forced = model.y_embedder(Y, False, force_drop_ids=torch.tensor([1, 0, 0, 1]))
    assert_close(forced, model.y_embedder.embedding_table.weight[[10, 1, 2, 10]].detach(), 0)


def test_model_without_label_dropout_has_no_null_class() -> None:
    model = DiT(**CONFIG, class_dropout_prob=0.0).train()
    assert model.y_embedder.embedding_table.weight.shape[0] == 10
    state = torch.get_rng_state()
    model(images(), T, Y)
    assert torch.equal(torch.get_rng_state(), state)


def test_positions_are_frozen() -> None:
    model = golden_model()
    assert not model.pos_embed.requires_grad
    assert "pos_embed" not in gradients(model)
    assert not model.regrid(12).pos_embed.requires_grad


def test_fixed_variance_has_no_variance_channels() -> None:
    model = DiT(**CONFIG, learn_sigma=False)
    assert model.out_channels == 4
    assert model(images(), T, Y).shape == (4, 4, 8, 8)


def test_an_image_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"input_size 8x11 is not .* multiple of patch_size 2.* to 8x12"):
        golden_model()(seeded("wide", 4, 4, 8, 11), T, Y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 9}, "9x9 is not a positive multiple of patch_size 2"),
        ({"hidden_size": 66}, "66"),
        ({"num_heads": 5}, "hidden_size 64 is not a multiple of num_heads 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiT(**{**CONFIG, **changes})


# Two kernel paths, one result


def test_kernels_do_not_change_result_or_gradients() -> None:
    model = golden_model(kernels="reference")
    out, expected = model(images(), T, Y), gradients(model)
    model.kernels = "triton"
    parts = (model, model.x_embedder, *model.blocks, model.blocks[1].attn, model.final_layer)
    assert {id(part.backends) for part in parts} == {id(model.backends)}
    assert model.kernels == model.backends.kernels == "triton"
    assert_close(model(images(), T, Y), out)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
def test_recomputation_changes_no_gradient_and_keeps_less(recompute: str) -> None:
    """Bytes kept between the passes, parameters and repeated storages left out, fall; gradients stay."""

    def kept(model: nn.Module) -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(images(), T, Y)
        del out
        return sum(storages.values())

    model = golden_model(kernels="triton")
    plain, expected = kept(model), gradients(model)
    model.recompute = recompute
    assert model.blocks[1].backends.recompute == recompute
    assert kept(model) < {"cheap": 0.8, "blocks": 0.5}[recompute] * plain
    assert_same_gradients(gradients(model), expected)


def test_the_mlps_epilogue_is_chosen_for_the_whole_model() -> None:
    """The launches of a forward pass, recorded on the meta device, are those of the epilogue, in every block."""

    def launched(model: DiT) -> int:
        """How many products with a GELU in their epilogue."""
        with record_launches() as launches:
            model(images().to("meta"), T.to("meta"), Y.to("meta"))
        names = [launch.kernel.fn.__name__ for launch in launches]
        products = names.count("_gemm_gelu_fwd_kernel")
        assert names.count("_gelu_fwd_kernel") + products == CONFIG["depth"]
        return products

    with torch.device("meta"):
        model = DiT(**CONFIG, kernels="triton")
        fused = DiT(**CONFIG, kernels="triton", mlp_epilogue="triton")
    assert (model.mlp_epilogue, launched(model), launched(fused)) == ("auto", 0, CONFIG["depth"])
    model.mlp_epilogue = "triton"
    assert launched(model) == CONFIG["depth"]


@pytest.mark.parametrize(
    ("name", "value"), [("attention", "fast"), ("mlp_epilogue", "fused"), ("recompute", "all")]
)
def test_unknown_attention_epilogue_or_recomputation_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='{value}': choose one of"):
        golden_model(**{name: value})


def test_unknown_kernels_are_refused() -> None:
    model = golden_model()
    with pytest.raises(ValueError, match="kernels='cuda': choose one of 'auto', 'triton', 'reference'"):
        model.kernels = "cuda"
    with pytest.raises(ValueError, match="kernels='cuda'"):
        golden_model(kernels="cuda")(images(), T, Y)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_and_final_layer_alone(mode: str) -> None:
    model = golden_model(kernels=mode)
    c = model.t_embedder(T) + model.y_embedder(Y, False)
    x = model.x_embedder(images()) + model.pos_embed
    for block in model.blocks:
        x = block(x, c)
        assert isinstance(x, Tensor)
    out = model.unpatchify(model.final_layer(x, c))
    assert_close(out, model(images(), T, Y))
    assert_close(out, GOLDEN["a.fwd"])


@pytest.mark.parametrize("mode", MODES)
def test_hooks_of_blocks_fire(mode: str) -> None:
    model, seen = golden_model(kernels=mode), []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, out, index=index: seen.append(index))
    model(images(), T, Y)
    assert seen == [0, 1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conditioning": "in_context"},
        {"conditioning": "cross_attention"},
        {"positions": "rope", "norm": "rmsnorm"},
    ],
    ids=["adaln_zero", "in_context", "cross_attention", "rope"],
)
def test_hooks_of_blocks_see_and_change_tensors(mode: str, recompute: str, options: dict[str, Any]) -> None:
    """As in the reference: a hook on a block gets the (N, T, D) that goes into it and that comes out of it."""
    model = randomise(DiT(8, 2, 4, 32, 2, 4, num_classes=10, kernels=mode, recompute=recompute, **options))
    before = model(images(), T, Y)
    shapes, gradients = [], []
    watched = [
        model.blocks[0].register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape)),
        model.blocks[0].register_forward_hook(lambda module, args, out: shapes.append(out.shape)),
        model.final_layer.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape)),
        model.blocks[1].register_full_backward_hook(lambda module, into, out: gradients.append(out[0].shape)),
    ]
    after = model(images(), T, Y)
    assert_close(after, before, 4 * SUM)
    after.sum().backward()
    tokens = 16 + (2 if "in_context" in options.values() else 0)
    assert shapes[:3] == [(len(T), tokens, 32)] * 3
    assert gradients == [(len(T), tokens, 32)]
    for handle in watched:
        handle.remove()
    model.blocks[0].register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    zeroed = model(images(), T, Y)
    model.blocks[0]._forward_hooks.clear()
    model.blocks[1].register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]), *args[1:]))
    assert_close(zeroed, model(images(), T, Y), 4 * SUM)
    assert (zeroed - before).abs().max() > 1e-3


class Doubled(nn.Linear):
    """A linear layer whose forward is not that of its class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("path", ["attn.proj", "mlp.fc2"])
def test_a_replaced_projection_is_called(path: str) -> None:
    model = golden_model(kernels="reference")
    for block in model.blocks:
        plain = block.get_submodule(path)
        other = Doubled(plain.in_features, plain.out_features)
        other.load_state_dict(plain.state_dict())
        block.set_submodule(path, other)
    out, expected = model(images(), T, Y), gradients(model)
    assert (out - torch.from_numpy(GOLDEN["a.fwd"])).abs().max() > 1e-3
    model.kernels = "triton"
    assert_close(model(images(), T, Y), out)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("path", ["attn", "mlp"])
def test_a_replaced_submodule_is_called(path: str) -> None:
    model = golden_model(kernels="triton")
    for block in model.blocks:
        block.set_submodule(path, torch.nn.Identity())
    with_triton = model(images(), T, Y)
    model.kernels = "reference"
    assert_close(with_triton, model(images(), T, Y))


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("path", ["attn", "attn.proj", "attn.qkv", "mlp", "mlp.fc1", "mlp.fc2"])
def test_hooks_inside_a_block_take_effect(path: str, pre: bool) -> None:
    model = golden_model(kernels="reference")
    for block in model.blocks:
        module = block.get_submodule(path)
        if pre:
            module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        else:
            module.register_forward_hook(lambda module, args, out: 2 * out)
    out = model(images(), T, Y)
    assert (out - torch.from_numpy(GOLDEN["a.fwd"])).abs().max() > 1e-3
    model.kernels = "triton"
    assert_close(model(images(), T, Y), out)


@pytest.mark.parametrize("path", ["attn", "attn.proj", "attn.qkv", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2"])
def test_backward_hooks_inside_a_block_take_effect(path: str) -> None:
    found = []
    for mode in MODES:
        model = golden_model(kernels=mode)
        for block in model.blocks:
            block.get_submodule(path).register_full_backward_hook(lambda module, into, out: (2 * into[0],))
        found.append(gradients(model))
    plain = gradients(golden_model(kernels="reference"))
    assert any(not torch.equal(found[0][name], plain[name]) for name in plain)
    assert_same_gradients(found[1], found[0])


class Scaled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention"])
@pytest.mark.parametrize("path", ["blocks.0.norm1", "blocks.1.norm2", "final_layer.norm_final"])
def test_a_replaced_norm_or_one_with_a_hook_is_called(path: str, conditioning: str, mode: str) -> None:
    """A norm that computes something else was taken for a layer norm."""
    built = {"kernels": mode, "conditioning": conditioning}
    model = golden_model(**built)
    plain = model.get_submodule(path)
    before = model(images(), T, Y)
    plain.register_forward_hook(lambda module, args, out: 3 * out)
    hooked = model(images(), T, Y)
    assert (hooked - before).abs().max() > 1e-4
    model = golden_model(**built)
    other = Scaled(plain.normalized_shape, plain.eps, plain.elementwise_affine)
    other.load_state_dict(plain.state_dict())
    model.set_submodule(path, other)
    assert_close(model(images(), T, Y), hooked)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("path", ["blocks.0.norm1", "blocks.1.norm2", "final_layer.norm_final"])
def test_an_adaptive_norm_with_weights_is_called(path: str, kind: str, mode: str) -> None:
    """Its weights were ignored: shift and scale came from the condition alone."""
    model = golden_model(kernels=mode, norm=kind)
    before = model(images(), T, Y)
    expected = copy.deepcopy(model)
    norm = make_norm(kind, CONFIG["hidden_size"], affine=True)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    weight, bias = norm.weight, getattr(norm, "bias", torch.tensor(0.0))
    expected.get_submodule(path).register_forward_hook(lambda module, args, out: out * weight + bias)
    model.set_submodule(path, norm)
    out = model(images(), T, Y)
    assert (out - before).abs().max() > 1e-2 * before.abs().max()
    assert_close(out, expected(images(), T, Y))
    loss(model).backward()
    assert norm.weight.grad.abs().max() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"bias": False}])
@pytest.mark.parametrize("path", ["blocks.0.norm1", "blocks.0.norm_cross", "final_layer.norm_final"])
def test_a_norm_without_weights_takes_the_place_of_one_with(
    path: str, options: dict[str, bool], mode: str
) -> None:
    model = golden_model(kernels=mode, conditioning="cross_attention")
    with_weights = model.get_submodule(path)
    with torch.no_grad():
        with_weights.weight.fill_(1)
        with_weights.bias.zero_()
    expected = model(images(), T, Y)
    model.set_submodule(path, nn.LayerNorm(CONFIG["hidden_size"], with_weights.eps, **options))
    assert_close(model(images(), T, Y), expected)


class Adapted(nn.Module):
    """A convolution with an adapter, as libraries of adapters put it in a layer's place: `weight` is the layer's."""

    def __init__(self, base: nn.Conv2d):
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.tensor(2.0))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scale


@pytest.mark.parametrize("mode", MODES)
def test_an_adapted_patch_projection_is_called(mode: str) -> None:
    model, scaled = golden_model(kernels=mode), golden_model(kernels=mode)
    adapted = Adapted(model.x_embedder.proj)
    model.x_embedder.proj = adapted
    with torch.no_grad():
        for parameter in scaled.x_embedder.proj.parameters():
            parameter.mul_(2)
    assert_close(model(images(), T, Y), scaled(images(), T, Y))
    model(images(), T, Y).square().sum().backward()
    assert adapted.scale.grad is not None
    assert adapted.scale.grad != 0


@pytest.mark.parametrize("mode", MODES)
def test_an_exported_model_takes_other_batches(mode: str) -> None:
    model, batch = golden_model(kernels=mode), torch.export.Dim("batch", min=2)
    inputs = (images(), T, Y)
    exported = torch.export.export(
        model, inputs, dynamic_shapes=({0: batch}, {0: batch}, {0: batch})
    ).module()
    more = tuple(torch.cat([tensor, tensor, tensor]) for tensor in inputs)
    assert_close(exported(*more), model(*more))


@pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])
def test_vmap_without_gradients(recompute: str) -> None:
    model = golden_model(kernels="triton", recompute=recompute)
    many = torch.stack([images(), 2 * images()])
    with torch.no_grad():
        mapped = torch.func.vmap(lambda x: model(x, T, Y))(many)
        assert_close(mapped, torch.stack([model(x, T, Y) for x in many]))


@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention"])
def test_a_sharded_block_hands_on_no_parameter_that_is_freed(conditioning: str) -> None:
    """The next block adds the bias of an MLP, when `fully_shard` has freed its own block's parameters."""
    built = {"kernels": "triton", "conditioning": conditioning}
    expected = gradients(golden_model(**built))
    model = golden_model(**built)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

        def check(module: nn.Module, args: tuple[Any, ...]) -> None:
            pending = args[0].bias
            assert pending is None or pending.untyped_storage().size() > 0

        # For a hook of anybody else a block is run without the fusion that is tested here.
        check.__module__ = "torch.distributed.fsdp"
        for module in (*model.blocks, model.final_layer):
            module.register_forward_pre_hook(check)
        found = {name: gradient.full_tensor() for name, gradient in gradients(model).items()}
    finally:
        dist.destroy_process_group()
    assert_same_gradients(found, expected)


# Another size


@pytest.mark.parametrize("size", [16, (8, 12), (12, 4)])
def test_extended_grid_is_that_of_a_model_of_the_size(size: int | tuple[int, int]) -> None:
    model = golden_model()
    fresh = DiT(**{**CONFIG, "input_size": size})
    assert model.regrid(size) is model
    assert_close(model.pos_embed, fresh.pos_embed.detach(), 0)
    fresh.load_state_dict(model.state_dict())
    height, width = (size, size) if isinstance(size, int) else size
    x = seeded("new size", 4, 4, height, width)
    out = model(x, T, Y)
    assert out.shape == (4, 8, height, width)
    assert_close(out, fresh.eval()(x, T, Y), 0)
    # A model of another size answers the same, without being told beforehand.
    assert_close(golden_model()(x, T, Y), out)


def test_interpolated_grid_spans_the_old_one() -> None:
    model = golden_model()
    old = model.pos_embed.detach().reshape(4, 4, 64).clone()
    model.regrid((16, 8), "interpolate")
    new = model.pos_embed.detach().reshape(8, 4, 64)
    # Every second row of the doubled height is an old row; the width stays as it is.
    assert_close(new[::2], old, 1)
    # The odd rows stand half-way: the row's half of the width encodes 0.5, 1.5, ...; the column's stays.
    omega = 1 / 10000 ** (torch.arange(16, dtype=torch.float64) / 16)
    assert_close(new[1, 0, 32:48], torch.sin(0.5 * omega).float(), 1)
    assert_close(new[1::2, :, :32], old[:, :, :32], 1)
    assert model(seeded("tall", 4, 4, 16, 8), T, Y).shape == (4, 8, 16, 8)


def test_regrid_refuses() -> None:
    model = golden_model()
    with pytest.raises(
        ConfigError, match="'stretch': choose 'extend' or 'interpolate' where positions='sincos'"
    ):
        model.regrid(16, "stretch")
    with pytest.raises(ConfigError, match="9x8 is not a positive multiple of patch_size 2"):
        model.regrid((9, 8))
    assert_close(model(images(), T, Y), GOLDEN["a.fwd"])


# Saving and loading


def test_saved_model_comes_back(tmp_path: Path) -> None:
    model = golden_model().regrid((8, 12))
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = DiT.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert not loaded.training
    assert not loaded.pos_embed.requires_grad
    assert [name for name, p in loaded.named_parameters() if not p.requires_grad] == ["pos_embed"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = seeded("wide", 4, 4, 8, 12)
    assert_close(loaded(x, T, Y), model(x, T, Y).detach(), 0)


def test_averaged_weights_are_loaded_by_name(tmp_path: Path) -> None:
    model = golden_model()
    model.save_pretrained(tmp_path)
    ema = copy.deepcopy(model)
    with torch.no_grad():
        ema.final_layer.linear.bias.add_(1)
    ema.save_pretrained(tmp_path / "ema")
    (tmp_path / "ema" / "model.safetensors").rename(tmp_path / "ema.safetensors")
    assert_close(
        DiT.from_pretrained(tmp_path).final_layer.linear.bias, model.final_layer.linear.bias.detach(), 0
    )
    loaded = DiT.from_pretrained(tmp_path, weights="ema", kernels="triton")
    assert_close(loaded.final_layer.linear.bias, ema.final_layer.linear.bias.detach(), 0)
    assert loaded.kernels == "triton"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_config(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_config(f, film=True), r"config\.json .*unknown key 'film'"),
        (lambda f: change_config(f, qk_norm=1), r"qk_norm = 1"),
        (lambda f: change_config(f, norm="batchnorm"), r"norm = 'batchnorm'"),
        (lambda f: change_config(f, hidden_size="64"), "hidden_size = '64'"),
        (lambda f: change_config(f, learn_sigma=1), "learn_sigma = 1"),
        (lambda f: change_config(f, num_heads=True), "num_heads = True"),
        (lambda f: change_config(f, num_classes=-1), "num_classes = -1"),
        (lambda f: drop_config(f, "num_heads"), "missing key 'num_heads'"),
        (lambda f: change_config(f, depth=3), "holds 2 blocks, config.json says depth 3"),
        (lambda f: change_config(f, num_classes=9), r"table.weight is \(11, 64\), expected \(10, 64\)"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json: holds a JSON array, expected an object"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: damaged or not JSON"),
        (lambda f: (f / "config.json").unlink(), r"config\.json does not exist"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors does not exist"),
        (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors is not a readable"),
    ],
)  # fmt: skip
def test_damaged_model_is_refused(damage, message: str, tmp_path: Path) -> None:
    golden_model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        DiT.from_pretrained(tmp_path)
