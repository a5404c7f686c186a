"""Random problems and the error rule that every fast path is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar
from unittest import mock

import torch
from hypothesis import strategies as st

from tests.last_bit import LastBit
from unisd_kernels import LMHead, LossInputs

T = TypeVar("T")

# Error floors, relative to the largest entry of the exact result: what one rounding of the output dtype and of a
# float32 sum over the vocabulary cost even when everything else is exact.
FLOOR = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


class Problem(LossInputs):
    """Tensors of one `unisd_loss` call, made in float64 from values exactly representable in `dtype`."""

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, as fresh leaves; heads that share memory still do."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, keep_weights=True)

    def map(self, move: Callable[[torch.Tensor], torch.Tensor], keep_weights: bool = False) -> Problem:
        """Every tensor moved, as fresh leaves (`keep_weights`: but `token_weights`)."""
        moved: dict[int, torch.Tensor] = {}

        def fresh(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            address = tensor.data_ptr()
            if not address or address not in moved:
                moved[address] = move(tensor.detach())
            return moved[address].detach().requires_grad_(tensor.requires_grad)

        def every(value: Any) -> Any:
            if isinstance(value, LMHead):
                return replace(value, weight=fresh(value.weight), bias=fresh(value.bias))
            if isinstance(value, tuple):
                return tuple(map(every, value))
            return fresh(value) if isinstance(value, torch.Tensor) else value

        kept = {"token_weights": self.token_weights} if keep_weights else {}
        return Problem(**{name: every(value) for name, value in self.arguments().items()} | kept)

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The student's tensors that require a gradient."""
        candidates = (self.student_hidden, self.student_head.weight, self.student_head.bias)
        return [tensor for tensor in candidates if tensor is not None and tensor.requires_grad]


def make_problem(
    *,
    lengths: tuple[int, ...] = (3, 0, 5),
    hidden_size: int = 6,
    vocab_size: int = 23,
    num_auxiliary: int = 2,
    negative: bool = True,
    token_weights: bool = False,
    bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    padded_vocab: int = 0,
    frozen_head: bool = False,
    shared_head: bool = False,
    logit_std: float = 2.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    num_rows = sum(lengths)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).double()  # representable in dtype, so that every dtype computes on the same numbers

    def head() -> LMHead:
        return LMHead(
            normal(vocab_size + padded_vocab, hidden_size, scale=logit_std / hidden_size**0.5),
            normal(vocab_size + padded_vocab) if bias else None,
            logit_scale,
            softcap,
            vocab_size if padded_vocab else None,
        )

    student_head = head()
    teacher_head = student_head.detach() if shared_head else head()
    if not frozen_head:
        student_head.weight.requires_grad_()
        if student_head.bias is not None:
            student_head.bias.requires_grad_()
    student = normal(num_rows, hidden_size)
    return Problem(
        student.clone().requires_grad_(),
        student_head,
        (student + normal(num_rows, hidden_size, scale=0.5)).to(dtype).double(),
        teacher_head,
        torch.randint(0, vocab_size, (num_rows,), generator=generator),
        torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32),
        auxiliary_hidden=tuple(normal(num_rows, hidden_size) for _ in range(num_auxiliary)),
        negative_hidden=normal(num_rows, hidden_size) if negative else None,
        token_weights=torch.rand(num_rows, generator=generator, dtype=torch.float64) if token_weights else None,
    )


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype = torch.float64, **fixed: Any) -> Problem:
    """Shapes and corners: empty sequences, all masked, V prime or 1 more than a block, K = 0 or 1, padded heads."""
    settings = {
        "lengths": tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))),
        "hidden_size": draw(st.sampled_from([1, 3, 8, 17])),
        "vocab_size": draw(st.sampled_from([2, 13, 64, 129])),
        "num_auxiliary": draw(st.integers(0, 3)),
        "negative": draw(st.booleans()),
        "token_weights": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -1.5])),
        "softcap": draw(st.sampled_from([None, 3.0, 30.0])),
        "padded_vocab": draw(st.sampled_from([0, 0, 3])),
        "frozen_head": draw(st.booleans()),
        "shared_head": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
        "dtype": dtype,
    }
    return make_problem(**{**settings, **fixed})


