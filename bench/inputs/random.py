"""Random hidden states of a plausible scale: logits of standard deviation 3, the other views near the student."""

from __future__ import annotations

import torch

from bench.cases import Case
from unisd_kernels import LMHead
from unisd_kernels.config import LossInputs


def random_inputs(case: Case, device: torch.device, generator: torch.Generator) -> LossInputs:
    """All rows of a case, in sequences of about the same length; negative and auxiliary views for "unisd_loss" only."""

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(case.dtype)

    head = LMHead(normal(case.vocab_size, case.hidden_size, scale=3.0 / case.hidden_size**0.5))
    student = normal(case.num_rows, case.hidden_size, scale=1.0)

    def near(scale: float) -> torch.Tensor:
        """[N, H]"""
        return student + normal(case.num_rows, case.hidden_size, scale=scale)

    teacher = near(0.2)
    negative = near(0.4) if case.operation == "unisd_loss" else None
    auxiliary = tuple(near(0.3) for _ in range(case.num_auxiliary))
    return LossInputs(
        student_hidden=student,
        student_head=head,
        teacher_hidden=teacher,
        teacher_head=head,
        target_ids=torch.randint(0, case.vocab_size, (case.num_rows,), generator=generator, device=device),
        cu_seqlens=torch.linspace(0, case.num_rows, case.num_sequences + 1, device=device).to(torch.int32),
        auxiliary_hidden=auxiliary,
        negative_hidden=negative,
    )
