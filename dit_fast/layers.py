"""Self-attention and MLP of a block, and how their linear layers are run: whole, or with the bias still to be added."""

from torch import Tensor, nn

from dit_fast.kernels import attention
from dit_fast.kernels.attention import attention_backend
from dit_fast.kernels.recompute import NormRecipe, linear


def matrix_size(module: nn.Module) -> int:
    """Numbers in a module's matrices: the multiply-adds of one token that goes through each of them once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module is exactly a `kind`, so that its parts may be used instead of calling it.

    Not so for a subclass or another module in its place (LoRA, float8), hooks, or a forward that was replaced.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not hooked


def without_bias(
    layer: nn.Module, x: Tensor, recipe: NormRecipe | None = None
) -> tuple[Tensor, Tensor | None]:
    """`layer(x)` as (product, bias still to be added), so that a fused kernel adds it and gives its gradient.

    `recipe`: of x, kept in its place. A layer that is not a plain nn.Linear (LoRA, float8) or has hooks is called as
    it is: (its output, None).
    """
    if isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear):
        return linear(x, layer.weight, recipe=recipe), layer.bias
    return layer(x), None


def with_bias(layer: nn.Module, x: Tensor, recipe: NormRecipe | None = None) -> Tensor:
    """`layer(x)`, keeping `recipe` in place of x where the layer is a plain nn.Linear."""
    if isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias, recipe)
    return layer(x)


class Attention(nn.Module):
    """Multi-head self-attention on one packed projection; rows of `qkv` are [q; k; v], each (heads, head_dim).

    `backend`: "auto" | "triton" | "sdpa" | "flash", see `dit_fast.kernels.attention`.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, *, backend: str = "auto"):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_size {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.backend = backend
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor, recipe: NormRecipe | None = None, kernels: str = "auto") -> Tensor:
        """Attention before the output projection, (N, T, D); `recipe`: of x, kept in its place."""
        if attention_backend(x, self.head_dim, self.backend, kernels) == "triton":
            qkv, bias = without_bias(self.qkv, x, recipe)
        else:
            qkv, bias = with_bias(self.qkv, x, recipe), None
        return attention(qkv, self.num_heads, bias, backend=self.backend, kernels=kernels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(x))


class Mlp(nn.Module):
    """Linear - GELU (tanh approximation) - Linear.

    `epilogue`: who applies the GELU where the kernels run, see `dit_fast.kernels.mlp`; `forward` is plain PyTorch.
    """

    def __init__(self, in_features: int, hidden_features: int, *, epilogue: str = "auto"):
        super().__init__()
        self.epilogue = epilogue
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
