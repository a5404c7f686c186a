"""The scoring kernel: every form of loading, shapes that fit no block, splits that end anywhere."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from unittest import mock

import pytest
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from tests.support import assert_accurate, make_problem, native_dtype_logits
from tests.triton.support import DEVICE, DTYPES, GPU_FLOOR, NARROW, examples, on_device
from unisd_kernels import LMHead, linear_logprobs
from unisd_kernels.backends.base import RunningScores
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton import configs, launch
from unisd_kernels.backends.triton.configs import GemmConfig
from unisd_kernels.backends.triton.score import score
from unisd_kernels.ops import logprobs

FIELDS = ("logprobs", "logsumexp", "entropy")


def check(problem, dtype, **options):
    exact, ours = problem, problem.to(dtype)
    with torch.no_grad():
        expected = linear_logprobs(
            exact.student_hidden, exact.student_head, exact.target_ids, impl="reference", return_entropy=True, **options
        )
        with native_dtype_logits():
            native = linear_logprobs(
                ours.student_hidden,
                ours.student_head,
                ours.target_ids,
                impl="reference",
                return_entropy=True,
                **options,
            )
        for with_entropy in (True, False):
            result = linear_logprobs(
                ours.student_hidden,
                ours.student_head,
                ours.target_ids,
                impl="triton",
                return_entropy=with_entropy,
                **options,
            )
            for name in FIELDS[: 3 if with_entropy else 2]:
                assert_accurate(name, *(getattr(each, name) for each in (result, expected, native)), GPU_FLOOR)


SHAPES = [((1,), 1, 2), ((16, 1), 16, 64), ((5, 30), 33, 131), ((70,), 40, 259)]
EXTRAS = [{}, {"bias": True, "softcap": 5.0, "logit_scale": -0.5}, {"padded_vocab": 3, "logit_std": 20.0}]


@pytest.mark.parametrize(
    ("dtype", "shape", "extras"),
    examples(
        product(DTYPES, SHAPES, EXTRAS),
        [*product(DTYPES, SHAPES[2:3], EXTRAS[1:]), (NARROW, SHAPES[2], EXTRAS[0]), (NARROW, SHAPES[0], EXTRAS[0])],
    ),
)
def test_values(dtype, shape, extras):
    lengths, hidden_size, vocab_size = shape
    problem = make_problem(lengths=lengths, hidden_size=hidden_size, vocab_size=vocab_size, dtype=dtype, **extras)
    check(on_device(problem), dtype, temperature=0.7)


def use(monkeypatch, kind, config):
    """Make a configuration the only one of a kind."""
    name = launch.architecture(DEVICE)
    monkeypatch.setitem(configs.TABLE, name, {**configs.TABLE.get(name, configs._AMPERE), kind: (config,)})


@pytest.mark.parametrize(
    "programs", [pytest.param(1, marks=pytest.mark.exhaustive), 3, pytest.param(50, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("vocab_size", [500, pytest.param(512, marks=pytest.mark.exhaustive)])
def test_any_number_of_programs(monkeypatch, programs, vocab_size):
    """With one tile or many each, and of a vocabulary that ends within a tile or with one."""
    monkeypatch.setattr("unisd_kernels.backends.triton.score.num_sms", lambda _: programs)
    for kind in ("score", "score-few", "score-heavy"):
        use(monkeypatch, kind, GemmConfig(16, 32, 16, 4, 1))
    check(on_device(make_problem(lengths=(70,), hidden_size=24, vocab_size=vocab_size, dtype=NARROW)), NARROW)


def test_more_blocks_than_are_merged_at_a_time(monkeypatch):
    monkeypatch.setattr("unisd_kernels.backends.triton.score._MERGED_BLOCKS", 16)
    for kind in ("score", "score-few", "score-heavy"):
        use(monkeypatch, kind, GemmConfig(16, 16, 16, 4, 1))
    check(on_device(make_problem(lengths=(9,), hidden_size=16, vocab_size=640, dtype=NARROW)), NARROW)


@pytest.mark.parametrize("width", [16, 24, 32])
def test_tensor_descriptors_give_the_same(monkeypatch, width):
    problem = on_device(make_problem(lengths=(70,), hidden_size=width, vocab_size=131, dtype=NARROW)).to(NARROW)
    arguments = (problem.student_hidden.detach(), problem.student_head.detach(), problem.target_ids)
    config = GemmConfig(16, 32, 16, 4, 1)
    use(monkeypatch, "score", config)
    expected = linear_logprobs(*arguments, impl="triton")
    taken, descriptor = [], launch.descriptor

    def watched(matrix, block):
        taken.append(block)
        return descriptor(matrix, block)

    monkeypatch.setattr("unisd_kernels.backends.triton.launch.descriptor", watched)
    use(monkeypatch, "score", GemmConfig(16, 32, 16, 4, 1, descriptors=True))
    result = linear_logprobs(*arguments, impl="triton")
    assert taken == [(16, 16), (32, 16)]
    # A GPU may sum the products of another layout in another order.
    torch.testing.assert_close(result.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)


def test_rows_that_no_descriptor_can_address_are_loaded_plainly(monkeypatch):
    use(monkeypatch, "score", GemmConfig(16, 32, 16, 4, 1, descriptors=True))
    check(on_device(make_problem(lengths=(70,), hidden_size=17, vocab_size=131, dtype=NARROW)), NARROW)
    matrix = torch.zeros(9, 24, dtype=NARROW, device=DEVICE)
    assert launch.supports_tma(matrix)
    assert not launch.supports_tma(matrix[:, 1:])  # starts off a multiple of 16 bytes
    assert not launch.supports_tma(matrix.T)
    assert not launch.supports_tma(torch.zeros(9, 17, dtype=NARROW, device=DEVICE))


def test_operands_that_are_not_contiguous():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(20, 48, generator=generator).to(DEVICE, NARROW)
    columns = torch.randn(24, 99, generator=generator).to(DEVICE, NARROW)
    target_ids = torch.randint(0, 99, (40,), generator=generator)[::2].to(DEVICE)
    for hidden in (wide[:, ::2], wide[:, 5:29], torch.randn(24, 20, generator=generator).to(DEVICE, NARROW).T):
        ours = linear_logprobs(hidden, LMHead(columns.T), target_ids, impl="triton")
        plain = linear_logprobs(hidden.contiguous(), LMHead(columns.T.contiguous()), target_ids.clone(), impl="triton")
        torch.testing.assert_close(ours.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)


def test_not_a_number_stays_one():
    problem = on_device(make_problem(lengths=(20,), hidden_size=16, vocab_size=70, dtype=NARROW)).to(NARROW)
    hidden = problem.student_hidden.detach().clone()
    hidden[3, 2] = torch.nan
    result = linear_logprobs(hidden, problem.student_head.detach(), problem.target_ids, impl="triton")
    assert result.logprobs.isnan().nonzero().tolist() == [[3]]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="ends a GPU's process; tests/gpu has it in one of its own")
@pytest.mark.parametrize("wrong", [-1, 131])
def test_the_kernel_that_reads_an_id_asserts_that_it_is_a_column(wrong, monkeypatch):
    """The interpreter leaves assertions out, whatever the launch's options; and its own would let anything pass."""
    builder = interpreter.interpreter_builder

    def create_assert(condition, message):
        assert condition.data.all(), message

    monkeypatch.setattr(builder, "options", replace(builder.options, debug=True, sanitize_overflow=False))
    monkeypatch.setattr(builder, "create_assert", create_assert)
    problem = make_problem(lengths=(3,), hidden_size=16, vocab_size=131).to(torch.float32)
    projection = Projection.of(problem.student_hidden, problem.student_head, 1.0)
    running = RunningScores(torch.empty(3), torch.empty(3), None)
    score(projection, torch.tensor([0, 130, 7]), running)
    with pytest.raises(InterpreterError, match="target_ids outside of"):
        score(projection, torch.tensor([0, wrong, 7]), running)


@pytest.mark.parametrize(
    ("impl", "gradient", "left"), [("triton", False, True), ("triton", True, False), ("torch", False, False)]
)
def test_only_where_that_kernel_runs_is_the_check_left_to_it(impl, gradient, left):
    problem = on_device(make_problem(lengths=(3,), hidden_size=16, vocab_size=131).to(torch.float32))
    hidden = problem.student_hidden.detach().requires_grad_(gradient)
    with mock.patch.object(logprobs, "check_target_ids", wraps=logprobs.check_target_ids) as check_ids:
        linear_logprobs(hidden, problem.student_head.detach(), problem.target_ids, impl=impl)
    assert check_ids.call_args.kwargs == {"kernel_asserts": left}
