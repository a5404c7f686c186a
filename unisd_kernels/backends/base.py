"""Protocols between the engine and a backend: the few operations that touch [rows, V] logits.

The engine (`engine.py`) walks chunks of rows and makes the remaining products of a gradient; it never looks at a logit.
A backend does. Everything passes as a value: no object keeps what an earlier call left.

Symbols as in docs/design.md: N packed rows, H hidden size, V columns. "The scaled product" of a head is
`a x / tau`, `x = h W^T + b`: the argument of the soft cap, up to a constant; gradients of logits are taken with respect
to it, and `gradient_scale` is applied to the small result of their product instead of to the tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.transform import LogitTransform


class RunningScores(NamedTuple):
    """Statistics of rows, [rows] each, written in place; they come with the values given here."""

    logsumexp: torch.Tensor  # -inf
    target_logits: torch.Tensor  # 0
    entropy: torch.Tensor | None  # 0; None: not asked for


class SoftmaxRows(NamedTuple):
    """Statistics of complete rows, [rows] each."""

    logsumexp: torch.Tensor
    target_logits: torch.Tensor


class Scores(NamedTuple):
    """Log-probability of the target, log-sum-exp and entropy, [rows] each; without entropy None."""

    logprobs: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor | None

    def of_rows(self, rows: slice) -> Scores:
        return Scores(self.logprobs[rows], self.logsumexp[rows], None if self.entropy is None else self.entropy[rows])


class ScoreGrads(NamedTuple):
    """Upstream gradients of `Scores`, [rows] each; None where there is none."""

    logprobs: torch.Tensor | None
    logsumexp: torch.Tensor | None
    entropy: torch.Tensor | None

    def of_rows(self, rows: slice) -> ScoreGrads:
        return ScoreGrads(*(None if value is None else value[rows] for value in self))


class DivergenceRows(NamedTuple):
    """Statistics of complete rows, [rows] each, float32 (float64 for float64)."""

    divergence: torch.Tensor
    student_logprobs: torch.Tensor | None
    teacher_logprobs: torch.Tensor | None
    student_entropy: torch.Tensor | None
    teacher_entropy: torch.Tensor | None


class ShardRows(NamedTuple):
    """Statistics of the rows of student and teacher over one slice's columns, as if these were all, [rows] each."""

    student_logsumexp: torch.Tensor  # float64
    teacher_logsumexp: torch.Tensor  # float64
    divergence: torch.Tensor | None  # None: of a mixture
    student_logprobs: torch.Tensor | None  # any number where another rank has the target
    teacher_logprobs: torch.Tensor | None
    student_entropy: torch.Tensor | None
    teacher_entropy: torch.Tensor | None

    @classmethod
    def nothing(cls, num_rows: int, device: torch.device, mixture: bool, targets: bool, entropy: bool) -> ShardRows:
        """Those of a slice without a column."""
        zeros = torch.zeros(num_rows, dtype=torch.float64, device=device)
        empty = torch.full_like(zeros, -torch.inf)
        of_target, of_entropy = zeros if targets else None, zeros if entropy else None
        return cls(empty, empty, None if mixture else zeros, of_target, of_target, of_entropy, of_entropy)


class WholeRows(NamedTuple):
    """Statistics of the rows of student and teacher over the whole vocabulary, [rows] each."""

    rows: DivergenceRows  # without the divergence of a mixture, until `with_mixture`
    student_logsumexp: torch.Tensor  # float64
    teacher_logsumexp: torch.Tensor  # float64
    student_kl: torch.Tensor | None  # KL(p_s || m) of a mixture

    def of_rows(self, rows: slice) -> WholeRows:
        statistics = DivergenceRows(*(None if value is None else value[rows] for value in self.rows))  # type: ignore[arg-type]
        student_kl = None if self.student_kl is None else self.student_kl[rows]
        return WholeRows(statistics, self.student_logsumexp[rows], self.teacher_logsumexp[rows], student_kl)


