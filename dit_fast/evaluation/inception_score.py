"""Inception score (Salimans et al. 2016, arXiv:1606.03498, section 4)."""

import torch
from torch import Tensor

from dit_fast.errors import DataError


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = 0) -> tuple[float, float]:
    """exp E_x KL(p(y|x) || p(y)) of class `logits` (M, K): mean and standard deviation over `splits` parts.

    `seed` shuffles the samples first, since those of a folder may lie class by class; None keeps their order. Of 50,000
    samples, 10 parts are ADM's parts of 5,000. In float64. Raises DataError for fewer samples than parts.
    """
    if splits < 1 or len(logits) < splits:
        raise DataError(
            f"the Inception score of {len(logits)} samples in {splits} parts: choose 1 to {len(logits)}"
        )
    if seed is not None:
        order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
        logits = logits[order.to(logits.device)]
    scores = []
    for part in torch.tensor_split(logits, splits):
        probabilities = part.double().softmax(dim=1)
        # The mean divergence from the marginal is its entropy less the mean entropy; entr(0) is 0, not NaN.
        marginal = torch.special.entr(probabilities.mean(dim=0)).sum()
        conditional = torch.special.entr(probabilities).sum(dim=1).mean()
        scores.append((marginal - conditional).exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))
