"""Scores of samples against the real images."""

from dit_fast.evaluation.features import (
    FEATURES,
    ClassifierFeatures,
    EfficientNetFeatures,
    FeatureExtractor,
    Features,
    InceptionFeatures,
    open_extractor,
)
from dit_fast.evaluation.frechet import GaussianStatistics, StreamingStatistics, frechet_distance
from dit_fast.evaluation.image_sources import ArrayImages, ImageSource, open_source
from dit_fast.evaluation.inception_score import inception_score
from dit_fast.evaluation.label_agreement import LabelAgreement, LabelClassifier, label_agreement
from dit_fast.evaluation.nearest import NearestTraining, compare_nearest, nearest_training_distance
from dit_fast.evaluation.precision_recall import precision_recall
from dit_fast.evaluation.quality import (
    METRICS,
    Activations,
    Quality,
    Reference,
    check_reference,
    collect,
    open_reference,
    score,
)
from dit_fast.evaluation.scores import Scorer, Scores
from dit_fast.evaluation.statistics_files import SavedStatistics, read_statistics, write_statistics

__all__ = [
    "FEATURES",
    "METRICS",
    "Activations",
    "ArrayImages",
    "ClassifierFeatures",
    "EfficientNetFeatures",
    "FeatureExtractor",
    "Features",
    "GaussianStatistics",
    "ImageSource",
    "InceptionFeatures",
    "LabelAgreement",
    "LabelClassifier",
    "NearestTraining",
    "Quality",
    "Reference",
    "SavedStatistics",
    "Scorer",
    "Scores",
    "StreamingStatistics",
    "check_reference",
    "collect",
    "compare_nearest",
    "frechet_distance",
    "inception_score",
    "label_agreement",
    "nearest_training_distance",
    "open_extractor",
    "open_reference",
    "open_source",
    "precision_recall",
    "read_statistics",
    "score",
    "write_statistics",
]
