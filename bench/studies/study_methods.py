"""Parts and methods of the study, by name; imports nothing, for its page."""

PARTS = ("study", "why", "diagnostic", "budget")
SEEDED = ("sft", "gkd", "sdft", "unisd_star")
"""Methods with every seed."""
ALONE = ("plain", "agreement_token", "ema", "contrastive", "match_joint", "clip")
"""Mechanisms by themselves, with the first seed."""
DIAGNOSED = ("sft", "gkd", "unisd_star")
BASE = "base"
