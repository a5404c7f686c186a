"""The matrix products around a tile: hidden rows to logits, and a gradient tile back to hidden, weight and bias.

Operands keep their dtype where the device can accumulate and return float32 (CUDA); elsewhere 16-bit operands are
widened, the weight a slice of columns at a time. Logits and gradients are never rounded to 16 bits before a
statistic is taken from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unisd_kernels.backends.transform import LogitTransform
from unisd_kernels.dtypes import statistics_dtype
from unisd_kernels.heads import LMHead
from unisd_kernels.heads.head import same_memory
from unisd_kernels.heads.shard import VocabShard

# A widened slice of a 16-bit weight takes at most this much.
_WIDENED_BYTES = 16 << 20
# The longest difference of two 16-bit rows that is projected in 16 bits, as a share of the row.
_NARROW_DELTA = 2.0**-8


@dataclass(frozen=True)
class Projection:
    """Hidden rows and the head they go through, without autograd."""

    hidden: torch.Tensor  # [N, H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    transform: LogitTransform
    shard: VocabShard | None = None  # of what vocabulary the weight's rows are a slice; None: they are all of it

    @classmethod
    def of(cls, hidden: torch.Tensor, head: LMHead, temperature: float) -> Projection:
        transform = LogitTransform.of(head, temperature)
        return cls(hidden, head.active_weight, head.active_bias, transform, head.shard).detach()

    def detach(self) -> Projection:
        bias = None if self.bias is None else self.bias.detach()
        return Projection(self.hidden.detach(), self.weight.detach(), bias, self.transform, self.shard)

    def of_rows(self, hidden: torch.Tensor) -> Projection:
        """Other hidden states through the same head."""
        if hidden is self.hidden:
            return self
        return Projection(hidden, self.weight, self.bias, self.transform, self.shard)

    def weight_is(self, other: Projection) -> bool:
        """Whether the other one's weight is this very memory."""
        return same_memory(self.weight, other.weight)

    def delta_is_projection(self, other: Projection) -> bool:
        """Whether `z_other - z_self` is the projection of `h_other - h_self`: one head for both, and no soft cap."""
        return (
            self.transform == other.transform
            and self.transform.softcap is None
            and same_memory(self.weight, other.weight)
            and same_memory(self.bias, other.bias)
        )

    def can_project_delta(self, other: Projection) -> bool:
        """`delta_is_projection`, and the device projects rows that are wider than the weight (the difference of two
        16-bit rows may have more digits than either)."""
        return self.delta_is_projection(other) and not self._mixed_product

    def delta_rows(self, other: Projection, rows: slice, narrow: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [rows, H] to project in place of some of `hidden`, for heads that satisfy `can_project_delta`; and where
        (bool [rows]) they are d = `hidden - other.hidden`. The others are `hidden`.

        A projection's rounding goes with the length of what is projected. From d = h - h_o the logits z - z_o have an
        error of |d| and z = z_o + (z - z_o) one of |h_o| + |d| <= |h| + 2 |d|; from h itself they are |h_o| + |h| <=
        |d| + 2 |h| and |h|. So with |d| <= |h| neither of the two is ever worse than three times what the other choice
        gives: no digit of a small difference is lost, nor of a teacher whose logits are small beside the student's.

        `narrow`: rows in the dtype of `hidden`, for products that take bfloat16 as it is. Rounding d costs 2^-9 of an
        element at most, and nothing where the two are within a factor of two of each other (Sterbenz). A float32 sum of
        products of h has 2^-24 of |h|, a few times over: so the difference is taken where |d| <= 2^-8 |h|. There the
        two errors are about equal, and on either side smaller (`python -m bench numerics`).
        """
        dtype = self.hidden.dtype if narrow else self.dtype
        hidden = self.hidden[rows].to(self.dtype)
        difference = hidden - other.hidden[rows].to(self.dtype)
        share = _NARROW_DELTA**2 if narrow else 1.0
        # In float64, where the squares neither overflow nor differ by the order of their sum.
        is_delta = difference.double().square_().sum(-1) <= share * hidden.double().square_().sum(-1)
        return torch.where(is_delta.unsqueeze(-1), difference, hidden).to(dtype), is_delta

    @property
    def num_columns(self) -> int:
        """Columns that are here."""
        return self.weight.shape[0]

    @property
    def sizing_columns(self) -> int:
        """Columns by which rows are counted that go at a time: the widest slice's, so that all ranks take as many."""
        return self.num_columns if self.shard is None else self.shard.most_columns

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits, statistics and accumulators."""
        return statistics_dtype(self.hidden.dtype)

    @property
    def _mixed_product(self) -> bool:
        """Whether the device multiplies 16-bit operands into a float32 result."""
        return self.hidden.dtype in (torch.bfloat16, torch.float16) and self.hidden.device.type == "cuda"

    def _slices(self, start: int, end: int) -> list[tuple[int, int]]:
        if self._mixed_product or self.weight.dtype == self.dtype:
            return [(start, end)]
        step = max(1, _WIDENED_BYTES // (self.dtype.itemsize * self.weight.shape[1]))
        return [(low, min(low + step, end)) for low in range(start, end, step)]

    def logits(self, rows: slice, out: torch.Tensor, start: int = 0, end: int | None = None) -> None:
        """`out = product_scale * (h W^T + b)` for some rows and the columns [start, end)."""
        end = self.num_columns if end is None else end
        scale = self.transform.product_scale
        hidden = self.hidden[rows]
        if self._mixed_product:
            if self.bias is None and scale != 1.0:
                # The scale costs a pass over the logits otherwise.
                torch.addmm(out, hidden, self.weight[start:end].T, out_dtype=self.dtype, beta=0.0, alpha=scale, out=out)
                return
            torch.mm(hidden, self.weight[start:end].T, out_dtype=self.dtype, out=out)
            if self.bias is not None:
                out.add_(self.bias[start:end]).mul_(scale)
            return
        hidden = hidden.to(self.dtype)
        for low, high in self._slices(start, end):
            columns = out[:, low - start : high - start]
            weight = self.weight[low:high].to(self.dtype)
            if self.bias is not None:
                bias = self.bias[low:high].to(self.dtype)
                torch.addmm(bias, hidden, weight.T, beta=scale, alpha=scale, out=columns)
            elif scale != 1.0:
                torch.addmm(columns, hidden, weight.T, beta=0.0, alpha=scale, out=columns)
            else:
                torch.mm(hidden, weight.T, out=columns)

    def target_gradient(self, target_ids: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
        """`dz_y / dh` for one target id a row, [N, H]. Of a slice of a vocabulary: ids in it, and 0 for -1."""
        if self.shard is not None and self.num_columns == 0:
            return torch.zeros(self.hidden.shape, dtype=self.dtype, device=self.hidden.device)
        gradient = self.weight.index_select(0, target_ids.clamp(min=0)).to(self.dtype)
        if self.shard is not None:
            gradient.masked_fill_((target_ids < 0).unsqueeze(-1), 0.0)
        if self.transform.tanh_scale is not None:
            gradient.mul_((1.0 - (target_logits / self.transform.tanh_scale).square()).unsqueeze(-1))
        return gradient.mul_(self.transform.gradient_scale)

    def hidden_gradient(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """`out = gradient_scale * G W` for complete rows; `gradient` is [rows, V], `out` [rows, H]."""
        scale = self.transform.gradient_scale
        if self._mixed_product:
            torch.mm(gradient.to(self.weight.dtype), self.weight, out_dtype=self.dtype, out=out)
            if scale != 1.0:
                out.mul_(scale)
            return
        beta = 0.0
        for low, high in self._slices(0, self.num_columns):
            weight = self.weight[low:high].to(self.dtype)
            torch.addmm(out, gradient[:, low:high].to(self.dtype), weight, beta=beta, alpha=scale, out=out)
            beta = 1.0

    def add_weight_gradient(self, gradient: torch.Tensor, rows: slice, out: torch.Tensor, first: bool) -> None:
        """`out += gradient_scale * G^T h`, or `=` for the `first` rows; `out` is [V, H] in the accumulator's dtype."""
        scale, beta = self.transform.gradient_scale, 0.0 if first else 1.0
        if self._mixed_product:
            narrow = gradient.to(self.hidden.dtype)
            torch.addmm(out, narrow.T, self.hidden[rows], out_dtype=self.dtype, beta=beta, alpha=scale, out=out)
            return
        out.addmm_(gradient.to(self.dtype).T, self.hidden[rows].to(self.dtype), beta=beta, alpha=scale)

    def add_bias_gradient(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """`out += gradient_scale * sum_rows G`."""
        out.add_(gradient.sum(0, dtype=self.dtype), alpha=self.transform.gradient_scale)
