"""Every class that transformers registers for causal language modelling: its head is right, or refused."""

from __future__ import annotations

import re

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.heads import tiny_models
from tests.heads.test_model_heads import difference, loud
from unisd_kernels import LMHead

# Not tiny whatever is asked of them: hundreds of MB of image, audio or byte encoders.
LARGE = {"blt", "fuyu", "got_ocr2", "moss_transcribe_diarize", "longcat_flash", "gemma3"}
REFUSED = r"differs from the model's own log-probabilities by up to|does not run its backbone|Input language unknown"


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LARGE])
def test_right_or_refused(model_type, record_property):
    try:
        model = loud(tiny_models.model(model_type), 4.0)
    except Exception as error:  # a configuration that this file cannot make small says nothing about heads
        record_property("heads", "not buildable")
        pytest.skip(f"{model_type}: not buildable from the common sizes: {type(error).__name__}: {error}"[:200])
    try:
        head = LMHead.from_model(model)
    except ValueError as error:
        record_property("heads", "refused")
        if not re.search(REFUSED, str(error)):
            raise
        return
    record_property("heads", "right")
    assert difference(model, head) < 2e-3
