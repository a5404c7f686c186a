"""On a CUDA device: sums over the rows of a sequence are the same bits at every call, and nothing waits for them."""

from __future__ import annotations

import pytest
import torch

from unisd_kernels.packing import sequence_sums

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("views", [(), (3,)])
def test_the_same_bits_and_no_synchronization(dtype, views):
    values = torch.randn(*views, 50000, dtype=dtype, device="cuda")
    cu_seqlens = torch.tensor([0, 0, 3, 20000, 20001, 50000], dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = [sequence_sums(values, cu_seqlens) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(each, sums[0]) for each in sums)
    exact = sequence_sums(values.cpu().double(), cu_seqlens.cpu())
    torch.testing.assert_close(sums[0].cpu().double(), exact, rtol=1e-6, atol=1e-6)
    assert not sums[0][..., 0].any()
