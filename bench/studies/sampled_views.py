"""Views of sampled completions, as the trainer makes them, for `python -m bench certificate`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from unisd.models import load_model
from unisd_kernels import LMHead

NUM_VIEWS = 3
BATCH_SIZE = 4


class FileViews(NamedTuple):
    """Hidden states [K, N, H] of sampled completions of one file's rows, and their ids [N]."""

    file: str
    views: torch.Tensor
    ids: torch.Tensor

    def split(self) -> tuple[FileViews, FileViews]:
        """The first third of the tokens, and the others."""
        at = len(self.ids) // 3
        return (
            FileViews(self.file, self.views[:, :at], self.ids[:at]),
            FileViews(self.file, self.views[:, at:], self.ids[at:]),
        )


def sampled_views(model_name: str, files: Sequence[Path], rows: int, new_tokens: int) -> tuple[LMHead, list[FileViews]]:
    """The model's head, and the views of each file."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tqdm import tqdm

    from unisd import UniSDConfig, UniSDTrainer
    from unisd.prepare.pipeline import prepare
    from unisd.prepare.settings import PrepareSettings
    from unisd.prepare.sources import load_rows

    model, tokenizer = load_model(model_name)
    # The trainer wants something to train; without a step the adapter adds nothing.
    model = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = []
    for file in files:
        settings = PrepareSettings(negatives="none", num_auxiliary=NUM_VIEWS)
        prepared = prepare(load_rows(str(file))[: 4 * rows], settings, progress=False).rows[:rows]
        with tempfile.TemporaryDirectory() as folder:
            config = UniSDConfig(
                folder,
                preset="agreement_token",
                num_auxiliary=NUM_VIEWS,
                per_device_train_batch_size=BATCH_SIZE,
                gradient_accumulation_steps=1,
                max_steps=1,
                max_completion_length=new_tokens,
                drift_probe_every=0,
                prompt_frame="chat",
                save_strategy="no",
                report_to="none",
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                disable_tqdm=True,
            )
            trainer = UniSDTrainer(
                model=model, args=config, train_dataset=Dataset.from_list(prepared), processing_class=tokenizer
            )
            trainer.current_gradient_accumulation_steps = 1
            torch.manual_seed(0)
            parts = []
            for start in tqdm(range(0, len(prepared) - BATCH_SIZE + 1, BATCH_SIZE), desc=f"views of {file.name}"):
                with torch.no_grad():
                    batch = trainer._generate_and_score_completions(prepared[start : start + BATCH_SIZE])
                    inputs = trainer.step(trainer.model, batch, None).inputs
                parts.append((torch.stack(inputs.auxiliary_hidden), inputs.target_ids))
        views, ids = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
        found.append(FileViews(file.name, views, ids))
    weight = model.get_output_embeddings().weight.detach().clone()
    return LMHead(weight), found
