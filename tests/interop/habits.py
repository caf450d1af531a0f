"""What users of PyTorch, peft, accelerate, diffusers and torchao do to a model, and the plain model that does the same.

`python -m tests.interop.habits` prints the table of docs/adapters.md.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from dit_fast.model.dit import DiT
from dit_fast.model.embedders import CaptionEmbedder
from tests.tolerance import relative

MODELS: dict[str, dict[str, Any]] = {
    "adaln_zero": {},
    "adaln": {
        "conditioning": "adaln",
        "positions": "rope",
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "qk_norm": True,
    },
    "in_context": {"conditioning": "in_context", "positions": "learned", "qk_norm": True},
    "cross_attention": {
        "conditioning": "cross_attention",
        "caption_dim": 16,
        "mlp": "swiglu",
        "norm": "rmsnorm",
    },
}
LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


def build(name: str, kernels: str = "reference") -> DiT:
    """A small model; its weights, and what a habit draws after it, are the same for the same name."""
    torch.manual_seed(0)
    model = DiT(8, 2, 4, 32, 2, 4, num_classes=10, kernels=kernels, **MODELS[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def run(model: Any, name: str) -> Tensor:
    """The model's output for three images, the last of the null class."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    captions = torch.randn(3, 5, 16, generator=generator)
    captions[0, 3:] = captions[2] = 0
    y = captions if MODELS[name].get("caption_dim") else torch.tensor([1, 7, 10])
    out = model(x, torch.tensor([0, 321, 999]), y)
    return out if isinstance(out, Tensor) else out.sample


class Applied(NamedTuple):
    """A module to call, and the plain model that must have the same output."""

    module: Any
    plain: nn.Module


Habit = Callable[[DiT], Applied]
HABITS: dict[str, Habit] = {}


def habit(name: str) -> Callable[[Habit], Habit]:
    def register(function: Habit) -> Habit:
        HABITS[name] = function
        return function

    return register


def owners(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Module,)) -> Iterable[nn.Module]:
    """Modules that own parameters, but for the model and the embedder of captions."""
    for module in model.modules():
        owns = any(True for _ in module.parameters(recurse=False))
        if owns and isinstance(module, kinds) and not isinstance(module, DiT | CaptionEmbedder):
            yield module


def plain_of(model: DiT) -> DiT:
    plain = copy.deepcopy(model)
    plain.kernels = "reference"
    return plain


def scaled(model: DiT, factor: float, bias: bool = True, kinds: Any = (nn.Module,)) -> DiT:
    """The plain model with the weights of its layers multiplied."""
    plain = plain_of(model)
    with torch.no_grad():
        for module in owners(plain, kinds):
            for name, parameter in module.named_parameters(recurse=False):
                if bias or name == "weight":
                    parameter *= factor
    return plain


# Hooks


@habit("forward hooks on every layer")
def _(model: DiT) -> Applied:
    plain = scaled(model, 1.2)
    for module in owners(model):
        module.register_forward_hook(lambda module, args, out: 1.2 * out)
    return Applied(model, plain)


@habit("forward pre-hooks on every layer")
def _(model: DiT) -> Applied:
    plain = scaled(model, 1.2, bias=False, kinds=(nn.Linear, nn.Conv2d))
    for module in owners(model, (nn.Linear, nn.Conv2d)):
        module.register_forward_pre_hook(lambda module, args: (1.2 * args[0], *args[1:]))
    return Applied(model, plain)


@habit("forward hooks with keyword arguments")
def _(model: DiT) -> Applied:
    plain = scaled(model, 1.2)
    for module in owners(model):
        module.register_forward_hook(lambda module, args, kwargs, out: 1.2 * out, with_kwargs=True)
    return Applied(model, plain)


class GlobalHook:
    """A call of the model under a hook on all modules, as profilers and debuggers register one."""

    def __init__(self, model: DiT):
        self.model = model

    def __call__(self, *inputs: Tensor) -> Tensor:
        mine = set(map(id, owners(self.model)))
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: 1.2 * out if id(module) in mine else None
        )
        try:
            return self.model(*inputs)
        finally:
            handle.remove()


@habit("a global forward hook")
def _(model: DiT) -> Applied:
    return Applied(GlobalHook(model), scaled(model, 1.2))


