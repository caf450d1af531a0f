"""Fused Triton operations for Diffusion Transformers, forward and backward, imported as `dit_fast.kernels`.

Each operation is a plain function: a CUDA tensor goes to the Triton kernel, a CPU tensor to the PyTorch text
of the same maths in `reference.py`; `kernels="triton" | "reference"` forces one of them.
"""

if __name__ == "dit_fast.kernels":
    from dit_fast.kernels.adaln import adaln_modulate, gated_residual, gated_residual_adaln
    from dit_fast.kernels.adamw_ema import adamw_ema, grad_square_sum
    from dit_fast.kernels.adamw_tensors import AdamWSettings, AdamWTensors
    from dit_fast.kernels.attention.attention import attention
    from dit_fast.kernels.attention.backends import BACKENDS, AttentionBackend, Choice, choose_backend
    from dit_fast.kernels.forward_mode import jvp
    from dit_fast.kernels.library import KERNEL_MODES, NORMS, KernelMode, Norm, uses_triton
    from dit_fast.kernels.mlp.gelu import gelu
    from dit_fast.kernels.mlp.mlp import ACTIVATIONS, EPILOGUES, Activation, MlpEpilogue, mlp
    from dit_fast.kernels.mlp.swiglu import swiglu
    from dit_fast.kernels.patchify import patch_embed, unpatchify
    from dit_fast.kernels.qk_norm_rope import qk_norm_rope
else:
    # In a checkout the bare name hides Hugging Face's package, whose version transformers asks for: too old to use.
    __version__ = "0"

    def __getattr__(name: str) -> object:
        error = AttributeError if name.startswith("__") else ImportError
        raise error(
            f"import dit_fast.kernels, not kernels ({name}): the bare name belongs to Hugging Face's package"
        )


__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "EPILOGUES",
    "KERNEL_MODES",
    "NORMS",
    "Activation",
    "AdamWSettings",
    "AdamWTensors",
    "AttentionBackend",
    "Choice",
    "KernelMode",
    "MlpEpilogue",
    "Norm",
    "adaln_modulate",
    "adamw_ema",
    "attention",
    "choose_backend",
    "gated_residual",
    "gated_residual_adaln",
    "gelu",
    "grad_square_sum",
    "jvp",
    "mlp",
    "patch_embed",
    "qk_norm_rope",
    "swiglu",
    "unpatchify",
    "uses_triton",
]
