"""Parts and methods of the study, by name; imports nothing, for its page."""

PARTS = ("study", "why", "diagnostic", "budget", "mixtures")
SEEDED = ("sft", "gkd", "sdft", "unisd_star")
"""Methods with every seed."""
ALONE = ("plain", "agreement_token", "ema", "contrastive", "match_joint", "clip")
"""Mechanisms by themselves, with the first seed."""
MIXED = {"consensus": "consensus", "contrastive_teacher": "contrastive", "pmi": "pmi"}
"""Preset of a mixture of teachers alone -> its `teacher_mixture`, also tried with the baseline `STEADY`."""
PLAIN = "plain"
"""What a mixture alone is compared with."""
STEADY = "sdft"
"""A method whose teacher does not run away in the study's few steps at its learning rate."""
DIAGNOSED = ("sft", "gkd", "unisd_star")
BASE = "base"
