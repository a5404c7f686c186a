"""The interface between the engine and a backend: the few operations that touch [rows, columns] logits.

A backend implements `Backend`. The engine makes the tiles with matrix products and walks rows and columns; it never
looks at a logit. `backends/torch.py` is the plain PyTorch backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from unisd_kernels.heads import LMHead

if TYPE_CHECKING:
    from unisd_kernels.backends.projection import Projection


@dataclass(frozen=True)
class LogitTransform:
    """From the raw product `x = h W^T + b` to the logit `z = softcap_c(a x) / tau`."""

    logit_scale: float
    softcap: float | None
    temperature: float

    @classmethod
    def of(cls, head: LMHead, temperature: float) -> LogitTransform:
        return cls(head.logit_scale, head.softcap, temperature)

    @property
    def product_scale(self) -> float:
        """What the raw product is multiplied by before the tile is handed over: all of the transform without a cap,
        and the argument of the tanh with one. Matrix products apply it for free (`alpha`)."""
        return self.logit_scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def tanh_scale(self) -> float | None:
        """`c / tau`, by which the tanh is multiplied; None without a cap."""
        return None if self.softcap is None else self.softcap / self.temperature

    @property
    def gradient_scale(self) -> float:
        """`a / tau`: the constant part of `dz / dx`. It is applied to the small result, not to the tile."""
        return self.logit_scale / self.temperature


class RunningScores(NamedTuple):
    """Statistics of rows, [rows] each, written in place: of the columns seen so far, or of all."""

    logsumexp: torch.Tensor  # initially -inf
    target_logits: torch.Tensor
    entropy: torch.Tensor | None  # initially 0


class SoftmaxRows(NamedTuple):
    """Statistics of complete rows, [rows]."""

    logsumexp: torch.Tensor
    target_logits: torch.Tensor


class DivergenceRows(NamedTuple):
    """Statistics of complete rows; all [rows] and float32 (float64 for float64)."""

    divergence: torch.Tensor
    student_logprobs: torch.Tensor | None
    teacher_logprobs: torch.Tensor | None
    student_entropy: torch.Tensor | None
    teacher_entropy: torch.Tensor | None


@dataclass(frozen=True)
class NeedsGrad:
    """Which gradients to compute. With none, no gradient tile is formed and no product is spent on it."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias

    @property
    def head(self) -> bool:
        return self.weight or self.bias


class PairWalk(Protocol):
    """A student and a teacher over the same rows, chunk by chunk. Per chunk: `begin`, then for each block of its rows
    `statistics` and, if needs_grad, `gradient`; then `gradient_tile` meets the weight in a product."""

    # Rows whose gradient is held at a time.
    chunk_rows: int
    # Rows of a chunk whose statistics are taken at a time, or None for all.
    block_rows: int | None

    def begin(self, rows: slice) -> None:
        """Start on some rows, at most `chunk_rows`."""

    def statistics(
        self, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> DivergenceRows:
        """Of a block: `rows` of all, which are `local` in the chunk."""

    def gradient(
        self,
        local: slice,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        """The gradient of `sum_n weight_n D_n + logprob_weight_n logp_n(y_n)` with respect to `a x / tau` of the
        student, for the block of the last `statistics`. A weight of None is one (`weight`) or absent."""

    def gradient_tile(self, count: int) -> torch.Tensor:
        """[count, V]: the gradients of the chunk's rows."""


class Backend(Protocol):
    """A backend. Tiles arrive as `product_scale * (h W^T + b)`, with contiguous rows, float32 or float64, and may be
    overwritten."""

    name: str
    # Are the auxiliary views of a small batch better scored as one? On a CPU they are not.
    stacks_views: bool
    # Elements left free behind each row of a buffer.
    row_padding: int

    def chunk_rows(self, num_rows: int, most: int, weight_gradient: bool) -> int:
        """How many rows to take as a chunk: at most `most`, which is at least one. With a weight gradient each chunk
        reads and writes all of it."""

    def block_rows(self, num_columns: int, device: torch.device) -> int | None:
        """How many rows of a chunk to hand over at a time (cache blocking), or None for the whole chunk."""

    def gradient_dtype(self, projection: Projection) -> torch.dtype:
        """Of the gradient tiles that `softmax` and `logprob_gradient` write: the logits' own, which then overwrite
        them, or a narrower one."""

    def logits(self, projection: Projection, rows: slice, out: torch.Tensor) -> None:
        """`out = product_scale * (h W^T + b)`, [rows, V]."""

    def hidden_gradient(self, projection: Projection, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """`out = gradient_scale * G W` for complete rows; `gradient` is [rows, V], `out` [rows, H]."""

    def score(
        self, projection: Projection, rows: slice, target_ids: torch.Tensor, running: RunningScores, tile_bytes: int
    ) -> None:
        """Log-sum-exp, target logit and entropy of some rows over the whole vocabulary, without holding more than
        `tile_bytes` of logits. `running` comes with its initial values."""

    def scale_rows(self, rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`scale_n rows_n`, rounded once to `dtype`; how upstream weights meet row gradients made in the forward."""

    def pair_walk(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, needs_grad: NeedsGrad
    ) -> PairWalk:
        """The walk for a divergence and those of the student's gradients that are needs_grad."""

    def softmax(
        self, tile: torch.Tensor, gradient: torch.Tensor, transform: LogitTransform, target_ids: torch.Tensor
    ) -> SoftmaxRows:
        """Statistics of complete rows; writes `p_j * d z_j / d (a x_j / tau)`, the gradient of their log-sum-exp with
        respect to `a x / tau`, into `gradient`, which is the tile if it has its dtype."""

    def logprob_gradient(
        self,
        tile: torch.Tensor,
        gradient: torch.Tensor,
        transform: LogitTransform,
        logsumexp: torch.Tensor,
        target_ids: torch.Tensor,
        logprob_weight: torch.Tensor | None,
        logsumexp_weight: torch.Tensor | None,
        entropy: torch.Tensor | None,
        entropy_weight: torch.Tensor | None,
    ) -> None:
        """Write the gradient of `sum_n weight_n * statistic_n` with respect to `a x / tau` (the constant
        `gradient_scale` is left to the caller) into `gradient`, which is the tile if it has its dtype."""


class LogitBackend(Backend, Protocol):
    """A backend whose divergence works on logits that products have made (`pair_walk.TilePairWalk`)."""

    # Does `divergence` take the difference z_t - z_s in place of z_t, in rows that `is_difference` marks? With one head
    # for both it is `(h_t - h_s) W^T`, which keeps the digits of a small divergence.
    takes_difference: bool

    def divergence(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        student_transform: LogitTransform,
        teacher_transform: LogitTransform,
        target_ids: torch.Tensor | None,
        beta: float,
        want_entropy: bool,
        is_difference: torch.Tensor | None = None,
    ) -> tuple[DivergenceRows, Any]:
        """Statistics of complete rows, and a state for `divergence_gradient`. Both tiles may be overwritten.
        `is_difference` (bool [rows]): these rows of the second tile hold z_t - z_s; only where `takes_difference`."""

    def divergence_gradient(
        self,
        student: torch.Tensor,
        state: Any,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        """Write the gradient of `sum_n weight_n D_n + logprob_weight_n logp_n(y_n)` with respect to `a x / tau` of
        the student into the student's tile. A weight of None is one (`weight`) or absent (`logprob_weight`)."""
