"""Peers compute the same thing, the reference sees where one does not, and what cannot run is a row."""

from __future__ import annotations

import sys
from types import ModuleType
from unittest import mock

import pytest
import torch

from bench.cases import CASES, Case
from bench.inputs.sets import make_inputs
from bench.measuring import accuracy
from bench.measuring.accuracy import expected_outcome
from bench.measuring.measure import measure
from bench.peers import FLOOR, PEERS, NotOffered, Peer, captured, compiled, gemm_floor
from bench.peers.step import Outcome
from unisd_kernels import reference

CPU = torch.device("cpu")
SMOKE = ("smoke", "smoke.kl", "smoke.kl_trainable", "smoke.scoring")


def run(name, case, inputs, beta=0.0):
    return PEERS[name].build(case, beta, CPU)(inputs)


def errors_of(name, case, inputs, beta=0.0):
    peer = PEERS[name]
    return expected_outcome(case, inputs, beta).errors(run(name, case, inputs, beta), peer.mean_only)


@pytest.mark.parametrize("case", SMOKE)
@pytest.mark.parametrize("name", ["unisd_kernels", "dense float32", "trl composed", "unisd torch"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_peers_agree_with_float64(case, name, beta):
    case = CASES[case]
    errors = errors_of(name, case, make_inputs(case, CPU), beta)
    wanted = {"unisd_loss": {"gradient_error"}, "scoring": {"value_error"}}
    assert set(errors) == wanted.get(case.operation, {"value_error", "gradient_error"})
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", ["liger scaled", "torch linear_ce"])
def test_scorers_agree_with_float64(name):
    case = CASES["smoke.scoring"]
    assert errors_of(name, case, make_inputs(case, CPU))["value_error"] < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_losses_agree(beta):
    """The value of the UniSD* loss is one of all rows, which the float64 reference of one sequence cannot check."""
    case = CASES["smoke"]
    inputs = make_inputs(case, CPU)
    loss, gradient = run("unisd_kernels", case, inputs, beta)
    for name in ("dense float32", "trl composed", "unisd torch"):
        other = run(name, case, inputs, beta)
        torch.testing.assert_close(other.value, loss, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(other.gradient, gradient, rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.parametrize("case", SMOKE)
def test_an_error_shows_in_its_column(case):
    case = CASES[case]
    inputs = make_inputs(case, CPU)
    outcome = run("unisd_kernels", case, inputs, 0.0)
    wrong = Outcome(*(None if tensor is None else tensor * 1.01 for tensor in outcome))
    errors = expected_outcome(case, inputs, 0.0).errors(wrong)
    assert errors
    assert all(error == pytest.approx(0.01, rel=0.05) for error in errors.values())


def test_a_trainable_head_gets_its_gradient_from_every_peer(monkeypatch):
    """Without it a peer would be timed for one product less."""
    asked = []
    grad = torch.autograd.grad

    def watched(outputs, inputs, *rest):
        asked.append(tuple(inputs))
        return grad(outputs, inputs, *rest)

    case = CASES["smoke.kl_trainable"]
    inputs = make_inputs(case, CPU)
    for name in ("unisd_kernels", "dense float32", "trl composed"):
        step = PEERS[name].build(case, 0.0, CPU)
        monkeypatch.setattr(torch.autograd, "grad", watched)
        step(inputs)
        monkeypatch.setattr(torch.autograd, "grad", grad)
        assert any(leaf is inputs.student_head.weight for leaf in asked.pop())


@pytest.mark.parametrize("name", ["liger chunked"])
@pytest.mark.parametrize("case", ["smoke.kl", "smoke.kl_trainable"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_liger_is_the_mean(name, case, beta):
    pytest.importorskip("liger_kernel")
    case = CASES[case]
    inputs = make_inputs(case, CPU)
    with torch.compiler.set_stance("force_eager"):  # its formulas are asked for, not what a compiler makes of them
        outcome = run(name, case, inputs, beta)
        assert errors_of(name, case, inputs, beta)["gradient_error"] < 1e-5
    mean = run("unisd_kernels", case, inputs, beta).value.mean()
    torch.testing.assert_close(outcome.value, mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", SMOKE)
def test_dense_compiles_without_a_break(case, monkeypatch):
    """With the graphs captured but not lowered: `fullgraph` raises at a break."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    case = CASES[case]
    assert max(errors_of("dense float32 compiled", case, make_inputs(case, CPU)).values()) < 1e-5


@pytest.mark.parametrize("case", SMOKE)
def test_the_log_softmax_of_the_papers_code_is_in_bfloat16(case):
    """Its error is that of eight bits; in float32 the peer would be another one."""
    case = CASES[case]
    assert 1e-3 < max(errors_of("dense bfloat16", case, make_inputs(case, CPU)).values()) < 0.2


def test_cut_cross_entropy_is_asked_for_the_right_thing(monkeypatch):
    """Its signature, 25.1.1; the kernels need a GPU."""

    def linear_cross_entropy(
        e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
    ):
        return torch.nn.functional.cross_entropy(e @ c.T, targets, reduction=reduction)

    module = ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = linear_cross_entropy
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    case = CASES["smoke.scoring"]
    assert errors_of("cut-cross-entropy", case, make_inputs(case, CPU))["value_error"] < 1e-5


def test_what_is_not_installed_is_a_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    floor, absent = measure(CASES["smoke.scoring"], CPU, 1, [FLOOR, "cut-cross-entropy"])
    assert floor["ratio_to_floor"] == 1.0
    assert absent["failure"].startswith("not installed: ")
    assert "cut_cross_entropy" in absent["failure"]
    assert "median_seconds" not in absent


def test_refusals_are_rows_with_their_reason(monkeypatch):
    def out_of_memory(case, beta, device):
        def step(inputs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")

        return step

    def fails_later(case, beta, device):
        calls = iter([Outcome(None, None)])

        def step(inputs):
            return next(calls)

        return step

    def no_such_implementation(case, beta, device):
        from bench.peers import unisd

        return unisd.build(case, beta, device, impl="abacus")

    makers = {"big": out_of_memory, "fickle": fails_later, "abacus": no_such_implementation}
    for name, make in makers.items():
        monkeypatch.setitem(PEERS, name, Peer(name, make))
    rows = measure(CASES["smoke.kl"], CPU, 2, [FLOOR, *makers, "cut-cross-entropy", "dense float32"])
    failures = {row["peer"]: row.get("failure") for row in rows}
    assert failures["big"] == "out of memory"
    assert failures["fickle"].startswith("StopIteration")
    assert failures["abacus"].startswith("ValueError: impl must be one of")
    assert failures["cut-cross-entropy"].startswith("not offered: ")
    assert failures["dense float32"] is None
    assert rows[-1]["ratio_to_floor"] > 0


def test_operations_a_peer_lacks_are_refused():
    with pytest.raises(NotOffered, match="liger triton has divergence only"):
        PEERS["liger triton"].build(CASES["smoke.scoring"], 0.0, CPU)


@pytest.mark.parametrize(
    ("case", "products"), [("smoke", 7), ("smoke.kl", 3), ("smoke.kl_trainable", 4), ("smoke.scoring", 1)]
)
@pytest.mark.parametrize("chunked", [False, True])
def test_the_floor_is_the_products_it_says(case, products, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(gemm_floor, "LARGEST_BUFFER", 0)
        monkeypatch.setattr(gemm_floor, "CHUNK_ROWS", 20)
    case = CASES[case]
    step = PEERS[FLOOR].build(case, 0.0, CPU)
    flops = []
    product = torch.mm

    def counted(a, b, out):
        flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    step(make_inputs(case, CPU))
    assert case.num_products == products
    assert sum(flops) == products * 2 * case.num_rows * case.hidden_size * case.vocab_size
    assert len(flops) == products * (2 if chunked else 1)


@pytest.mark.parametrize("frozen_head", [True, False])
def test_token_weights_are_those_of_the_loss(frozen_head):
    """`sum_n u_n D_n` is `unisd_loss` of the same token weights, also with sequences of different lengths: a frozen and
    a trainable case differ in dW only."""
    case = Case(
        "odd", 33, 8, 50, "divergence", 0, num_sequences=5, frozen_head=frozen_head, options={"temperature": 0.7}
    )
    inputs = make_inputs(case, CPU)
    assert inputs.cu_seqlens.diff().unique().numel() > 1
    assert max(errors_of("unisd_kernels", case, inputs).values()) < 1e-5
    # A mean over sequences of means over tokens, but for the random numbers in [0.5, 1.5].
    by_loss = reference.loss.reduce_per_token(torch.ones(33), inputs.cu_seqlens, "sequence")
    assert 0.5 <= float(inputs.token_weights.sum() / by_loss) <= 1.5


def test_a_sequence_too_long_for_float64_is_refused(monkeypatch):
    case = CASES["smoke.kl"]
    inputs = make_inputs(case, CPU)
    needed = int(inputs.cu_seqlens[1]) * case.vocab_size * 8
    with monkeypatch.context() as smaller:
        smaller.setattr(accuracy, "LARGEST_TENSOR", needed - 1)
        with pytest.raises(ValueError, match="too many for a float64 reference"):
            expected_outcome(case, inputs, 0.0)
    for name, accelerator in CASES.items():
        sequence = accelerator.num_rows // accelerator.num_sequences
        assert sequence * accelerator.vocab_size * 8 < accuracy.LARGEST_TENSOR, name


def test_the_captured_step_is_captured_once_for_its_inputs():
    """With a stand-in of CUDA's graphs, which runs what was captured again."""
    case = CASES["smoke"]
    first, second = make_inputs(case, CPU), make_inputs(case, CPU)
    with pytest.raises(NotOffered, match="not of cpu"):
        PEERS["unisd captured"].build(case, 0.0, CPU)
    calls = []

    def step(inputs):
        calls.append(inputs)
        return Outcome(None, None)

    graph = mock.MagicMock()
    with (
        mock.patch.multiple("torch.cuda", Stream=mock.MagicMock(), stream=mock.MagicMock(), graph=mock.MagicMock()),
        mock.patch.multiple("torch.cuda", current_stream=mock.MagicMock(), CUDAGraph=lambda: graph),
        mock.patch("bench.peers.unisd.build", return_value=step),
    ):
        replayed = captured.build(case, 0.0, torch.device("cuda"))
        for inputs in (first, first, first, second, first):
            replayed(inputs)
    # A warm-up and a capture of each inputs that are not those of the call before.
    assert [inputs is first for inputs in calls] == [True, True, False, False, True, True]
    assert graph.replay.call_count == 5
