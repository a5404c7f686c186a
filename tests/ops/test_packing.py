"""`pack_rows`: valid rows in order, offsets, gradients."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from unisd_kernels import pack_rows
from unisd_kernels.packing import sequence_ids, sequence_lengths, sequence_sums


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5))
def test_round_trip(rows):
    mask = torch.tensor(rows)
    values = torch.arange(mask.numel()).view(mask.shape)
    hidden = values.float().unsqueeze(-1).expand(-1, -1, 3).clone().requires_grad_()
    packed, ids, cu_seqlens = pack_rows(mask.long(), hidden, values)
    assert ids.tolist() == values[mask].tolist()
    assert torch.equal(packed[:, 1], ids.float())
    assert cu_seqlens.dtype == torch.int32
    assert sequence_lengths(cu_seqlens).tolist() == mask.sum(1).tolist()
    owners = sequence_ids(cu_seqlens, ids.numel())
    assert owners.tolist() == mask.nonzero()[:, 0].tolist()
    sums = sequence_sums(ids.float(), cu_seqlens)
    assert sums.tolist() == (values * mask).sum(1).tolist()
    packed.sum().backward()
    assert torch.equal(hidden.grad[..., 0], mask.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("views", [(), (3,)])
def test_sequence_sums_are_the_exact_sums(dtype, views):
    """Each within an ulp of the rational sum of its own rows (float32: rounded once), whatever the neighbours hold."""
    values = torch.rand(*views, 3000, dtype=dtype) + 1.0
    values[..., 1200] = torch.nan
    offsets = [0, 0, 1200, 1201, 2999, 3000, 3000]
    sums = sequence_sums(values, torch.tensor(offsets, dtype=torch.int32))
    assert sums.dtype == dtype
    assert sums.shape == (*views, 6)
    for row, found in zip(values.reshape(-1, 3000), sums.reshape(-1, 6), strict=True):
        for b, (start, end) in enumerate(pairwise(offsets)):
            if b == 2:
                assert found[b].isnan()
                continue
            exact = sum(map(Fraction, row[start:end].tolist()), Fraction(0))
            allowed = 0.51 * 2.0**-23 if dtype == torch.float32 else 1e-13
            assert abs(Fraction(float(found[b])) - exact) <= Fraction(allowed) * exact


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0]])
def test_sequence_sums_of_nothing(offsets):
    for shape in ((0,), (2, 0)):
        sums = sequence_sums(torch.zeros(shape), torch.tensor(offsets))
        assert sums.tolist() == torch.zeros(*shape[:-1], len(offsets) - 1).tolist()


def test_sequence_sums_without_gradient_and_compiled():
    values, cu_seqlens = torch.rand(2, 9, requires_grad=True), torch.tensor([0, 4, 4, 9])
    expected = sequence_sums(values, cu_seqlens)
    assert not expected.requires_grad
    compiled = torch.compile(sequence_sums, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, cu_seqlens), expected)
    with FakeTensorMode() as mode:
        fake = sequence_sums(mode.from_tensor(values), mode.from_tensor(cu_seqlens))
    assert fake.shape == (2, 3)
    assert fake.dtype == torch.float32


def test_bad_input():
    with pytest.raises(ValueError, match=r"mask must have shape \[B, T\]"):
        pack_rows(torch.ones(3))
    with pytest.raises(ValueError, match=r"tensor 1 has shape \(2, 4\)"):
        pack_rows(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor, got list"):
        pack_rows([[1, 0]], torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"tensor 0 must be a torch\.Tensor, got str"):
        pack_rows(torch.ones(1, 2), "ids")
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        pack_rows(torch.ones(1, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="mask contains NaN"):
        pack_rows(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="tensor 0 is on meta but mask is on cpu"):
        pack_rows(torch.ones(1, 2), torch.ones(1, 2, device="meta"))
