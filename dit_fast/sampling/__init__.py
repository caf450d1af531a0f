"""Drawing images from a model: solvers, guidance, the batch sampler and pictures to look at."""

from dit_fast.sampling.grid import draw_grid, save_grid, short_label, to_pil, to_uint8
from dit_fast.sampling.guidance import Guidance, classifier_cond_fn
from dit_fast.sampling.nodes import Nodes, default_solver, diffusion_nodes, flow_nodes, sampling_nodes
from dit_fast.sampling.program import SOLVERS
from dit_fast.sampling.sampler import MODES, PRECISIONS, Sampler, SamplerConfig, Step

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
