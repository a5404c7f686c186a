"""Choice of implementation: explicit, by environment, automatic; and what may be imported for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import available, explain, linear_logprobs
from unisd_kernels.dispatch import resolve

CPU = torch.device("cpu")


def test_automatic_choice_is_not_the_dense_reference():
    assert resolve(None, CPU).name == "torch"
    assert available("cpu") == {"torch": True, "reference": True}


def test_environment_and_argument(monkeypatch):
    monkeypatch.setenv("UNISD_IMPL", "reference")
    assert resolve(None, CPU).name == "reference"
    assert resolve("torch", CPU).name == "torch"
    assert "UNISD_IMPL=reference" in explain("cpu")
    monkeypatch.setenv("UNISD_IMPL", "fastest")
    with pytest.raises(ValueError, match="UNISD_IMPL must be one of 'torch', 'reference', got 'fastest'"):
        resolve(None, CPU)


def test_the_environment_reaches_the_operations(monkeypatch):
    problem = make_problem(frozen_head=True)
    arguments = (problem.student_hidden, problem.student_head, problem.target_ids)
    monkeypatch.setenv("UNISD_IMPL", "reference")
    assert "LinearLogProbs" not in type(linear_logprobs(*arguments).logprobs.grad_fn).__name__
    monkeypatch.setenv("UNISD_IMPL", "torch")
    assert "LogProbs" in type(linear_logprobs(*arguments).logprobs.grad_fn).__name__


def test_explain_names_every_implementation():
    text = explain("cpu")
    assert "torch      used by default" in text
    assert "reference  available with impl='reference'" in text


def test_the_kernels_need_torch_only():
    """`import unisd_kernels` pulls in neither the trainer's packages nor a compiler's."""
    code = (
        "import sys, unisd_kernels\n"
        "bad = {'triton', 'transformers', 'trl', 'peft', 'accelerate', 'datasets', 'unisd'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    # torch itself may import triton; block it, as on a machine that does not have it.
    blocker = "import sys\nfor name in ('triton', 'transformers', 'trl'): sys.modules[name] = None\n"
    for prefix in ("", blocker):
        script = prefix + code if not prefix else prefix + "import unisd_kernels"
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
