"""Error of the solvers of flow matching at equal evaluations: `python -m benchmarks.studies.flow_solvers`.

The model is the exact one of a mixture of four Gaussians in the plane: the error is that of the solver alone, the root
mean square distance from the same samples at 4000 steps of UniPC, over the spread of the data.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from dit_fast.diffusion.paths import PATHS
from dit_fast.sampling.runge_kutta import TABLEAUS, evaluation_times, runge_kutta
from dit_fast.sampling.schedule import VELOCITY_SOLVERS, NoiseSchedule, sampling_schedule
from dit_fast.sampling.solvers import DETERMINISTIC, Denoised, ddim
from dit_fast.utils.files import write_atomically

RESULT = Path("benchmarks/results/cpu/flow_solvers.json")
EVALUATIONS = (12, 24, 48, 96)
SOLVERS = ("ddim", "straight-heun", "dpm++2m", "unipc", "euler", "midpoint", "heun", "heun3", "rk4")
MEANS = torch.tensor([[1.0, 0.5], [-1.0, 0.8], [0.3, -1.0], [-0.6, -0.4]], dtype=torch.float64)
DEVIATION = 0.15


def predicted_data(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x_0 | x] of the mixture, (N, 2, 1, 1)."""
    flat, total = x.flatten(1), alpha**2 * DEVIATION**2 + sigma**2
    weights = (-((flat[:, None] - alpha * MEANS) ** 2).sum(2) / (2 * total)).softmax(1)
    gain = alpha * DEVIATION**2 / total
    return (weights[..., None] * (MEANS + gain * (flat[:, None] - alpha * MEANS))).sum(1).view(x.shape)


def samples(path: str, solver: str, evaluations: int, x: Tensor) -> Tensor:
    """The samples of a solver that spends `evaluations` on each."""
    stages = {"straight-heun": 2}.get(solver, len(TABLEAUS[solver].stages) if solver in TABLEAUS else 1)
    schedule = sampling_schedule(
        {"objective": "flow", "path": path}, evaluations // stages, solver, learn_sigma=False
    )
    if solver in VELOCITY_SOLVERS:
        return _in_time(schedule, solver, x)

    def denoise(x: Tensor, i: int) -> Denoised:
        return Denoised(predicted_data(x, schedule.alphas[i], schedule.sigmas[i]))

    *_, x = (ddim if solver == "ddim" else DETERMINISTIC[solver])(denoise, x, schedule)
    return x


def _in_time(schedule: NoiseSchedule, solver: str, x: Tensor) -> Tensor:
    assert schedule.path is not None
    # The model of the velocity is finite at t = 1, its equation is not.
    times = torch.from_numpy(evaluation_times(schedule, solver)).clamp(max=1 - 1e-9)
    point = PATHS[schedule.path](times)
    (alpha_rate, sigma_rate), alpha, sigma = point.rates(), point.alpha, point.sigma

    def velocity(x: Tensor, i: int) -> Tensor:
        data = predicted_data(x, float(alpha[i]), float(sigma[i]))
        return alpha_rate[i] * data + sigma_rate[i] * (x - alpha[i] * data) / sigma[i]

    *_, x = runge_kutta(velocity, x, schedule, solver)
    return x


def table(count: int = 2000) -> dict[str, dict[str, dict[str, float]]]:
    """Relative error by path, solver and number of evaluations."""
    noise = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for path in ("linear", "gvp", "vp"):
        exact = samples(path, "unipc", 4000, noise)
        errors[path] = {
            solver: {
                str(n): float((samples(path, solver, n, noise) - exact).square().mean().sqrt() / exact.std())
                for n in EVALUATIONS
            }
            for solver in SOLVERS
        }
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    found = table()
    for path, rows in found.items():
        for solver, row in rows.items():
            print(f"| `{path}` | `{solver}` | " + " | ".join(f"{value:.1e}" for value in row.values()) + " |")
    text = json.dumps({"torch": torch.__version__, "samples": 2000, "errors": found}, indent=1) + "\n"
    write_atomically(out, lambda temporary: temporary.write_text(text))
