"""Learning rates as functions of the step alone."""

import math

SCHEDULES = ("constant", "cosine")


def learning_rate(step: int, *, lr: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """The rate of optimiser step number `step`, counted from 0.

    Linear warm-up to `lr` over `warmup_steps`; then `lr`, or half a cosine that ends at 0 after `total_steps`
    (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * lr * (1 + math.cos(math.pi * min(1.0, done)))