@habit("a forward assigned to every layer")
def _(model: DiT) -> Applied:
    plain = scaled(model, 1.2)
    for module in owners(model):
        forward = module.forward
        module.forward = lambda *args, forward=forward: 1.2 * forward(*args)
    return Applied(model, plain)


# Parametrizations and pruning


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def baked(model: DiT) -> Applied:
    """The plain model with the weights that the layers of `model` compute with."""
    plain = build_like(model)
    with torch.no_grad():
        for name, module in plain.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                used = getattr(model.get_submodule(name), key)
                parameter.copy_(used.dequantize() if hasattr(used, "qdata") else used)
    return Applied(model, plain)


def build_like(model: DiT) -> DiT:
    return DiT(**model.config, kernels="reference").eval()


@habit("torch.nn.utils.parametrize")
def _(model: DiT) -> Applied:
    plain = scaled(model, 2.0, bias=False)
    for module in list(owners(model)):
        parametrize.register_parametrization(module, "weight", Doubled())
    return Applied(model, plain)


@habit("parametrizations: weight_norm, spectral_norm, orthogonal")
def _(model: DiT) -> Applied:
    kinds = parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal
    for number, module in enumerate(list(owners(model, (nn.Linear,)))):
        kinds[number % 3](module)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("original0"):
                parameter *= 1.5
    return baked(model.eval())


@habit("weight_norm and spectral_norm by hooks")
def _(model: DiT) -> Applied:
    plain = plain_of(model)
    for module in owners(model, (nn.Linear,)):
        nn.utils.weight_norm(module)
    with torch.no_grad():
        for module in owners(model, (nn.Linear,)):
            module.weight_g *= 1.5
        for module in owners(plain, (nn.Linear,)):
            module.weight *= 1.5
    nn.utils.spectral_norm(model.x_embedder.proj)
    with torch.no_grad():
        weight = plain.x_embedder.proj.weight
        sigma = model.x_embedder.proj.weight_u @ weight.flatten(1) @ model.x_embedder.proj.weight_v
        weight /= sigma
    return Applied(model.eval(), plain)


def masks(model: DiT) -> list[tuple[nn.Module, str]]:
    return [(module, "weight") for module in owners(model, LAYERS)]


@habit("prune.global_unstructured")
def _(model: DiT) -> Applied:
    prune.global_unstructured(masks(model), pruning_method=prune.L1Unstructured, amount=0.3)
    return baked(model)


@habit("prune.ln_structured and random_unstructured, twice")
def _(model: DiT) -> Applied:
    for module, name in masks(model):
        prune.ln_structured(module, name, amount=0.2, n=2, dim=0)
        prune.random_unstructured(module, name, amount=0.2)
    return baked(model)


@habit("prune.remove")
def _(model: DiT) -> Applied:
    for module, name in masks(model):
        prune.l1_unstructured(module, name, amount=0.3)
        prune.remove(module, name)
    return baked(model)


# Adapters

LISTS: dict[str, Any] = {
    "qkv, proj, fc1, fc2": ["qkv", "proj", "fc1", "fc2", "w12", "w3"],
    "all-linear": "all-linear",
    "embedders and modulation": [
        "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table", "y_embedder.mlp.0",
        "adaLN_modulation.1", "final_layer.linear",
    ],
    "a pattern": r"blocks\.[01]\.(attn|cross|mlp)\.(qkv|q|kv|fc2|w3)",
}  # fmt: skip


def adapted(model: DiT, config: Any) -> Applied:
    """peft's adapters of random weights; the plain model is their merge."""
    import peft

    torch.manual_seed(2)
    with_adapters = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in with_adapters.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    merged = copy.deepcopy(with_adapters).merge_and_unload()
    merged.kernels = "reference"
    return Applied(with_adapters, merged)


def lora(targets: Any, **options: Any) -> Habit:
    def apply(model: DiT) -> Applied:
        from peft import LoraConfig

        names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
        present = targets
        if isinstance(targets, list):
            present = [name for name in targets if any(own.endswith(name) for own in names)]
        return adapted(model, LoraConfig(r=4, lora_alpha=8, target_modules=present, **options))

    return apply