@dataclass(frozen=True)
class NeedsGrad:
    """Gradients to compute. With none, no gradient tile is formed and no product is spent on it."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @classmethod
    def of(cls, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> NeedsGrad:
        """Those that autograd will ask for. Taken outside the autograd function: inside it `needs_input_grad` is also
        true under `no_grad`."""
        if not torch.is_grad_enabled():
            return cls()
        return cls(hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias

    @property
    def head(self) -> bool:
        return self.weight or self.bias


class Divergence(Protocol):
    """Student and teacher over the same rows in one call of the engine: sizes and buffers, nothing of an earlier block.

    Chunk by chunk: `logits`, then for each block of the chunk's rows `forward` and, if needed, `backward`; then the
    engine multiplies `gradient` with the weight.
    """

    # Rows whose gradient is held at a time.
    chunk_rows: int
    # Rows of a chunk whose statistics are taken at a time; None for all.
    block_rows: int | None

    def logits(self, rows: slice) -> Any:
        """Products of a chunk that its blocks share, for `forward`; None where they are made block by block."""

    def forward(
        self, chunk: Any, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> tuple[DivergenceRows, Any]:
        """Statistics of a block, and `saved` for its `backward`.

        Args:
            chunk: what `logits` returned for the chunk.
            rows: the block's rows in the whole; `local` in the chunk.
            target_ids: [rows], or None where no log-probability is asked for.
        """

    def backward(
        self,
        saved: Any,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        """Write the block's rows of the gradient of `sum_n weight_n D_n + logprob_weight_n logp_n(y_n)` with respect to
        the student's scaled product. Weights are [rows]; None is one for `weight`, and none for `logprob_weight`."""

    def gradient(self, count: int) -> torch.Tensor:
        """[count, V]: what `backward` wrote for the chunk's `count` rows."""


