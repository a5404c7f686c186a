"""Scores of replies, by kind of task, and what they are worth: intervals."""

from unisd.scoring.intervals import Interval, mean_interval, paired_difference, wilson
from unisd.scoring.score import MEASURES, Scored, score_replies

__all__ = ["MEASURES", "Interval", "Scored", "mean_interval", "paired_difference", "score_replies", "wilson"]
