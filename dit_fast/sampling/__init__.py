"""Drawing images from a model: solvers, guidance and pictures to look at."""

from dit_fast.sampling.grid import draw_grid, to_pil, to_uint8
from dit_fast.sampling.sampler import MODES, SOLVERS, check_request, sample

__all__ = ["MODES", "SOLVERS", "check_request", "draw_grid", "sample", "to_pil", "to_uint8"]
