"""Every way to call wrongly gets an error that says what was got and what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import LMHead, linear_divergence, linear_logprobs, unisd_loss

N, V, H = 8, 23, 6


def call(**changes):
    problem = make_problem(frozen_head=True).to(torch.float32)
    return unisd_loss(**{**problem.arguments(), **changes})


HEAD = LMHead(torch.randn(V, H))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_hidden": torch.randn(2, 4, H)}, ValueError, r"pack padded .* got \(2, 4, 6\)|\[N, H\].*pack_rows"),
        ({"student_hidden": torch.randn(N, 5)}, ValueError, "hidden size 5 but student_head expects 6"),
        ({"student_hidden": torch.randn(N, H).double()}, TypeError, "float64 but student_head is torch.float32"),
        ({"student_hidden": torch.randn(N, H).bfloat16()}, TypeError, "bfloat16 but student_head is torch.float32"),
        ({"student_hidden": torch.ones(N, H).long()}, TypeError, "floating-point tensor, got torch.int64"),
        ({"student_hidden": [[1.0]]}, TypeError, "must be a torch.Tensor .* got list"),
        ({"student_head": torch.randn(V, H)}, TypeError, r"must be an LMHead, got Tensor; use LMHead\(weight\)"),
        ({"teacher_hidden": torch.randn(N + 1, H)}, ValueError, "teacher_hidden has 9 rows but student_hidden has 8"),
        ({"teacher_head": LMHead(torch.randn(V + 1, H))}, ValueError, "23 columns but teacher_head has 24.*vocab_size"),
        ({"negative_hidden": torch.randn(N - 1, H)}, ValueError, "negative_hidden has 7 rows"),
        ({"auxiliary_hidden": torch.randn(N, H)}, ValueError, r"\[K, N, H\] or be K tensors"),
        ({"auxiliary_hidden": [torch.randn(N, H), torch.randn(3, H)]}, ValueError, r"auxiliary_hidden\[1\] has 3 rows"),
        ({"target_ids": torch.full((N,), V)}, ValueError, r"lie in \[0, 23\), got values from 23 to 23"),
        ({"target_ids": torch.full((N,), -100)}, ValueError, r"got values from -100 to -100; drop ignored"),
        ({"target_ids": torch.zeros(N)}, TypeError, "int64 or int32, got torch.float32"),
        ({"target_ids": torch.zeros(N, 1).long()}, ValueError, r"shape \[8\], one id a row, got \(8, 1\)"),
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, ValueError, r"end at the number of rows \(8\).*got \[0, 3, 7\]"),
        ({"cu_seqlens": torch.tensor([1, 8])}, ValueError, "start at 0"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 8])}, ValueError, "never fall"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, TypeError, "int32 or int64"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be > 0, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be > 0, got nan"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
        ({"beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
        ({"clip_cap": 0.0}, ValueError, "clip_cap must be > 0"),
        ({"clip_cap": 1.0, "clip_quantile": 0.5}, ValueError, "exclude each other"),
        ({"clip_quantile": 2.0}, ValueError, r"clip_quantile must be in \[0, 1\]"),
        ({"agreement": "batch"}, ValueError, "agreement must be one of 'token', 'sequence', got 'batch'"),
        ({"normalization": "mean"}, ValueError, "normalization must be one of"),
        ({"weight_normalization": "sum"}, ValueError, "weight_normalization must be one of"),
        ({"contrastive_weight": -0.1}, ValueError, "contrastive_weight must be >= 0, got -0.1"),
        ({"token_weights": torch.ones(3)}, ValueError, r"token_weights must have shape \[8\], got \(3,\)"),
        ({"token_weights": torch.ones(N, requires_grad=True)}, ValueError, "must not require a gradient"),
        ({"token_weights": torch.ones(N).long()}, TypeError, "floating-point"),
        ({"num_items": 0}, ValueError, "num_items must be > 0, got 0"),
        ({"workspace_bytes": -1}, ValueError, "workspace_bytes must be > 0"),
        ({"workspace_bytes": 1e6}, TypeError, "workspace_bytes must be an int"),
        ({"impl": "cuda"}, ValueError, "impl must be one of 'native', .*'reference', got 'cuda'"),
    ],
)
def test_unisd_loss(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_feature_matching_needs_one_width():
    head = LMHead(torch.randn(V, 4))
    with pytest.raises(ValueError, match="feature_weight=0 for models of different width"):
        call(teacher_hidden=torch.randn(N, 4), teacher_head=head, auxiliary_hidden=None, negative_hidden=None,
             feature_weight=0.1)  # fmt: skip


@pytest.mark.parametrize("operation", ["logprobs", "divergence"])
def test_the_other_operations_check_too(operation):
    hidden, ids = torch.randn(N, H), torch.zeros(N).long()
    if operation == "logprobs":
        with pytest.raises(ValueError, match="temperature"):
            linear_logprobs(hidden, HEAD, ids, temperature=0.0)
        with pytest.raises(ValueError, match="lie in"):
            linear_logprobs(hidden, HEAD, ids + V)
    else:
        with pytest.raises(ValueError, match="beta"):
            linear_divergence(hidden, HEAD, hidden, HEAD, beta=-0.1)
        with pytest.raises(ValueError, match="every view must score the same"):
            linear_divergence(hidden, HEAD, hidden[1:], HEAD)
        with pytest.raises(ValueError, match="columns"):
            linear_divergence(hidden, HEAD, hidden, replace(HEAD, vocab_size=V - 1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "got list"),
        ((torch.ones(3, 2).to(torch.int8),), TypeError, "dequantize"),
        ((torch.ones(3),), ValueError, r"\[V, H\].*got \(3,\)"),
        ((torch.ones(0),), ValueError, "gathered first"),
        ((torch.ones(3, 2), torch.ones(2)), ValueError, r"shape \[3\].*got \(2,\)"),
        ((torch.ones(3, 2), torch.ones(3).double()), TypeError, "convert one"),
        ((torch.ones(3, 2), None, 0.0), ValueError, "logit_scale"),
        ((torch.ones(3, 2), None, 1.0, -1.0), ValueError, "softcap"),
        ((torch.ones(3, 2), None, 1.0, None, 4), ValueError, "between 1 and the 3 rows"),
    ],
)
def test_lm_head(arguments, error, message):
    with pytest.raises(error, match=message):
        LMHead(*arguments)