class ShardDivergence(Divergence, Protocol):
    """The same where the columns are a slice of a vocabulary (`shards.py`). In place of `forward` and `backward`; ids
    are of the slice, -1 where another rank has the target."""

    def shard_forward(
        self, chunk: Any, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> tuple[ShardRows, Any]:
        """Statistics of a block over the slice's columns, and `saved` for the other two. Arguments as of `forward`."""

    def shard_mixture(self, saved: Any, whole: WholeRows) -> torch.Tensor:
        """[2, rows]: the sums over the slice's columns of the terms of a mixture's D and of KL(p_s || m)."""

    def shard_backward(
        self,
        saved: Any,
        whole: WholeRows,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        """Write what `backward` writes, for the slice's columns."""


class Backend(Protocol):
    """The operations on logits. Tiles arrive as `product_scale * (h W^T + b)`, with contiguous rows, float32 or
    float64, and may be overwritten."""

    name: str
    # Are the auxiliary views of a small batch better scored as one? On a CPU they are not.
    stacks_views: bool
    # Is a target id outside the columns an assertion in what `score` launches? Then nothing else need look, on an
    # accelerator.
    score_asserts_ids: bool
    # Elements left free behind each row of a buffer.
    row_padding: int

    def chunk_rows(self, num_rows: int, most: int, weight_gradient: bool) -> int:
        """Rows to take as a chunk: at most `most`, which is at least one. With a weight gradient each chunk reads and
        writes all of it."""

    def block_rows(self, num_columns: int, device: torch.device) -> int | None:
        """Rows of a chunk to hand over at a time (cache blocking), or None for the whole chunk."""

    def gradient_dtype(self, projection: Projection) -> torch.dtype:
        """Dtype of the gradient tiles that `softmax` and `score_backward` write: the logits' own, which then overwrite
        them, or a narrower one."""

    def logits(self, projection: Projection, rows: slice, out: torch.Tensor) -> None:
        """`out = product_scale * (h W^T + b)`, [rows, V]."""

    def hidden_gradient(self, projection: Projection, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """`out = gradient_scale * G W` for complete rows; `gradient` is [rows, V], `out` [rows, H]."""

    def add_weight_gradient(
        self, projection: Projection, gradient: torch.Tensor, rows: slice, out: torch.Tensor, first: bool
    ) -> None:
        """`out += gradient_scale * G^T h`, or `=` for the `first` rows; `out` is [V, H] in the accumulator's dtype."""

    def score(
        self, projection: Projection, rows: slice, target_ids: torch.Tensor, running: RunningScores, tile_bytes: int
    ) -> None:
        """Write log-sum-exp, target logit and entropy of some rows over the whole vocabulary into `running`, without
        holding more than `tile_bytes` of logits. `target_ids` is [rows]."""

    def softmax(
        self, logits: torch.Tensor, gradient: torch.Tensor, transform: LogitTransform, target_ids: torch.Tensor
    ) -> SoftmaxRows:
        """Statistics of complete rows [rows, V]; writes `p_j * d z_j / d (a x_j / tau)`, the gradient of their
        log-sum-exp, into `gradient` [rows, V], which is the tile itself if it has its dtype."""

    def score_backward(
        self,
        logits: torch.Tensor,
        gradient: torch.Tensor,
        transform: LogitTransform,
        target_ids: torch.Tensor,
        scores: Scores,
        grads: ScoreGrads,
    ) -> None:
        """Write the gradient of `sum_n` upstream times statistic into `gradient` [rows, V], which is the tile itself if
        it has its dtype. `logits` is [rows, V]; the rest is [rows]."""

    def divergence(
        self,
        student: Projection,
        teacher: Projection,
        beta: float,
        workspace_bytes: int,
        needs_grad: NeedsGrad,
        unit_weights: bool,
    ) -> Divergence:
        """Walk over the rows of student and teacher for a divergence and the student's gradients that are needed; of
        slices of a vocabulary a `ShardDivergence`.

        `unit_weights`: `Divergence.backward` will be given no weights.
        """

    def scale_rows(self, rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`scale_n rows_n`, rounded once to `dtype`; how upstream weights [N] meet row gradients [N, H] made in the
        forward."""


class LogitPair(NamedTuple):
    """Scaled products of complete rows of two views, [rows, V] each with contiguous rows; may be overwritten."""

    student: torch.Tensor
    teacher: torch.Tensor
    # Bool [rows], or None for nowhere: here the second tile holds z_t - z_s.
    teacher_is_delta: torch.Tensor | None

    def of_rows(self, rows: slice) -> LogitPair:
        is_delta = None if self.teacher_is_delta is None else self.teacher_is_delta[rows]
        return LogitPair(self.student[rows], self.teacher[rows], is_delta)


class LogitBackend(Backend, Protocol):
    """A backend whose divergence works on logits that products have made (`logit_divergence.py`)."""

    # Does it take z_t - z_s in place of z_t? With one head for both that is `(h_t - h_s) W^T`, which keeps the digits
    # of a small divergence.
    takes_delta: bool
    # Does it write a gradient whose weights are all one together with the statistics, while a row is near?
    joins_gradient: bool

    def multiplies_narrow(self, projection: Projection) -> bool:
        """Whether its products take these 16-bit operands as they are, so that rows to project are better left so."""

    def divergence_of_logits(
        self,
        logits: LogitPair,
        student: LogitTransform,
        teacher: LogitTransform,
        target_ids: torch.Tensor | None,
        beta: float,
        want_entropy: bool,
        with_gradient: bool,
    ) -> tuple[DivergenceRows, Any]:
        """Statistics of complete rows, and `saved` for `divergence_of_logits_backward`. `target_ids` is [rows].

        `with_gradient`, where it `joins_gradient`: that of weights of one is written at once, and no backward follows.
        """

    def divergence_of_logits_backward(
        self,
        saved: Any,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        """Write what `Divergence.backward` writes, into the student's tile."""

    # `ShardDivergence`'s `shard_forward`, `shard_mixture` and `shard_backward` of logits that products have made.

    def divergence_of_shard(
        self,
        logits: LogitPair,
        student: LogitTransform,
        teacher: LogitTransform,
        target_ids: torch.Tensor | None,
        beta: float,
        want_entropy: bool,
    ) -> tuple[ShardRows, Any]: ...

    def mixture_of_shard(self, saved: Any, whole: WholeRows) -> torch.Tensor: ...

    def divergence_of_shard_backward(
        self,
        saved: Any,
        whole: WholeRows,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None: ...
