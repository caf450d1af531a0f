"""Sampling: solvers, guidance, the batch sampler and grids of images."""

from dit_fast.sampling.config import PRECISIONS, SamplerConfig
from dit_fast.sampling.guidance import Guidance, classifier_cond_fn
from dit_fast.sampling.sampler import Sampler, Step
from dit_fast.sampling.schedule import (
    NoiseSchedule,
    default_solver,
    diffusion_schedule,
    flow_schedule,
    sampling_schedule,
)
from dit_fast.sampling.solvers import SOLVERS
from dit_fast.utils.images import draw_grid, save_grid, short_label, to_pil, to_uint8

# Earlier names.
Nodes = NoiseSchedule
diffusion_nodes, flow_nodes, sampling_nodes = diffusion_schedule, flow_schedule, sampling_schedule

__all__ = [
    "PRECISIONS",
    "SOLVERS",
    "Guidance",
    "NoiseSchedule",
    "Sampler",
    "SamplerConfig",
    "Step",
    "classifier_cond_fn",
    "default_solver",
    "diffusion_schedule",
    "draw_grid",
    "flow_schedule",
    "sampling_schedule",
    "save_grid",
    "short_label",
    "to_pil",
    "to_uint8",
]
