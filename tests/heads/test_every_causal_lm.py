"""Every class that transformers registers for causal language modelling: its head is right, or refused."""

from __future__ import annotations

import re

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.heads import tiny_models
from tests.heads.test_model_heads import difference, loud
from unisd_kernels import LMHead

# Not tiny whatever is asked of them: hundreds of MB of image, audio or byte encoders.
LARGE = {"blt", "fuyu", "got_ocr2", "moss_transcribe_diarize", "longcat_flash", "gemma3"}
REFUSED = r"differs from the model's own log-probabilities by up to|does not run its backbone"


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LARGE])
def test_right_or_refused(model_type):
    try:
        model = loud(tiny_models.model(model_type), 4.0)
        with torch.no_grad():
            model(input_ids=torch.arange(5, 13).unsqueeze(0))
    except Exception as error:  # what cannot be made small or run at all says nothing about heads
        pytest.skip(
            f"{model_type}: not buildable or runnable at the common sizes: {type(error).__name__}: {error}"[:200]
        )
    try:
        head = LMHead.from_model(model)
    except ValueError as error:
        if not re.search(REFUSED, str(error)):
            raise
        return
    assert difference(model, head) < 2e-3
