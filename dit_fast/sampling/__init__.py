"""Drawing images from a model: solvers, guidance, the batch sampler and pictures to look at."""

from dit_fast.sampling.config import MODES, PRECISIONS, SamplerConfig
from dit_fast.sampling.guidance import Guidance, classifier_cond_fn
from dit_fast.sampling.sampler import Sampler, Step
from dit_fast.sampling.schedule import Nodes, default_solver, diffusion_nodes, flow_nodes, sampling_nodes
from dit_fast.sampling.solvers import SOLVERS
from dit_fast.utils.images import draw_grid, save_grid, short_label, to_pil, to_uint8

__all__ = [
    "MODES",
    "PRECISIONS",
    "SOLVERS",
    "Guidance",
    "Nodes",
    "Sampler",
    "SamplerConfig",
    "Step",
    "classifier_cond_fn",
    "default_solver",
    "diffusion_nodes",
    "draw_grid",
    "flow_nodes",
    "sampling_nodes",
    "save_grid",
    "short_label",
    "to_pil",
    "to_uint8",
]