for _title, _targets in LISTS.items():
    HABITS[f"peft LoRA: {_title}"] = lora(_targets)
for _title in ("qkv, proj, fc1, fc2", "all-linear"):
    HABITS[f"peft DoRA: {_title}"] = lora(LISTS[_title], use_dora=True)
HABITS['peft LoRA: modules_to_save=["y_embedder"]'] = lora("all-linear", modules_to_save=["y_embedder"])
HABITS["peft LoRA: modules_to_save of norms, embedders, final layer"] = lora(
    ["qkv"], modules_to_save=["norm1", "x_embedder", "t_embedder", "final_layer", "q_norm"]
)


def other_adapters(name: str, **options: Any) -> Habit:
    def apply(model: DiT) -> Applied:
        import peft

        return adapted(model, getattr(peft, name)(**options))

    return apply


_ATTENTION = ["qkv", "attn.proj"]
HABITS["peft LoHa"] = other_adapters("LoHaConfig", r=2, alpha=4, target_modules=_ATTENTION)
HABITS["peft LoKr"] = other_adapters("LoKrConfig", r=2, alpha=4, target_modules=_ATTENTION)
HABITS["peft IA3"] = other_adapters(
    "IA3Config", target_modules=[*_ATTENTION, "fc2", "w3"], feedforward_modules=["fc2", "w3"]
)
HABITS["peft OFT"] = other_adapters("OFTConfig", r=0, oft_block_size=8, target_modules=_ATTENTION)
HABITS["peft VeRA"] = other_adapters("VeraConfig", r=4, target_modules=["attn.proj"])


