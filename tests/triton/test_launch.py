"""What launches ask of tensors and of PyTorch's settings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from unisd_kernels.backends.triton.launch import has_whole_vectors, product_precision, supports_tma, tile_grid


@pytest.fixture
def matmul_setting():
    """PyTorch's precision of float32 products, put back afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


def on_cuda(dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(dtype=dtype, device=torch.device("cuda"))


def test_the_precision_of_float32_products_follows_both_of_torchs_settings(matmul_setting, monkeypatch):
    """The older one's getter raises after the newer one was used, which TrainingArguments(tf32=True) does."""
    assert product_precision(on_cuda(torch.float32)) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert product_precision(on_cuda(torch.float32)) == "tf32"
    assert product_precision(on_cuda(torch.bfloat16)) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert product_precision(on_cuda(torch.float32)) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert product_precision(on_cuda(torch.float32)) == "tf32"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert product_precision(on_cuda(torch.float32)) == "ieee"
    torch.set_float32_matmul_precision("highest")
    assert product_precision(on_cuda(torch.float32)) == "ieee"


whole = torch.empty(64, 128, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("matrix", "descriptor", "vectors"),
    [
        (whole, True, True),
        (whole[:, :100], True, True),
        (whole[3:4], True, True),
        (whole[:, 8:100], True, True),
        (whole[:, 1:], False, False),  # starts off alignment
        (whole[:1].expand(64, 128), False, True),  # the same row again and again
        (whole.as_strided((8, 128), (64, 1)), False, True),  # rows that overlap
        (whole.T, False, False),
        (whole[:, ::2], False, False),
        (whole[:, :0], False, True),
        (whole[:0], False, True),
        (torch.empty(64, 100, dtype=torch.bfloat16), False, False),  # 200 bytes a row
        (torch.empty(64, 104, dtype=torch.bfloat16), True, False),  # 208 bytes, but no multiple of 16 numbers
        (torch.empty(64, 4), True, False),
        (torch.empty(64, 1, dtype=torch.bfloat16), False, False),
    ],
)
def test_what_tma_and_whole_vectors_take(matrix, descriptor, vectors):
    assert supports_tma(matrix) is descriptor
    assert has_whole_vectors(matrix) is vectors


def test_the_grid_of_a_tile_has_one_axis():
    """A second one has 65535 programs at most: 4 rows each are 262140."""
    assert tile_grid(torch.empty(1000, 1300, device="meta"), 4, 512) == (250 * 3,)
