"""Both designs of the divergence: values, gradients, and the digits of small divergences."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.support import assert_accurate, make_problem, native_dtype_logits
from tests.triton.support import DEVICE, DTYPES, GPU_FLOOR, NARROW, examples, on_device
from unisd_kernels import LMHead, linear_divergence, unisd_loss
from unisd_kernels.backends.base import NeedsGrad
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.transform import LogitTransform
from unisd_kernels.backends.triton import configs, launch, mixture
from unisd_kernels.backends.triton.backend import TritonBackend
from unisd_kernels.backends.triton.configs import GemmConfig
from unisd_kernels.backends.triton.rows import teacher_rows

DESIGNS = ["triton_fused", "triton_chunked"]
SHAPES = [
    {"lengths": (1,), "hidden_size": 1, "vocab_size": 2},
    {"lengths": (9, 0, 12), "hidden_size": 24, "vocab_size": 67},
    {"lengths": (3, 30), "hidden_size": 17, "vocab_size": 97},
]
EXTRAS = [
    {},
    {"shared_head": True, "frozen_head": True},
    {"shared_head": True, "bias": True, "logit_scale": -0.5},
    {"shared_head": True, "softcap": 10.0},
    {"bias": True, "softcap": 20.0, "padded_vocab": 5},
]


def run(problem, impl, **options):
    settings = {"feature_weight": 0.1, "contrastive_margin": 1.0, "agreement_gamma": 0.5, "temperature": 0.7}
    result = unisd_loss(**problem.arguments(), impl=impl, **{**settings, **options})
    return result, torch.autograd.grad(result.loss, problem.leaves)


def check(problem, dtype, impl, **options):
    exact, narrow = problem, problem.to(dtype)
    expected, expected_gradients = run(exact, "reference", **options)
    with native_dtype_logits():
        native, native_gradients = run(narrow, "reference", **options)
    ours, gradients = run(narrow, impl, **options)
    names = ["loss", "divergence", "student_logprobs", "teacher_logprobs", "negative_logprobs", "auxiliary_logprobs"]
    for name in [*names, "student_entropy", "teacher_entropy"]:
        if getattr(expected, name) is not None:
            assert_accurate(name, *(getattr(result, name).detach() for result in (ours, expected, native)), GPU_FLOOR)
    for position, tensors in enumerate(zip(gradients, expected_gradients, native_gradients, strict=True)):
        assert_accurate(f"gradient {position}", *tensors, GPU_FLOOR)


# Design, beta, dtype. The forward KL of both is that of test_heads and test_clipping too, and of the fuzz.
KEPT = [
    ("triton_fused", 0.3, DTYPES[0]),
    ("triton_fused", 1.0, DTYPES[-1]),
    ("triton_chunked", 0.3, DTYPES[1]),
    ("triton_chunked", 0.0, DTYPES[0]),
]


@pytest.mark.parametrize(
    ("impl", "beta", "dtype", "shape"),
    examples(
        product(DESIGNS, [0.0, 1.0, 0.3], DTYPES, range(len(SHAPES))),
        [(*case, 1) for case in KEPT],
    ),
)
def test_loss_and_gradients(impl, dtype, beta, shape):
    extras = EXTRAS[(shape + DTYPES.index(dtype) + int(2 * beta)) % len(EXTRAS)]
    problem = on_device(make_problem(dtype=dtype, **SHAPES[shape], **extras))
    # A workspace for a few rows only: several chunks and blocks, the last ones partial.
    check(problem, dtype, impl, beta=beta, workspace_bytes=20 << 10)


@pytest.mark.parametrize(
    ("impl", "extras"),
    examples(product(DESIGNS, EXTRAS), [*product(DESIGNS[:1], EXTRAS[::2]), *product(DESIGNS[1:], EXTRAS[3:4])]),
)
def test_heads(impl, extras):
    problem = on_device(make_problem(dtype=NARROW, lengths=(9, 0, 12), hidden_size=24, vocab_size=67, **extras))
    check(problem, NARROW, impl, return_entropy=True)


CLIPS = [{"clip_cap": 0.5}, {"clip_quantile": 0.6}]


@pytest.mark.parametrize(
    ("impl", "beta", "clip"),
    examples(product(DESIGNS, [0.0, 1.0], CLIPS), [("triton_fused", 0.0, CLIPS[1]), ("triton_chunked", 1.0, CLIPS[0])]),
)
def test_clipping(impl, beta, clip):
    check(on_device(make_problem(lengths=(9, 0, 12))), torch.float32, impl, beta=beta, **clip)


def test_no_views_no_rows_no_gradient():
    problem = on_device(make_problem(num_auxiliary=0, negative=False, dtype=NARROW))
    check(problem, NARROW, "triton")
    empty = on_device(make_problem(lengths=(0, 0), dtype=NARROW)).to(NARROW)
    with pytest.warns(UserWarning, match="no rows"):
        result, gradients = run(empty, "triton")
    assert float(result.loss.detach()) == 0.0
    assert all(not gradient.any() for gradient in gradients)
    with torch.no_grad():
        narrow = problem.to(NARROW)
        without = unisd_loss(**narrow.arguments(), impl="triton")
    assert_accurate(
        "D", without.divergence, run(problem, "reference", temperature=1.0)[0].divergence, without.divergence
    )


@pytest.mark.parametrize("impl", DESIGNS)
@pytest.mark.parametrize("frozen_head", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_upstream_weights(impl, frozen_head):
    problem = on_device(
        make_problem(lengths=(21,), hidden_size=24, vocab_size=67, frozen_head=frozen_head, dtype=NARROW)
    )
    weights = torch.linspace(-1.0, 2.0, 21, device=DEVICE)

    def gradients(problem, name):
        d = linear_divergence(
            problem.student_hidden, problem.student_head, problem.teacher_hidden, problem.teacher_head, impl=name
        )
        return torch.autograd.grad((d * weights.to(d.dtype)).sum(), problem.leaves)

    narrow = problem.to(NARROW)
    with native_dtype_logits():
        native = gradients(narrow, "reference")
    for tensors in zip(gradients(narrow, impl), gradients(problem, "reference"), native, strict=True):
        assert_accurate("gradient", *tensors, GPU_FLOOR)


def near(size: float, dtype: torch.dtype, rows: int = 24, width: int = 64, columns: int = 307):
    """Student and teacher rows whose divergence is about `size`, and their head, exactly representable in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(columns, width, generator=generator, dtype=torch.float64) * 2 / width**0.5).to(dtype).double()
    student = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).double()
    step = torch.randn(rows, width, generator=generator, dtype=torch.float64) * (size / 2) ** 0.5
    return student.to(DEVICE), (student + step).to(dtype).double().to(DEVICE), weight.to(DEVICE)


