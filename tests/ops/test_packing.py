"""`pack_rows`: valid rows in order, offsets, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    sums = sequence_sums(ids.float(), owners, mask.shape[0])
    assert sums.tolist() == (values * mask).sum(1).tolist()
    packed.sum().backward()
    assert torch.equal(hidden.grad[..., 0], mask.float())


def test_bad_input():
    with pytest.raises(ValueError, match=r"mask must have shape \[B, T\]"):
        pack_rows(torch.ones(3))
    with pytest.raises(ValueError, match=r"tensor 1 has shape \(2, 4\)"):
        pack_rows(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4))