@habit("peft: inject_adapter_in_model, two adapters, one active")
def _(model: DiT) -> Applied:
    import peft

    torch.manual_seed(2)
    for name in ("one", "two"):
        config = peft.LoraConfig(r=4, target_modules=["qkv", "proj"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.set_adapter("two")
    plain = plain_of(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.merge(adapter_names=["two"])
            plain.set_submodule(name, module.get_base_layer())
    return Applied(model.eval(), plain.eval())


# Offloading and casting


@habit("accelerate.cpu_offload")
def _(model: DiT) -> Applied:
    from accelerate import cpu_offload

    plain = plain_of(model)
    cpu_offload(model, torch.device("cpu"))
    return Applied(model, plain)


@habit("accelerate.cpu_offload of a model with peft LoRA")
def _(model: DiT) -> Applied:
    from accelerate import cpu_offload

    applied = HABITS["peft LoRA: qkv, proj, fc1, fc2"](model)
    cpu_offload(applied.module, torch.device("cpu"))
    return applied


@habit("accelerate.disk_offload")
def _(model: DiT) -> Applied:
    from accelerate import disk_offload

    plain = plain_of(model)
    disk_offload(model, tempfile.mkdtemp(), torch.device("cpu"))
    return Applied(model, plain)


@habit("accelerate.cpu_offload of whole blocks")
def _(model: DiT) -> Applied:
    from accelerate import cpu_offload

    plain = plain_of(model)
    classes = [
        type(model.blocks[0]).__name__,
        type(model.final_layer).__name__,
        "Attention",
        "CrossAttention",
    ]
    cpu_offload(model, torch.device("cpu"), preload_module_classes=classes)
    return Applied(model, plain)


@habit("accelerate.dispatch_model to CPU and disk")
def _(model: DiT) -> Applied:
    from accelerate import dispatch_model

    plain = plain_of(model)
    places = {name: "disk" for name, _ in model.named_children()} | {"pos_embed": "cpu", "t_embedder": "cpu"}
    dispatch_model(model, places, main_device="cpu", offload_dir=tempfile.mkdtemp(), force_hooks=True)
    return Applied(model, plain)


def group_offloading(kind: str, **options: Any) -> Habit:
    def apply(model: DiT) -> Applied:
        from diffusers.hooks import apply_group_offloading

        plain, device = plain_of(model), torch.device("cpu")
        apply_group_offloading(
            model, device, device, kind, offload_to_disk_path=tempfile.mkdtemp(), **options
        )
        return Applied(model, plain)

    return apply


HABITS["diffusers group offloading: leaf_level"] = group_offloading("leaf_level")
HABITS["diffusers group offloading: block_level"] = group_offloading("block_level", num_blocks_per_group=1)
HABITS["diffusers group offloading: block_level of 2"] = group_offloading(
    "block_level", num_blocks_per_group=2
)


def layerwise_casting(storage: torch.dtype, **options: Any) -> Habit:
    def apply(model: DiT) -> Applied:
        from diffusers.hooks import apply_layerwise_casting

        plain = plain_of(model)
        apply_layerwise_casting(model, storage, torch.float32, **options)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(model.get_parameter(name).to(torch.float32))
        return Applied(model, plain)

    return apply


HABITS["diffusers layerwise casting: float8"] = layerwise_casting(torch.float8_e4m3fn)
HABITS["diffusers layerwise casting: bfloat16, every layer"] = layerwise_casting(
    torch.bfloat16, skip_modules_pattern=("none",)
)
HABITS["diffusers layerwise casting: float8, the whole model"] = layerwise_casting(
    torch.float8_e4m3fn, skip_modules_pattern=None
)


# Quantized weights


def quantized(make: Callable[[Any], Any], dynamic: bool = False) -> Habit:
    def apply(model: DiT) -> Applied:
        import torchao.quantization as ao

        ao.quantize_(model, make(ao))
        return Applied(model, every_layer_called(model)) if dynamic else baked(model)

    return apply


class Called(nn.Module):
    """A module that calls another."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def every_layer_called(model: DiT) -> DiT:
    """The model with its linear layers behind others, so that they are called.

    On the same kernels: a difference of one rounding takes an activation to another of 256 values.
    """
    called = copy.deepcopy(model)
    for name, module in list(called.named_modules()):
        if "Linear" in type(module).__name__ and ".lora_" not in name and "base_layer" not in name:
            called.set_submodule(name, Called(module))
    return called


HABITS["torchao int8 weights"] = quantized(lambda ao: ao.Int8WeightOnlyConfig())
HABITS["torchao int8 weights and activations"] = quantized(
    lambda ao: ao.Int8DynamicActivationInt8WeightConfig(), dynamic=True
)
HABITS["torchao float8 weights"] = quantized(lambda ao: ao.Float8WeightOnlyConfig())
HABITS["torchao int4 weights"] = quantized(
    lambda ao: ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(8)),
)


@habit("peft LoRA on torchao int8 weights")
def _(model: DiT) -> Applied:
    import peft

    HABITS["torchao int8 weights"](model)
    config = peft.LoraConfig(r=4, target_modules=["qkv", "attn.proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    return Applied(adapted, every_layer_called(model))


@habit("torch.ao.quantization.quantize_dynamic")
def _(model: DiT) -> Applied:
    from torch.ao.quantization import quantize_dynamic

    module = quantize_dynamic(model, {nn.Linear})
    return Applied(module, every_layer_called(module))


# Other modules and attributes


@habit("nn.Sequential(layer, dropout) in every layer's place")
def _(model: DiT) -> Applied:
    plain = plain_of(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LAYERS):
            model.set_submodule(name, nn.Sequential(module, nn.Dropout(0.1)))
    return Applied(model.eval(), plain)


@habit("checkpoint_wrapper on every block")
def _(model: DiT) -> Applied:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    plain = plain_of(model)
    kind = type(model.blocks[0])
    apply_activation_checkpointing(model, check_fn=lambda module: type(module) is kind)
    return Applied(model, plain)


@habit("functional_call with other weights")
def _(model: DiT) -> Applied:
    plain = scaled(model, 1.2)
    weights = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    return Applied(lambda *inputs: torch.func.functional_call(model, weights, inputs), plain)


def largest_difference(title: str, kernels: str) -> float:
    """Largest difference from the plain model, over its largest value, among MODELS."""
    found = []
    for name in MODELS:
        applied = HABITS[title](build(name, kernels))
        with torch.no_grad():
            found.append(relative(run(applied.module, name), run(applied.plain, name)))
    return max(found)


def main() -> None:
    print('| habit | `kernels="auto"` | `kernels="triton"` |\n|---|---|---|')
    for title in HABITS:
        auto, triton = (largest_difference(title, kernels) for kernels in ("auto", "triton"))
        print(f"| {title} | {auto:.0e} | {triton:.0e} |")


if __name__ == "__main__":
    main()
