"""dit_fast.accelerate: same answers on somebody else's model, same model, and nothing left of it after undo()."""

import copy
import pickle
from collections import Counter

import accelerate
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

import dit_fast
from benchmarks.models.plain_dit import modulate
from dit_fast.errors import ConfigError
from dit_fast.interop import restore
from dit_fast.models import DiT
from tests.reference_layout import (
    DiTBlock,
    OtherFinalLayer,
    ReferenceDiT,
    SiT,
    TimmAttention,
    TimmMlp,
    inputs,
    randomise,
)
from tests.tolerance import assert_close, assert_trained_alike, largest

# "triton" runs the registered operations, whose CPU side is their reference; "auto" is what a CPU user gets.
MODES = ("auto", "triton")


def diffusers_model(**changes) -> DiTTransformer2DModel:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "out_channels": 8, "num_layers": 2}
    return randomise(
        DiTTransformer2DModel(**{**sizes, "sample_size": 8, "num_embeds_ada_norm": 10, **changes})
    )


MODELS = {"reference": ReferenceDiT, "SiT": SiT, "diffusers": diffusers_model}


def answer(model: nn.Module) -> Tensor:
    x, t, y = inputs()
    out = model(x.to(next(model.parameters()).dtype), t, y)
    return out if isinstance(out, Tensor) else out.sample


