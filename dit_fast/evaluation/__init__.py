"""Scores of samples against the real images."""

from dit_fast.evaluation.label_agreement import LabelAgreement, LabelClassifier, label_agreement
from dit_fast.evaluation.nearest import NearestTraining, compare_nearest, nearest_training_distance
from dit_fast.evaluation.scores import Scorer, Scores

__all__ = [
    "LabelAgreement",
    "LabelClassifier",
    "NearestTraining",
    "Scorer",
    "Scores",
    "compare_nearest",
    "label_agreement",
    "nearest_training_distance",
]
