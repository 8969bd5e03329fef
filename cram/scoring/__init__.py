"""Scoring: continual metrics, answer scorers, and the report page."""

from cram.scoring.metrics import DEFINITIONS, ContinualMetrics, continual_metrics
from cram.scoring.schema import MethodReport, Report, validate_report
from cram.scoring.scorers import SCORERS, check_coverage, published_scores, read_predictions, score

__all__ = [
    "DEFINITIONS",
    "SCORERS",
    "ContinualMetrics",
    "MethodReport",
    "Report",
    "check_coverage",
    "continual_metrics",
    "published_scores",
    "read_predictions",
    "score",
    "validate_report",
]