def error(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    answer(model).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def size_of_slope(name: str, slopes: dict[str, Tensor]) -> float:
    """Of what is summed in a gradient. A key's bias moves all logits of a query alike: its gradient is rounding."""
    return largest(slopes[name.replace("to_k.bias", "to_q.bias")])


@pytest.mark.parametrize("kernels", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_the_models_own(name, kernels) -> None:
    model = MODELS[name]()
    before, slopes = answer(model), gradients(model)
    assert before.abs().max() > 0.5
    report = dit_fast.accelerate(model, kernels=kernels)
    assert_close(answer(model), before)
    again = gradients(model)
    assert again.keys() == slopes.keys()
    for key, slope in slopes.items():
        assert_close(again[key], slope, scale=size_of_slope(key, slopes), what=key)
    report.undo()
    assert torch.equal(answer(model), before)


@pytest.mark.parametrize("name", MODELS)
def test_float64_agrees_to_its_rounding(name) -> None:
    model = MODELS[name]().double()
    if name != "diffusers":  # the reference leaves its sinusoids in float32
        model.t_embedder.mlp[0].register_forward_pre_hook(lambda _, args: args[0].double())
    before = answer(model)
    dit_fast.accelerate(model, kernels="triton")
    assert_close(answer(model), before)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_stays_the_same_object_throughout(name) -> None:
    model = MODELS[name]()
    modules = {key: (module, type(module), dict(vars(module))) for key, module in model.named_modules()}
    state = model.state_dict(keep_vars=True)
    report = dit_fast.accelerate(model)
    for key, value in model.state_dict(keep_vars=True).items():
        assert value is state[key]
    assert [(key, module) for key, module in model.named_modules()] == [
        (k, m) for k, (m, *_) in modules.items()
    ]
    changed = {key for key, (module, _, content) in modules.items() if vars(module) != content}
    assert changed == set(report.replaced)
    report.undo()
    for key, (module, kind, content) in modules.items():
        assert type(module) is kind, key
        assert vars(module) == content, key


@pytest.mark.parametrize("name", ["reference", "diffusers"])
def test_an_optimiser_that_holds_the_parameters_goes_on(name) -> None:
    trained, twin = MODELS[name](), MODELS[name]()
    steps = [(model, torch.optim.AdamW(model.parameters(), lr=1e-3)) for model in (trained, twin)]
    for number in range(4):
        if number == 2:
            dit_fast.accelerate(trained, kernels="triton")
        for model, optimizer in steps:
            gradients(model)
            optimizer.step()
    assert_trained_alike(dict(trained.named_parameters()), dict(twin.named_parameters()), 4e-3)


class Operations(TorchDispatchMode):
    """Counts the operations of dit_fast that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dit_fast":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operations(model: nn.Module) -> dict[str, int]:
    with Operations() as seen:
        answer(model)
    return dict(seen.count)


def test_the_fused_operations_run() -> None:
    """Per block: norm and modulate, attention, gate with the next norm, MLP, gate."""
    block = {"adaln_modulate": 1, "gated_residual_adaln": 1, "mlp": 1, "gated_residual": 1}
    model = ReferenceDiT()
    assert operations(model) == {}
    report = dit_fast.accelerate(model, kernels="triton")
    expected = {name: 2 * number for name, number in {**block, "attention": 1}.items()}
    assert operations(model) == {**expected, "adaln_modulate": 3}
    report.undo()
    assert operations(model) == {}
    model = diffusers_model()
    dit_fast.accelerate(model, kernels="triton")
    assert operations(model) == {name: 2 * number for name, number in block.items()}


def test_the_report_says_what_and_why() -> None:
    model = ReferenceDiT(depth=4)
    model.blocks[2].forward = model.blocks[2].forward
    report = dit_fast.accelerate(model)
    assert report.replaced == ("blocks.0", "blocks.1", "blocks.3", "final_layer")
    assert str(report).splitlines() == [
        "ReferenceDiT (reference layout): fused blocks.0-1, blocks.3, final_layer",
        "  left blocks.2: has a forward on the instance",
        "  left x_embedder, unpatchify: run by the model's own forward",
    ]
    report.undo()
    assert "forward" in vars(model.blocks[2])  # not ours to take away
    lines = str(dit_fast.accelerate(diffusers_model()))
    assert "DiTTransformer2DModel (diffusers layout): fused transformer_blocks.0-1\n" in lines
    assert "left attn1: it projects to q, k and v separately" in lines


# What somebody else did to the model


@pytest.mark.parametrize("kernels", MODES)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "where", ["blocks.1", "blocks.0.attn", "blocks.0.attn.qkv", "blocks.1.mlp.act", "final_layer.linear"]
)
def test_hooks_still_run(where, when, kernels) -> None:
    model, seen = ReferenceDiT(), []
    expected = ReferenceDiT()

    def double(module, args, output):
        seen.append(where)
        return 2 * output

    expected.get_submodule(where).register_forward_hook(lambda *call: 2 * call[2])
    if when == "before":
        model.get_submodule(where).register_forward_hook(double)
    report = dit_fast.accelerate(model, kernels=kernels)
    assert not seen  # trying a block calls nobody's hook
    assert len(report.replaced) == 3
    if when == "before" and "." in where.removeprefix("blocks."):
        assert where.partition(".")[2].partition(".")[2] in "".join(report.notes.values())
    if when == "after":
        model.get_submodule(where).register_forward_hook(double)
    assert_close(answer(model), answer(expected))
    assert seen == [where]


def test_a_norm_with_hooks_keeps_its_block() -> None:
    model, seen = ReferenceDiT(), []
    model.blocks[0].norm2.register_forward_hook(lambda *call: seen.append(0))
    report = dit_fast.accelerate(model)
    assert report.left["blocks.0"] == "hooks or a replaced forward on norm2"
    model.blocks[1].norm1.register_forward_hook(lambda *call: seen.append(1))  # later
    answer(model)
    assert seen == [0, 1]


class Tripled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize("kind", [nn.LayerNorm, Tripled])
@pytest.mark.parametrize("path", ["blocks.0.norm1", "blocks.1.norm2", "final_layer.norm_final"])
def test_a_norm_that_is_replaced_later_is_called(path: str, kind: type[nn.LayerNorm]) -> None:
    model = ReferenceDiT()
    norm = kind(model.get_submodule(path).normalized_shape, 1e-6)
    nn.init.normal_(norm.weight)
    expected = copy.deepcopy(model)
    expected.set_submodule(path, norm)
    assert dit_fast.accelerate(model).replaced
    before = answer(model)
    model.set_submodule(path, norm)
    assert (answer(model) - before).abs().max() > 1e-3 * before.abs().max()
    assert_close(answer(model), answer(expected))


class Adapter(nn.Module):
    """A layer with a low-rank addition, as LoRA makes."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.down = inner, nn.Linear(inner.in_features, 2)
        self.up = nn.Linear(2, inner.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_count(when) -> None:
    model, expected = ReferenceDiT(), ReferenceDiT()
    adapter = randomise(Adapter(model.blocks[0].attn.qkv))
    expected.blocks[0].attn.qkv = randomise(Adapter(expected.blocks[0].attn.qkv))
    expected.blocks[0].mlp.fc2 = randomise(Adapter(expected.blocks[0].mlp.fc2))
    if when == "before":
        model.blocks[0].attn.qkv, model.blocks[0].mlp.fc2 = (
            adapter,
            randomise(Adapter(model.blocks[0].mlp.fc2)),
        )
    report = dit_fast.accelerate(model, kernels="triton")
    if when == "before":
        assert "TimmAttention is not plain attention" in report.notes["blocks.0"]
    else:
        model.blocks[0].attn.qkv, model.blocks[0].mlp.fc2 = (
            adapter,
            randomise(Adapter(model.blocks[0].mlp.fc2)),
        )
    assert_close(answer(model), answer(expected))
    assert operations(model)["attention"] == operations(model)["mlp"] == 1  # the other block's


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


def adapted(model: nn.Module, dora: bool = False) -> nn.Module:
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=names, use_dora=dora, init_lora_weights=False)
    return get_peft_model(model, config)


def normed(model: nn.Module) -> None:
    for layer in linears(model):
        weight_norm(layer).parametrizations.weight.original0.data *= 1.2


def hooked(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda module, args, out: 1.1 * out)


# What is done to a model; one that returns a module has wrapped the model.
HABITS = {
    "sequential offloading": lambda model: accelerate.cpu_offload(model, torch.device("cpu")) and None,
    "group offloading": lambda model: apply_group_offloading(
        model, torch.device("cpu"), offload_type="leaf_level"
    ),
    "float8 storage": lambda model: apply_layerwise_casting(
        model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("embed", "norm")
    ),
    "LoRA": adapted,
    "DoRA": lambda model: adapted(model, dora=True),
    "pruning": lambda model: [prune.l1_unstructured(each, "weight", 0.3) for each in linears(model)] and None,
    "weight norm": normed,
    "hooks on layers": lambda model: hooked(model, (nn.Linear,)),
    "hooks on activations": lambda model: hooked(model, (nn.GELU, GELU)),
    "int8 weights": lambda model: quantize_(model, Int8WeightOnlyConfig()),
    "float8 weights": lambda model: quantize_(model, Float8WeightOnlyConfig()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kernels", MODES)
@pytest.mark.parametrize("name", ["reference", "diffusers"])
@pytest.mark.parametrize("habit", HABITS)
def test_a_habit_has_its_effect(habit, name, kernels) -> None:
    """The output is that of the plain model with which the same was done, before `accelerate` or after it."""
    plain = MODELS[name]()
    with torch.no_grad():
        unchanged = answer(plain)
        expected = answer(HABITS[habit](plain) or plain)
        if "offloading" not in habit:
            assert error(expected, unchanged) > 1e-3 * largest(unchanged)
        for after in (False, True):
            model = MODELS[name]()
            if after:
                dit_fast.accelerate(model, kernels=kernels)
                found = answer(HABITS[habit](model) or model)
            else:
                wrapped = HABITS[habit](model) or model
                dit_fast.accelerate(model, kernels=kernels)
                found = answer(wrapped)
            assert_close(found, expected)


def parts(model: nn.Module, *kinds: type[nn.Module]) -> list:
    return [part for part in model.modules() if isinstance(part, kinds)]


def set_all(modules: list, name: str, value) -> None:
    for module in modules:
        setattr(module, name, value)


def doubled(model: nn.Module, *kinds: type[nn.Module]) -> None:
    """Other classes, with twice the output."""
    for part in parts(model, *kinds):
        kind = type(part)
        part.__class__ = type(
            "Doubled",
            (kind,),
            {"forward": lambda self, *args, kind=kind, **kw: 2 * kind.forward(self, *args, **kw)},
        )


# Changes of a model's settings, of each family.
SETTINGS = {
    "another activation": (
        lambda model: set_all(parts(model, TimmMlp), "act", nn.ReLU()),
        lambda model: [feed.net.insert(1, nn.Tanh()) for feed in parts(model, FeedForward)],
    ),
    "another GELU": (
        lambda model: set_all(parts(model, nn.GELU), "approximate", "none"),
        lambda model: set_all(parts(model, GELU), "approximate", "none"),
    ),
    "dropout": (
        lambda model: set_all(parts(model.train(), nn.Dropout), "p", 0.5),
        lambda model: set_all(parts(model.train(), nn.Dropout), "p", 0.5),
    ),
    "scale": (lambda model: set_all(parts(model, TimmAttention), "scale", 1.0), None),
    "QK-norm": (lambda model: set_all(parts(model, TimmAttention), "q_norm", nn.LayerNorm(8)), None),
    "no bias": (lambda model: set_all([each.mlp.fc1 for each in model.blocks], "bias", None), None),
    "class of the MLPs": (lambda model: doubled(model, TimmMlp), lambda model: doubled(model, FeedForward)),
    "class of the blocks": (
        lambda model: doubled(model, DiTBlock),
        lambda model: doubled(model, BasicTransformerBlock),
    ),
}


@pytest.mark.parametrize("kernels", MODES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_may_change_later(setting, kernels) -> None:
    for make, change in zip((ReferenceDiT, diffusers_model), SETTINGS[setting], strict=True):
        if change is None:
            continue
        plain, model = make(), make()
        dit_fast.accelerate(model, kernels=kernels)
        unchanged, found = answer(plain), []
        for each in (plain, model):
            change(each)
            torch.manual_seed(0)
            found.append(answer(each))
        assert error(found[0], unchanged) > 1e-5 * largest(unchanged)
        assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ["reference", "diffusers"])
def test_dropout_is_kept(name) -> None:
    model = ReferenceDiT(dropout=0.3) if name == "reference" else diffusers_model(dropout=0.3)
    before = answer(model)
    torch.manual_seed(0)
    dropped = answer(model.train())
    report = dit_fast.accelerate(model, kernels="triton")
    assert "in training mode its own forward runs" in "".join(report.notes.values())
    torch.manual_seed(0)
    assert_close(answer(model), dropped)
    assert_close(answer(model.eval()), before)
    assert operations(model)["mlp"] == 2


def test_training_mode_is_fused_where_nothing_is_drawn() -> None:
    model = ReferenceDiT(class_dropout_prob=0.0, num_classes=11).train()
    before, state = answer(model), torch.get_rng_state()
    dit_fast.accelerate(model, kernels="triton")
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(answer(model), before)
    assert operations(model)["mlp"] == 2


# Same parts, other maths: structure is not trusted


class ErfBlock(DiTBlock):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.mlp.act = nn.GELU()


class RotaryAttention(TimmAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * torch.arange(x.shape[1], dtype=x.dtype)[:, None]


class RotaryBlock(DiTBlock):
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.attn = RotaryAttention(dim, heads, 0.0)


class QkNormBlock(DiTBlock):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.attn.q_norm = nn.LayerNorm(self.attn.head_dim)


class PermutedBlock(DiTBlock):
    """Gates first: the same parts in another order."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate, shift, scale, *_ = self.adaLN_modulation(c).chunk(6, 1)
        return x + gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale))


class RopeBlock(DiTBlock):
    def forward(self, x: Tensor, c: Tensor, rope: Tensor | None = None) -> Tensor:
        return super().forward(x, c)


class AffineBlock(DiTBlock):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm1 = nn.LayerNorm(sizes[0])


@pytest.mark.parametrize("kernels", MODES)
@pytest.mark.parametrize(
    ("block", "kept", "note"),
    [
        (ErfBlock, "attention", "TimmMlp is not Linear - tanh GELU - Linear"),
        (RotaryBlock, "mlp", "RotaryAttention is not plain attention on one qkv"),
        (QkNormBlock, "mlp", "TimmAttention is not plain attention on one qkv"),
    ],
)
def test_a_part_of_other_maths_is_called_as_it_is(block, kept, note, kernels) -> None:
    model = ReferenceDiT(block)
    before = answer(model)
    report = dit_fast.accelerate(model, kernels=kernels)
    assert report.notes["blocks.0"] == f"{note}, and is called unchanged"
    assert_close(answer(model), before)
    if kernels == "triton":
        assert operations(model).keys() & {"mlp", "attention"} == {kept}


def test_a_block_of_other_maths_is_left() -> None:
    model = ReferenceDiT(PermutedBlock)
    model.final_layer = OtherFinalLayer(32, 32).eval()
    before = answer(model)
    report = dit_fast.accelerate(model, kernels="triton")
    assert report.replaced == ()
    assert report.left["blocks.0"] == "does not compute the paper's DiT block"
    assert report.left["final_layer"] == "does not compute the paper's final layer"
    assert torch.equal(answer(model), before)
    assert "fused nothing" in str(report)


def test_fresh_weights_do_not_hide_it() -> None:
    """With zero gates every block is the identity, so the trial draws weights of its own."""
    model = ReferenceDiT(PermutedBlock)
    for block in model.blocks:
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    assert "blocks.1" in dit_fast.accelerate(model).left


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: nn.Linear(2, 2), "Linear is not a model that accelerate knows: it has no list of blocks"),
        (lambda: ReferenceDiT(RopeBlock), r"forward takes \(self, x, c, rope\)"),
        (lambda: ReferenceDiT(AffineBlock), r"AffineBlock\.norm1 is not an nn\.LayerNorm without parameters"),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1),
            "is not a model that accelerate knows",
        ),
        (lambda: DiT(input_size=8, hidden_size=32, depth=1, num_heads=4), "dit_fast's own model"),
        (lambda: nn.DataParallel(ReferenceDiT()), r"DataParallel is a wrapper: give its \.module"),
        (lambda: torch.compile(ReferenceDiT(), backend="eager"), r"compiled.*give its \._orig_mod"),
        (lambda: "DiT-XL/2", "accelerate takes a model, this is a str"),
    ],
)
def test_unknown_models_are_refused_in_one_line(make, line) -> None:
    model = make()
    with pytest.raises(ConfigError, match=line) as caught:
        dit_fast.accelerate(model)
    assert "\n" not in str(caught.value)


def test_words_and_repetition() -> None:
    model = ReferenceDiT()
    with pytest.raises(ConfigError, match="kernels='cuda'"):
        dit_fast.accelerate(model, kernels="cuda")
    dit_fast.accelerate(model)
    with pytest.raises(ConfigError, match=r"accelerated already: restore\(model\) first"):
        dit_fast.accelerate(model)
    restore(model)
    assert dit_fast.accelerate(model).replaced


# Copies, compilation, checkpointing, pipelines


def test_a_copy_is_accelerated_by_itself() -> None:
    model = ReferenceDiT()
    before = answer(model)
    dit_fast.accelerate(model, kernels="triton")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nn.init.zeros_(twin.final_layer.linear.weight)
        nn.init.zeros_(twin.final_layer.linear.bias)
        assert answer(twin).abs().max() == 0  # its own weights, not the model's
        assert operations(twin)["mlp"] == 2
        restore(twin)
        assert operations(twin) == {}
    assert_close(answer(model), before)
    assert operations(model)["mlp"] == 2


@pytest.mark.parametrize("name", ["reference", "diffusers"])
def test_it_compiles_to_one_graph(name) -> None:
    model = MODELS[name](**({"depth": 1} if name == "reference" else {"num_layers": 1}))
    dit_fast.accelerate(model, kernels="triton")
    with torch.no_grad():
        assert_close(answer(torch.compile(model, fullgraph=True, backend="eager")), answer(model))


def test_diffusers_gradient_checkpointing_and_arguments() -> None:
    model = diffusers_model()
    slopes = gradients(model)
    dit_fast.accelerate(model, kernels="triton")
    model.enable_gradient_checkpointing()
    model.train()
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    for key, slope in gradients(model).items():
        assert_close(slope, slopes[key], scale=size_of_slope(key, slopes), what=key)
    model.eval().transformer_blocks[0].set_chunk_feed_forward(4, dim=1)  # its own forward from now on
    assert operations(model)["mlp"] == 1


def test_a_pipelines_transformer() -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(**blocks, block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    pipeline = DiTPipeline(diffusers_model(num_embeds_ada_norm=1000), vae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline([1, 7], generator=generator, num_inference_steps=3, output_type="pt").images

    before = images()
    with pytest.raises(ConfigError, match=r"this is a DiTPipeline: give its \.transformer"):
        dit_fast.accelerate(pipeline)
    dit_fast.accelerate(pipeline.transformer, kernels="triton")
    assert_close(images(), before)
