"""An evaluation after the last step of a run that has none before."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class FinalEvaluation(TrainerCallback):
    """Callback that asks for an evaluation at the last step: within the run, since trackers end with it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