@pytest.mark.parametrize(
    ("impl", "beta", "size"),
    examples(
        product(DESIGNS, [0.0, 1.0, 0.5], [1e-2, 1e-4, 1e-6]),
        [("triton_fused", 0.0, 1e-4), ("triton_chunked", 0.5, 1e-4)],
    ),
)
def test_small_divergences_keep_their_digits(impl, beta, size):
    """One head for both. In float32, where the rows can be that near each other."""
    student, teacher, weight = near(size, torch.float32)
    exact = linear_divergence(student, LMHead(weight), teacher, LMHead(weight), beta=beta, impl="reference")
    head = LMHead(weight.float())
    ours = linear_divergence(student.float(), head, teacher.float(), head, beta=beta, impl=impl)
    assert ((ours - exact).abs() <= 2e-5 * exact).all()


@pytest.mark.parametrize("beta", [0.0, pytest.param(1.0, marks=pytest.mark.exhaustive)])
def test_near_rows_in_16_bits(beta):
    """A few neighbouring 16-bit numbers apart: the difference is exact, so the divergence nearly is."""
    student, _, weight = near(1e-4, NARROW)
    teacher = student.clone()
    teacher[:, ::7] *= 1.0 + 2.0**-6
    teacher = teacher.to(NARROW).double()
    exact = linear_divergence(student, LMHead(weight), teacher, LMHead(weight), beta=beta, impl="reference")
    assert float(exact.max()) < 1e-3
    head = LMHead(weight.to(NARROW))
    for impl in DESIGNS:
        ours = linear_divergence(student.to(NARROW), head, teacher.to(NARROW), head, beta=beta, impl=impl)
        assert ((ours - exact).abs() <= 1e-4 * exact).all()


def test_rows_are_deltas_by_what_the_rounding_of_the_difference_costs():
    student = torch.ones(3, 40, dtype=NARROW, device=DEVICE)
    teacher = student.clone()
    teacher[0, 0] = 1.5  # exact
    teacher[1] = torch.linspace(-100, 100, 40).to(DEVICE, NARROW)  # rounded, and large
    head = torch.zeros(8, 40, dtype=NARROW, device=DEVICE)
    transform = LogitTransform(1.0, None, 1.0)
    rows, row_is_delta = teacher_rows(
        Projection(student, head, None, transform), Projection(teacher, head, None, transform)
    )
    assert row_is_delta.tolist() == [1, 0, 1]
    assert rows.hidden[0].tolist() == [0.5] + [0.0] * 39
    assert torch.equal(rows.hidden[1], teacher[1])


