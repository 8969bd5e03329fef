"""Scoring: continual metrics and answer scorers."""

from cram.scoring.continual import DEFINITIONS, ContinualMetrics, continual_metrics
from cram.scoring.scorers import SCORERS, check_coverage, published_scores, read_predictions, score

__all__ = [
    "DEFINITIONS",
    "SCORERS",
    "ContinualMetrics",
    "check_coverage",
    "continual_metrics",
    "published_scores",
    "read_predictions",
    "score",
]
