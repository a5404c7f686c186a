"""Choice of implementation: explicit, by environment, automatic; and what may be imported for it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import available, explain, linear_logprobs
from unisd_kernels.backends import registry
from unisd_kernels.backends.registry import resolve

CPU = torch.device("cpu")


def test_automatic_choice_is_the_compiled_one():
    assert resolve(None, CPU).name == "native"
    assert [name for name, can in available("cpu").items() if can and "triton" not in name] == [
        "native",
        "torch",
        "reference",
    ]


def test_what_the_compiled_one_does_not_take_goes_to_pytorch():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert resolve(None, CPU, dtype).name == "native"
    assert resolve(None, CPU, torch.float64).name == "torch"
    assert resolve(None, torch.device("meta")).name == "torch"
    assert resolve(None, torch.device("cuda"), torch.bfloat16).name == "triton"
    assert resolve(None, torch.device("cuda"), torch.float64).name == "torch"
    with pytest.raises(RuntimeError, match=r"impl='native' cannot be used on cpu: takes .*, not torch\.float64"):
        resolve("native", CPU, torch.float64)
    with pytest.raises(RuntimeError, match="runs on cpu, not on meta"):
        resolve("native", torch.device("meta"))


def test_an_installation_without_the_library_says_so_once(monkeypatch):
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", dict(registry._IMPLEMENTATIONS))
    entry = dataclasses.replace(registry._IMPLEMENTATIONS["native"], unavailable=lambda: "no compiler in this test")
    monkeypatch.setitem(registry._IMPLEMENTATIONS, "native", entry)
    with pytest.warns(UserWarning, match="impl='native' .* is not used: no compiler in this test"):
        assert resolve(None, CPU).name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(None, CPU).name == "torch"
        assert resolve(None, CPU, torch.float64).name == "torch"
    with pytest.raises(RuntimeError, match="no compiler in this test"):
        resolve("native", CPU)
    assert "unavailable: no compiler in this test" in explain("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not on")
def test_the_interpreter_is_never_chosen_by_itself(monkeypatch):
    """Under TRITON_INTERPRET=1 the kernels run on a CPU, thousands of times slower: only when asked for by name."""
    entry = dataclasses.replace(registry._IMPLEMENTATIONS["native"], unavailable=lambda: "the interpreter is on")
    monkeypatch.setitem(registry._IMPLEMENTATIONS, "native", entry)
    with pytest.warns(UserWarning, match="not used: the interpreter is on"):
        assert resolve(None, CPU).name == "torch"
    assert available("cpu")["triton"]


def test_without_triton_a_gpu_gets_pytorch_and_a_warning(monkeypatch):
    entry = dataclasses.replace(registry._IMPLEMENTATIONS["triton"], unavailable=lambda: "no triton in this test")
    monkeypatch.setitem(registry._IMPLEMENTATIONS, "triton", entry)
    with pytest.warns(UserWarning, match="impl='triton' .* is not used: no triton in this test"):
        assert resolve(None, torch.device("cuda"), torch.bfloat16).name == "torch"


def test_environment_and_argument(monkeypatch):
    monkeypatch.setenv("UNISD_IMPL", "reference")
    assert resolve(None, CPU).name == "reference"
    assert resolve("torch", CPU).name == "torch"
    assert "UNISD_IMPL=reference" in explain("cpu")
    monkeypatch.setenv("UNISD_IMPL", "fastest")
    with pytest.raises(ValueError, match=r"UNISD_IMPL must be one of 'native', .*'reference', got 'fastest'"):
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
    assert "native          used by default" in text
    assert "torch           available with impl='torch'" in text
    assert "reference       available with impl='reference'" in text


def test_the_kernels_need_torch_only():
    """`import unisd_kernels` asks for neither the trainer's packages nor a compiler's, and works without them. Without
    TRITON_INTERPRET there is no Triton for a CPU."""
    script = """
        import sys
        import torch

        ABSENT = {"triton", "transformers", "trl", "peft", "accelerate", "datasets", "unisd"}
        asked = set()

        class Absent:
            def find_spec(self, name, *ignored):
                if name.partition(".")[0] in ABSENT:
                    asked.add(name)
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent())
        import unisd_kernels

        assert not asked, asked
        assert not ABSENT & set(sys.modules), ABSENT & set(sys.modules)
        del sys.meta_path[0]
        assert not unisd_kernels.available("cpu")["triton"]
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
