"""Dormand and Prince's adaptive method of order 5, by torchdiffeq, for samples and likelihoods of a flow."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dit_fast.errors import MissingExtraError

State = TypeVar("State", torch.Tensor, tuple[torch.Tensor, ...])

ATOL, RTOL = 1e-6, 1e-3
"""Default tolerances, as in SiT."""


def dopri5(
    slope: Callable[[float, State], State],
    state: State,
    start: float,
    end: float,
    atol: float = ATOL,
    rtol: float = RTOL,
) -> State:
    """Integrate an ODE; the last step ends exactly at `end`.

    Args:
        slope: slope(t, state), shaped like the state.
        state: Initial state, a tensor or a tuple of tensors (N, ...). The error of a step is a mean over all of it, so
            that step sizes depend on the batch.
        start: First time.
        end: Last time.
        atol: Absolute tolerance of a step.
        rtol: Relative tolerance of a step.

    Returns:
        The state at `end`.

    Raises:
        MissingExtraError: torchdiffeq is not installed.
    """
    odeint = require_torchdiffeq()
    first = state if isinstance(state, torch.Tensor) else state[0]
    times = torch.tensor([start, end], dtype=torch.float64, device=first.device)
    # Without step_t the last step passes the end, where the model was not trained, and is interpolated back.
    states: Any = odeint(
        lambda t, state: slope(float(t), state),
        state,
        times,
        method="dopri5",
        atol=atol,
        rtol=rtol,
        options={"step_t": times[1:]},
    )
    ends: Any = states[-1] if isinstance(state, torch.Tensor) else tuple(part[-1] for part in states)
    result: State = ends
    return result


def require_torchdiffeq() -> Callable[..., Any]:
    """torchdiffeq's `odeint`. Raises MissingExtraError where it is not installed."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise MissingExtraError(
            "torchdiffeq is not installed; pip install 'dit-fast[ode]', or choose heun instead of dopri5"
        ) from error
    solve: Callable[..., Any] = odeint
    return solve
