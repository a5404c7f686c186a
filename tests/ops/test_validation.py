"""Every way to call wrongly gets an error that says what was got and what to do."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import (
    LMHead,
    agreement_weights,
    ema_update_,
    linear_divergence,
    linear_logprobs,
    unisd_loss,
    validation,
)
from unisd_kernels.validation import assert_ids_async

N, V, H = 8, 23, 6


def call(**changes):
    problem = make_problem(frozen_head=True).to(torch.float32)
    return unisd_loss(**{**problem.arguments(), **changes})


HEAD = LMHead(torch.randn(V, H))
HEAD64 = LMHead(torch.randn(V, H).double())
FLOAT8, INF, NAN = torch.float8_e4m3fn, float("inf"), float("nan")
HIDDEN, IDS = torch.randn(N, H), torch.zeros(N).long()


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
        ({"token_weights": torch.tensor([1.0] * 7 + [-0.5])}, ValueError, "token_weights must be >= 0, got .* to -0.5"),
        ({"token_weights": torch.full((N,), -INF)}, ValueError, "token_weights must be >= 0, got .* to -inf"),
        ({"token_weights": torch.ones(N).to(FLOAT8)}, TypeError, r"token_weights must be float32.*got torch\.float8"),
        ({"token_weights": [1.0] * N}, TypeError, r"token_weights must be a torch\.Tensor \[N\], got list"),
        ({"token_weights": torch.ones(N, device="meta")}, ValueError, "token_weights is on meta"),
        ({"num_items": 0}, ValueError, "num_items must be > 0, got 0"),
        ({"num_items": -1.5}, ValueError, "num_items must be > 0, got -1.5"),
        ({"num_items": INF}, ValueError, "num_items must be > 0, got inf"),
        ({"num_items": NAN}, ValueError, "num_items must be > 0, got nan"),
        ({"num_items": True}, TypeError, "num_items must be a number, got bool"),
        ({"num_items": "3"}, TypeError, "num_items must be a number, got str"),
        ({"num_items": torch.tensor(-2)}, ValueError, "num_items must be > 0, got -2"),
        ({"num_items": torch.tensor(0)}, ValueError, "num_items must be > 0, got 0"),
        ({"num_items": torch.tensor(NAN)}, ValueError, "num_items must be > 0, got nan"),
        ({"num_items": torch.tensor([3.0])}, ValueError, r"a number or a 0-dim tensor, got shape \(1,\)"),
        ({"num_items": torch.tensor(True)}, TypeError, r"got torch\.bool"),
        ({"num_items": torch.tensor(1j)}, TypeError, r"got torch\.complex64"),
        ({"num_items": torch.tensor(3.0, requires_grad=True)}, ValueError, "num_items must not require a gradient"),
        ({"num_items": torch.tensor(3, device="meta")}, ValueError, "num_items is on meta"),
        (
            {"student_hidden": torch.randn(N, H).to(FLOAT8)},
            TypeError,
            r"student_hidden must be float32.*got torch\.float8",
        ),
        ({"student_hidden": torch.randn(N, H).to_sparse()}, TypeError, r"dense torch\.Tensor \[N, H\], got .*sparse"),
        (
            {"student_hidden": torch.randn(N, H, device="meta")},
            ValueError,
            "student_hidden is on meta but student_head",
        ),
        ({"student_hidden": None}, TypeError, "got NoneType"),
        ({"teacher_hidden": torch.randn(N, H).to(FLOAT8)}, TypeError, "teacher_hidden must be float32"),
        (
            {"teacher_hidden": torch.randn(N, H).double(), "teacher_head": HEAD64},
            TypeError,
            r"teacher_hidden is torch\.float64 but student_hidden is torch\.float32; float64 goes only with float64",
        ),
        (
            {"negative_hidden": torch.randn(N, H).double(), "negative_head": HEAD64},
            TypeError,
            r"negative_hidden is torch\.float64 but student_hidden",
        ),
        (
            {"auxiliary_hidden": [torch.randn(N, H).double()], "auxiliary_head": HEAD64},
            TypeError,
            r"auxiliary_hidden\[0\] is torch\.float64 but student_hidden",
        ),
        ({"teacher_head": torch.randn(V, H)}, TypeError, "teacher_head must be an LMHead, got Tensor"),
        ({"negative_head": torch.randn(V, H)}, TypeError, "negative_head must be an LMHead, got Tensor"),
        ({"auxiliary_head": "lm_head"}, TypeError, "auxiliary_head must be an LMHead, got str"),
        ({"auxiliary_hidden": 3}, TypeError, "K tensors .* got int"),
        ({"auxiliary_hidden": {"a": torch.randn(N, H)}}, TypeError, "K tensors .* got dict"),
        ({"auxiliary_hidden": [None]}, TypeError, r"auxiliary_hidden\[0\] must be a torch\.Tensor .* got NoneType"),
        ({"negative_hidden": "wrong"}, TypeError, "negative_hidden must be .* got str"),
        ({"target_ids": [0] * N}, TypeError, "target_ids must be .* got list"),
        ({"target_ids": torch.zeros(N).bool()}, TypeError, r"int64 or int32, got torch\.bool"),
        ({"target_ids": torch.zeros(N, device="meta").long()}, ValueError, "target_ids is on meta"),
        ({"cu_seqlens": [0, N]}, TypeError, "cu_seqlens must be .* got list"),
        ({"cu_seqlens": torch.tensor(8)}, ValueError, r"shape \[B \+ 1\], got \(\)"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, r"shape \[B \+ 1\], got \(0,\)"),
        ({"cu_seqlens": torch.tensor([0, N], device="meta")}, ValueError, "cu_seqlens is on meta"),
        ({"beta": True}, TypeError, "beta must be a number, got bool"),
        ({"beta": torch.tensor(0.5)}, TypeError, "beta must be a number, got Tensor"),
        ({"beta": NAN}, ValueError, r"beta must be in \[0, 1\], got nan"),
        ({"temperature": True}, TypeError, "temperature must be a number, got bool"),
        ({"temperature": INF}, ValueError, "temperature must be > 0, got inf"),
        ({"temperature": 10**400}, ValueError, "temperature must be > 0, got 1000"),
        ({"clip_cap": NAN}, ValueError, "clip_cap must be > 0, got nan"),
        ({"clip_cap": INF}, ValueError, "clip_cap must be > 0, got inf"),
        ({"clip_quantile": True}, TypeError, "clip_quantile must be a number, got bool"),
        ({"agreement_gamma": NAN}, ValueError, "agreement_gamma must be >= 0, got nan"),
        ({"agreement_statistic": 3}, ValueError, "agreement_statistic must be one of .* got 3"),
        ({"contrastive_margin": INF}, ValueError, "contrastive_margin must be finite, got inf"),
        ({"feature_weight": "0.1"}, TypeError, "feature_weight must be a number, got str"),
        ({"divergence_weight": -1}, ValueError, "divergence_weight must be >= 0, got -1"),
        ({"return_entropy": 1}, TypeError, "return_entropy must be True or False, got 1"),
        ({"return_statistics": "no"}, TypeError, "return_statistics must be True or False, got 'no'"),
        ({"workspace_bytes": True}, TypeError, "workspace_bytes must be an int"),
        ({"impl": 3}, ValueError, "impl must be one of 'native', .* got 3"),
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


def test_what_is_right_passes():
    """The table above would also pass if everything were refused."""
    expected = float(call().loss.detach())
    for changes in (
        {"token_weights": torch.ones(N)},
        {"token_weights": torch.ones(N).bfloat16()},
        {"num_items": 3},
        {"num_items": 3.0},
        {"num_items": torch.tensor(3)},
        {"num_items": torch.tensor(3.0, dtype=torch.float64)},
        {"beta": 0, "temperature": 1},
        {"impl": "reference"},
    ):
        assert float(call(**changes).loss.detach()) == pytest.approx(expected, rel=1e-5)
    zero = torch.zeros(N)
    assert float(call(token_weights=zero, contrastive_weight=0.0).loss.detach()) == 0.0


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("num_items", [0, torch.tensor(0), torch.tensor(0.0)])
def test_no_rows_and_no_items(num_items, impl):
    """All masked: 0 over 0 is 0 here."""
    problem = make_problem(lengths=(0, 0), frozen_head=True).to(torch.float32)
    with pytest.warns(UserWarning, match="no rows"):
        result = unisd_loss(**problem.arguments(), num_items=num_items, normalization="token", impl=impl)
    assert float(result.loss.detach()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", [None, "torch", "reference"])
def test_views_may_differ_in_dtype(impl, dtype):
    """But not by float64; a float32 student beside a bfloat16 teacher and the reverse."""
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
    problem = make_problem(frozen_head=True, dtype=torch.bfloat16)
    student = problem.to(dtype)
    views = replace(problem.to(other), student_hidden=student.student_hidden, student_head=student.student_head)
    exact = unisd_loss(**problem.arguments(), impl="reference").loss
    ours = unisd_loss(**views.arguments(), impl=impl).loss
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"hidden is torch\.float64 but head is torch\.float32; convert one"):
            linear_logprobs(HIDDEN.double(), HEAD, IDS)
        with pytest.raises(TypeError, match=r"hidden is torch\.float32 but head is torch\.float64; convert one"):
            linear_logprobs(HIDDEN, HEAD64, IDS)
        with pytest.raises(TypeError, match=r"teacher_hidden is torch\.float64 but student_hidden is torch\.float32"):
            linear_divergence(HIDDEN, HEAD, HIDDEN.double(), HEAD64)
        assert linear_logprobs(HIDDEN.double(), HEAD64, IDS).logprobs.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": None}, TypeError, "hidden must be .* got NoneType"),
        ({"hidden": HIDDEN[0]}, ValueError, r"hidden must have shape \[N, H\]"),
        ({"hidden": HIDDEN.to(FLOAT8)}, TypeError, "hidden must be float32"),
        ({"hidden": HIDDEN.double()}, TypeError, r"hidden is torch\.float64 but head is torch\.float32"),
        ({"head": torch.randn(V, H)}, TypeError, "head must be an LMHead, got Tensor"),
        ({"target_ids": 0}, TypeError, "target_ids must be .* got int"),
        ({"target_ids": IDS[1:]}, ValueError, "one id a row"),
        ({"target_ids": IDS - 1}, ValueError, "got values from -1 to -1"),
        ({"temperature": False}, TypeError, "temperature must be a number, got bool"),
        ({"temperature": NAN}, ValueError, "temperature must be > 0, got nan"),
        ({"return_entropy": None}, TypeError, "return_entropy must be True or False, got None"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be > 0, got 0"),
        ({"impl": ["torch"]}, ValueError, "impl must be one of"),
    ],
)
def test_linear_logprobs(changes, error, message):
    with pytest.raises(error, match=message):
        linear_logprobs(**{"hidden": HIDDEN, "head": HEAD, "target_ids": IDS, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_hidden": HIDDEN.double()}, TypeError, r"student_hidden is torch\.float64 but student_head"),
        ({"teacher_hidden": "h"}, TypeError, "teacher_hidden must be .* got str"),
        ({"teacher_head": None}, TypeError, "teacher_head must be an LMHead, got NoneType"),
        ({"teacher_hidden": HIDDEN.double(), "teacher_head": HEAD64}, TypeError, "float64 goes only with float64"),
        (
            {"teacher_hidden": HIDDEN.to("meta"), "teacher_head": LMHead(torch.ones(V, H, device="meta"))},
            ValueError,
            "teacher_hidden is on meta but student_hidden is on cpu",
        ),
        ({"beta": "0.5"}, TypeError, "beta must be a number, got str"),
        ({"beta": 1 + 1e-12}, ValueError, r"beta must be in \[0, 1\]"),
        ({"beta": -1e-320}, ValueError, r"beta must be in \[0, 1\]"),
        ({"temperature": -INF}, ValueError, "temperature must be > 0, got -inf"),
        ({"workspace_bytes": "1e6"}, TypeError, "workspace_bytes must be an int"),
    ],
)
def test_linear_divergence(changes, error, message):
    arguments = {"student_hidden": HIDDEN, "student_head": HEAD, "teacher_hidden": HIDDEN, "teacher_head": HEAD}
    with pytest.raises(error, match=message):
        linear_divergence(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logprobs": [[0.0]]}, TypeError, "logprobs must be a torch.Tensor .* got list; stack the K views"),
        ({"logprobs": torch.zeros(2, 5).long()}, TypeError, r"floating-point tensor, got torch\.int64"),
        ({"logprobs": torch.zeros(2, 5).to(FLOAT8)}, TypeError, "logprobs must be float32"),
        ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be .* got list"),
        ({"cu_seqlens": torch.tensor([0, 5], device="meta")}, ValueError, "cu_seqlens is on meta"),
        ({"level": None}, ValueError, "level must be one of .* got None"),
        ({"gamma": True}, TypeError, "gamma must be a number, got bool"),
        ({"gamma": INF}, ValueError, "gamma must be >= 0, got inf"),
        ({"quantile": NAN}, ValueError, r"quantile must be in \[0, 1\], got nan"),
        ({"quantile": "0.5"}, TypeError, "quantile must be a number, got str"),
    ],
)
def test_agreement_weights(changes, error, message):
    with pytest.raises(error, match=message):
        agreement_weights(**{"logprobs": torch.zeros(2, 5), "cu_seqlens": torch.tensor([0, 5]), **changes})


ONES = [torch.ones(2)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": {"weight": ONES[0]}}, TypeError, r"tensor 0: teacher must be .* got str; pass model\.parameters"),
        ({"student": [3.0]}, TypeError, "tensor 0: student must be .* got float"),
        ({"decay": True}, TypeError, "decay must be a number, got bool"),
        ({"decay": NAN}, ValueError, r"decay must be in \[0, 1\], got nan"),
        ({"decay": torch.tensor(0.5)}, TypeError, "decay must be a number, got Tensor"),
        ({"rounding": True}, ValueError, "rounding must be one of 'stochastic', got True"),
        ({"generator": 0}, TypeError, r"generator must be a torch\.Generator or None, got int"),
        ({"compensation": [None]}, TypeError, "tensor 0: compensation must be .* got NoneType"),
        ({"compensation": []}, ValueError, "compensation has 0 tensors but teacher has 1"),
        ({"compensation": [torch.zeros(3)]}, ValueError, r"compensation is torch\.float32 \(3,\) on cpu, the teacher"),
        ({"compensation": [torch.zeros(2, device="meta")]}, ValueError, "on meta, the teacher .* on cpu"),
    ],
)
def test_ema_update(changes, error, message):
    with pytest.raises(error, match=message):
        ema_update_(**{"teacher": ONES, "student": ONES, "decay": 0.5, **changes})
    assert ONES[0].tolist() == [1.0, 1.0]


def test_an_accelerator_asserts_without_waiting():
    """What on a CPU is an error is there an assertion on the device. Seen on the meta device, which has no values: to
    read one would raise."""
    asserted = []
    weights, items = torch.ones(N, device="meta"), torch.tensor(3, device="meta")
    ids = torch.zeros(N, dtype=torch.int64, device="meta")
    with mock.patch("torch._assert_async", lambda condition, message: asserted.append(message)):
        validation.check_token_weights(weights, N, weights.device)
        validation.check_total("num_items", items, N, weights.device)
        validation.check_target_ids(ids, N, V, ids.device)
        validation.check_target_ids(ids, N, V, ids.device, kernel_asserts=True)
    assert asserted == [
        "token_weights must be >= 0",
        "num_items must be finite and > 0",
        f"target_ids outside [0, {V})",
    ]


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_on_an_accelerator_are_checked_without_waiting(dtype):
    """On a CPU the same check raises at once."""
    assert_ids_async(torch.tensor([0, 6, 3], dtype=dtype), 7)
    for wrong in (-1, 7, -100):
        with pytest.raises(RuntimeError, match=r"target_ids outside \[0, 7\)"):
            assert_ids_async(torch.tensor([0, wrong], dtype=dtype), 7)
