"""Recipes by name, for `--preset`: the demo's, and those that were published (docs/sit.md has their sources)."""

from typing import Any

# What the recipes of DiT, SiT and LightningDiT have in common.
_PUBLISHED: dict[str, Any] = {
    "model": "DiT-XL/2",
    "batch_size": 256,
    "lr": 1e-4,
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "ema_decay": 0.9999,
    "class_dropout_prob": 0.1,
    "conditioning": "adaln_zero",
    "positions": "sincos",
    "norm": "layernorm",
    "mlp": "gelu",
    "qk_norm": False,
    "loss_weighting": "none",
    "timestep_sampling": "uniform",
}
_FLOW: dict[str, Any] = {
    "objective": "flow",
    "path": "linear",
    "prediction": "velocity",
    "learn_sigma": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    # MNIST on two CPU cores in minutes. The paper's recipe with two changes that so short a run needs. In so few steps
    # a model that predicts the noise of 7 x 7 patches does not get to the shapes, one that predicts the image does (Li
    # & He 2025, arXiv:2511.13720, find the same). And 100 noise levels instead of 1000: all of them are sampled, so
    # that the learned variances are used at the step lengths they were learned for.
    "demo": {
        "data": "mnist",
        "hidden_size": 128,
        "depth": 6,
        "num_heads": 4,
        "patch_size": 7,
        "batch_size": 64,
        "steps": 900,
        "lr": 2e-3,
        "beta2": 0.99,
        "ema_decay": 0.995,
        "prediction": "x0",
        "diffusion_steps": 100,
        "log_every": 50,
        "ckpt_every": 500,
    },
    "dit": {
        **_PUBLISHED,
        "objective": "diffusion",
        "prediction": "epsilon",
        "learn_sigma": True,
        "noise_schedule": "linear",
        "diffusion_steps": 1000,
    },
    "sit": {**_PUBLISHED, **_FLOW},
    "lightningdit": {
        **_PUBLISHED,
        **_FLOW,
        "patch_size": 1,
        "batch_size": 1024,
        "lr": 2e-4,
        "beta2": 0.95,
        "positions": "sincos_rope",
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "timestep_sampling": "logit-normal",
        "direction_loss": True,
    },
}