LOSS_OPTIONS = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.0, 1.0, 0.5, 0.1, 0.9]),
        "temperature": st.sampled_from([1.0, 0.7, 2.5]),
        "agreement": st.sampled_from(["token", "sequence"]),
        "agreement_statistic": st.sampled_from(["variance", "range"]),
        "agreement_gamma": st.sampled_from([0.001, 0.5, 5.0]),
        "weight_normalization": st.sampled_from([None, "weighted", "count"]),
        "contrastive_weight": st.sampled_from([0.0, 0.1, 1.0]),
        "contrastive_margin": st.sampled_from([0.5, 0.0, 3.0]),
        "feature_weight": st.sampled_from([0.0, 0.3]),
        "divergence_weight": st.sampled_from([1.0, 0.0, 0.5]),
        "normalization": st.sampled_from(["sequence", "token"]),
        "num_items": st.sampled_from([None, 7.0]),
        "return_entropy": st.booleans(),
    }
)
CLIP_OPTIONS = st.sampled_from([{}, {"clip_cap": 0.5}, {"clip_quantile": 0.6}])


def max_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    assert value.shape == exact.shape
    if value.numel() == 0:
        return 0.0
    return float((value.double() - exact.double()).abs().max())


def assert_accurate(
    name: str,
    ours: torch.Tensor,
    exact: torch.Tensor,
    native: torch.Tensor | Sequence[torch.Tensor],
    float32_floor: float = FLOOR[torch.float32],
    difference_of: torch.Tensor | None = None,
) -> None:
    """|ours - exact| <= 2 |native - exact| + floor, by largest entry; `native` is native-dtype PyTorch, or several
    results of it, of which the worst counts (`natives`).

    The floor is relative to the largest entry, or to 0.1 where that is larger: statistics are differences of numbers
    of order one, and keep their absolute rounding when they are small. `float32_floor`: that of float32.
    `difference_of`: terms of known size that cancel in the result; the floor is then relative to them too.
    """
    scale = max(0.1, float(exact.double().abs().max())) if exact.numel() else 0.0
    if difference_of is not None and difference_of.numel():
        scale = max(scale, float(difference_of.detach().abs().max()))
    floor = float32_floor if ours.dtype == torch.float32 else FLOOR[ours.dtype]
    several = [native] if isinstance(native, torch.Tensor) else native
    allowed = 2.0 * max(max_error(each, exact) for each in several) + floor * scale
    error = max_error(ours, exact)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (largest exact entry {scale:.3e})"


def natives(run: Callable[[], T]) -> list[T]:
    """Results of native-dtype PyTorch here, and those it would give where the library adds in another order.

    One error of it alone may be small by luck, and no bound for anyone else. An example that hypothesis has searched
    for is where it is.
    """
    with native_dtype_logits():
        here = run()
        with LastBit(7):
            return [here, run()]


@contextmanager
def native_dtype_logits() -> Iterator[None]:
    """The reference with its projection done in the inputs' own dtype: what PyTorch users have without this package
    (logits rounded to the dtype, statistics in float32)."""

    def native(hidden: torch.Tensor, head: LMHead, temperature: float = 1.0) -> torch.Tensor:
        logits = hidden @ head.active_weight.T
        if head.active_bias is not None:
            logits = logits + head.active_bias
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return logits / temperature

    with (
        mock.patch("unisd_kernels.reference.logprobs.linear_logits", native),
        mock.patch("unisd_kernels.reference.divergence.linear_logits", native),
        mock.patch("unisd_kernels.reference.mixture.linear_logits", native),
    ):
        yield