@pytest.mark.parametrize(
    ("impl", "beta"),
    examples(product(DESIGNS, [0.0, 1.0]), [("triton_fused", 0.0), ("triton_chunked", 1.0)]),
)
def test_disagreement_beyond_the_range_of_exp(impl, beta):
    """Student and teacher put all their mass on different tokens, hundreds of nats apart."""
    columns, width = 70, 70
    weight = torch.eye(columns, width, dtype=torch.float64, device=DEVICE)
    student = torch.zeros(20, width, dtype=torch.float64, device=DEVICE)
    teacher = torch.zeros(20, width, dtype=torch.float64, device=DEVICE)
    student[:, 3], teacher[:, 68] = 300.0, 250.0
    student[1], teacher[2] = 0.0, 0.0
    student.requires_grad_()

    def both(dtype, name):
        leaf = student.detach().to(dtype).requires_grad_()
        head = LMHead(weight.to(dtype))
        d = linear_divergence(leaf, head, teacher.to(dtype), head, beta=beta, impl=name)
        return d.detach(), torch.autograd.grad(d.sum(), leaf)[0]

    exact, exact_gradient = both(torch.float64, "reference")
    for dtype in (torch.float32, NARROW):
        d, gradient = both(dtype, impl)
        torch.testing.assert_close(d.double(), exact, rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-2, atol=2e-3)


def test_descriptors_and_parts_give_the_same(monkeypatch):
    problem = on_device(
        make_problem(
            lengths=(20,),
            hidden_size=32,
            vocab_size=100,
            num_auxiliary=0,
            negative=False,
            shared_head=True,
            frozen_head=True,
            dtype=NARROW,
        )
    ).to(NARROW)
    name = launch.architecture(DEVICE)
    results = []
    for config in (
        GemmConfig(16, 64, 16, 4, 1),
        GemmConfig(16, 64, 16, 4, 1, descriptors=True),
        GemmConfig(16, 64, 16, 4, 1, parts=2, descriptors=True, flatten=True),
        GemmConfig(16, 64, 16, 4, 1, parts=4),
    ):
        kinds = dict.fromkeys(("fused-divergence", "fused-divergence-plain"), (config,))
        monkeypatch.setitem(configs.TABLE, name, {**configs.TABLE.get(name, configs._AMPERE), **kinds})
        result, gradients = run(problem, "triton_fused")
        results.append((result.divergence, gradients[0].float()))
    for other in results[1:]:
        torch.testing.assert_close(other[0], results[0][0], rtol=1e-5, atol=1e-6)
        # Rounded to 16 bits, where another order of the sums in a product may fall to the other side.
        assert (other[1] - results[0][1]).norm() < torch.finfo(NARROW).eps * results[0][1].norm()


def test_the_choice_of_design():
    def walk(dtype, beta, design=None, needs_grad=NeedsGrad(hidden=True)):
        hidden, weight = torch.zeros(4, 8, dtype=dtype), torch.zeros(9, 8, dtype=dtype)
        projection = Projection(hidden.to(DEVICE), weight.to(DEVICE), None, LogitTransform(1.0, None, 1.0))
        return type(TritonBackend(design).divergence(projection, projection, beta, 1 << 20, needs_grad, False)).__name__

    assert walk(NARROW, 0.0) == walk(NARROW, 1.0) == walk(NARROW, 0.5) == "FusedDivergence"
    assert walk(torch.float32, 0.0) == walk(NARROW, 0.5, needs_grad=NeedsGrad()) == "ChunkedDivergence"
    assert walk(NARROW, 0.0, "chunked") == "ChunkedDivergence"
    assert walk(torch.float32, 0.0, "fused") == "FusedDivergence"


@pytest.mark.parametrize(
    ("impl", "columns"), examples(product(DESIGNS, [32, 64]), [("triton_fused", 32), ("triton_chunked", 64)])
)
def test_a_mixture_in_several_spans_of_columns(monkeypatch, impl, columns):
    """The last span is not full, and a span has one block or two; of what the fused kernel stores, two blocks at a time
    or four."""
    exact = on_device(make_problem(lengths=(5,), hidden_size=16, vocab_size=203, num_auxiliary=0, negative=False))
    monkeypatch.setattr(mixture, "MIXTURE_COLUMNS", columns)
    monkeypatch.setattr(mixture, "MIXTURE_BLOCK", 32 if impl == "triton_chunked" else columns)

    def divergence(problem, impl):
        # With a gradient of the rows, for which the fused kernel stores what it sums.
        return linear_divergence(
            problem.student_hidden,
            problem.student_head.detach(),
            problem.teacher_hidden.detach(),
            problem.teacher_head.detach(),
            beta=0.3,
            impl=impl,
        ).double()

    ours = divergence(exact.to(torch.float32), impl)
    torch.testing.assert_close(ours, divergence(exact, "reference"), rtol=1e-4, atol=1e-6)
