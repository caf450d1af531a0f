"""What a bfloat16 residual stream costs in loss: python -m benchmarks.analysis.residual [--steps 300].

Three runs of one small DiT on scikit-learn's digits with the same draws: float32, bf16 autocast with a float32 residual
stream, and with a bfloat16 one. Prints how far the mean loss of the last hundred steps lies above that of float32, with
the standard error of the step by step difference.
"""

import argparse
import statistics

from dit_fast.data import open_data
from dit_fast.distributed.world import DeviceName
from dit_fast.training import TrainConfig, Trainer
from dit_fast.training.precision import ResidualDtype, TrainPrecision

RUNS: dict[str, tuple[TrainPrecision, ResidualDtype]] = {
    "float32": ("fp32", "fp32"),
    "bf16, fp32 stream": ("bf16", "fp32"),
    "bf16, bf16 stream": ("bf16", "bf16"),
}
LAST = 100


def losses(precision: TrainPrecision, residual: ResidualDtype, steps: int, device: DeviceName) -> list[float]:
    """The loss of each step; the last `LAST` of them are compared."""
    config = TrainConfig(
        data="digits", hidden_size=64, depth=4, num_heads=2, patch_size=2, batch_size=16, lr=1e-3, beta2=0.99,
        prediction="x0", diffusion_steps=100, precision=precision, residual=residual, device=device,
        log_every=steps,
    )  # fmt: skip
    trainer = Trainer(config, open_data("digits"))
    for step in range(steps):
        trainer.train_step(*trainer.stream.stored(step))
    return [value.loss for value in trainer.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    runs = {name: losses(*run, options.steps, options.device)[-LAST:] for name, run in RUNS.items()}
    exact = statistics.mean(runs["float32"])
    for name, found in runs.items():
        excess = [(loss - plain) / exact for loss, plain in zip(found, runs["float32"], strict=True)]
        error = statistics.stdev(excess) / len(excess) ** 0.5
        print(
            f"{name:18} mean loss {statistics.mean(found):.6f}, above float32 by "
            f"{100 * statistics.mean(excess):.3f} +- {100 * error:.3f} %"
        )


if __name__ == "__main__":
    main()
