"""The Triton filling: NVIDIA GPUs, and AMD's and Intel's as far as Triton carries; the CPU under its interpreter.

Scores come from a product kernel that keeps the logits in registers. For a divergence there are two designs
(`docs/gpu.md` compares them):

- fused (`triton/pair.py`): one product kernel for student and teacher, whose statistics are taken in registers and
  whose logits are stored in 16 bits relative to a reference, for the gradient alone. For the two KLs with 16-bit
  operands.
- chunked: library products into float32 tiles, statistics in one read, gradients in one read and one write. Everything
  else: the JSD, whose sums need the log-sum-exps first, and float32 operands.

Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from unisd_kernels.tiles.base import (
    DivergenceRows,
    LogitTransform,
    PairWalk,
    RunningScores,
    SoftmaxRows,
    Wanted,
)
from unisd_kernels.tiles.buffers import equal_tiles, most_rows, row_buffer, row_stride, split_rows, whole_tiles
from unisd_kernels.tiles.projection import Projection
from unisd_kernels.triton import gradients, pair, score, statistics
from unisd_kernels.triton import rows as row_kernels
from unisd_kernels.triton.launch import (
    ROW_PADDING,
    descriptor,
    num_processors,
    on_device,
    product_precision,
    row_major,
    spans_of_vocabulary,
    takes_descriptor,
)
from unisd_kernels.triton.tuning import ProductConfig, candidates, choose

# Columns a program of the elementwise kernels takes, and rows.
_TILE_COLUMNS, _TILE_ROWS = 512, 4
_STATISTICS_COLUMNS = 1024
_LONG_COLUMNS = 2048
# A float32 sum of products of 16-bit numbers is off by about this fraction of the rows' norms (2^-20).
_PRODUCT_ROUNDING = 2.0**-20


class TritonTiles:
    """See `unisd_kernels.tiles.base.Tiles`.

    Args:
        design: "fused" or "chunked" to insist on one for the KLs; None for the default of the device.
    """

    name = "triton"
    row_padding = ROW_PADDING

    def __init__(self, design: str | None = None) -> None:
        self._design = design

    def chunk_rows(self, num_rows: int, most: int, weight_gradient: bool) -> int:
        return equal_tiles(num_rows, whole_tiles(most))

    def block_rows(self, num_columns: int, device: torch.device) -> None:
        return None

    def gradient_dtype(self, projection: Projection) -> torch.dtype:
        """The operands', in which the gradient enters its products."""
        return projection.hidden.dtype

    def logits(self, projection: Projection, rows: slice, out: torch.Tensor) -> None:
        projection.logits(rows, out)

    def hidden_gradient(self, projection: Projection, gradient: torch.Tensor, out: torch.Tensor) -> None:
        projection.hidden_gradient(gradient, out)

    def score(
        self, projection: Projection, rows: slice, target_ids: torch.Tensor, running: RunningScores, tile_bytes: int
    ) -> None:
        hidden, weight = row_major(projection.hidden[rows]), row_major(projection.weight)
        num_rows, width = hidden.shape
        num_columns, transform = projection.num_columns, projection.transform
        bias = None if projection.bias is None else projection.bias.contiguous()
        target_ids = target_ids.contiguous()
        want_entropy = running.entropy is not None
        kind = "score"
        if hidden.dtype == torch.float32:
            kind = "score-float32"
        elif num_rows <= 64:
            kind = "score-few"
        elif want_entropy or transform.tanh_scale is not None:
            kind = "score-heavy"
        results: list[torch.Tensor | None] = []

        def run(config: ProductConfig) -> None:
            row_blocks = triton.cdiv(num_rows, config.rows)
            column_blocks = triton.cdiv(num_columns, config.columns)
            spans = spans_of_vocabulary(row_blocks, column_blocks, config.occupancy * num_processors(hidden.device))
            blocks_per_span = triton.cdiv(column_blocks, spans)
            spans = triton.cdiv(column_blocks, blocks_per_span)
            partial = torch.empty(spans, num_rows, dtype=torch.float32, device=hidden.device)
            partial_entropy = torch.empty_like(partial) if want_entropy else None
            operands, with_descriptors = _operands(config, (hidden, config.rows), (weight, config.columns))
            score.score_kernel[(row_blocks * spans,)](
                *operands,
                bias,
                target_ids,
                partial,
                partial_entropy,
                running.target_logits,
                num_rows,
                num_columns,
                width,
                hidden.stride(0),
                weight.stride(0),
                blocks_per_span,
                spans,
                transform.product_scale,
                transform.tanh_scale or 1.0,
                HAS_BIAS=bias is not None,
                HAS_CAP=transform.tanh_scale is not None,
                WANT_ENTROPY=want_entropy,
                DESCRIPTORS=with_descriptors,
                EVEN_WIDTH=width % config.width == 0,
                PRECISION=product_precision(hidden),
                WARP_SPECIALIZE=config.warp_specialize and with_descriptors,
                BLOCK_ROWS=config.rows,
                BLOCK_COLUMNS=config.columns,
                BLOCK_WIDTH=config.width,
                GROUP=config.group,
                num_warps=config.warps,
                num_stages=config.stages,
            )
            results[:] = [partial, partial_entropy]

        with on_device(hidden):
            run(choose(kind, hidden.device, (num_rows, num_columns, width), run))
            partial, partial_entropy = results
            assert partial is not None
            torch.logsumexp(partial, 0, out=running.logsumexp)
            if running.entropy is not None:
                assert partial_entropy is not None
                # The entropy of the spans and of the choice among them.
                log_share = partial.log_softmax(0)
                torch.sum(log_share.exp().mul_(partial_entropy - log_share), 0, out=running.entropy)

    def scale_rows(self, rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        if not out.numel():
            return out
        columns = min(1024, triton.next_power_of_2(rows.shape[1]))
        with on_device(rows):
            row_kernels.scale_rows_kernel[(rows.shape[0], triton.cdiv(rows.shape[1], columns))](
                rows, scale.contiguous(), out, rows.shape[1], rows.stride(0), out.stride(0), BLOCK_COLUMNS=columns
            )
        return out

    def pair_walk(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, wanted: Wanted
    ) -> PairWalk:
        narrow = all(p.hidden.dtype in (torch.float16, torch.bfloat16) for p in (student, teacher))
        fused = beta in (0.0, 1.0) and (narrow if self._design is None else self._design == "fused")
        walk = FusedWalk if fused else ChunkedWalk
        return walk(student, teacher, beta, workspace_bytes, wanted)

    def softmax(
        self, tile: torch.Tensor, gradient: torch.Tensor, transform: LogitTransform, target_ids: torch.Tensor
    ) -> SoftmaxRows:
        result = SoftmaxRows(tile.new_empty(tile.shape[0]), tile.new_empty(tile.shape[0]))
        with on_device(tile):
            gradients.softmax_statistics_kernel[(tile.shape[0],)](
                tile,
                target_ids.contiguous(),
                *result,
                tile.shape[1],
                tile.stride(0),
                transform.tanh_scale or 1.0,
                HAS_CAP=transform.tanh_scale is not None,
                BLOCK_COLUMNS=min(_LONG_COLUMNS, triton.next_power_of_2(tile.shape[1])),
                num_warps=8,
            )
        ones = torch.ones_like(result.logsumexp)
        self.logprob_gradient(tile, gradient, transform, result.logsumexp, target_ids, None, ones, None, None)
        return result

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
        with on_device(tile):
            gradients.logprob_gradient_kernel[_grid(tile, _TILE_ROWS, _TILE_COLUMNS)](
                tile,
                gradient,
                logsumexp.contiguous(),
                target_ids.contiguous(),
                _contiguous(logprob_weight),
                _contiguous(logsumexp_weight),
                _contiguous(entropy),
                _contiguous(entropy_weight),
                *tile.shape,
                tile.stride(0),
                gradient.stride(0),
                transform.tanh_scale or 1.0,
                HAS_CAP=transform.tanh_scale is not None,
                HAS_LOGPROB_WEIGHT=logprob_weight is not None,
                HAS_LOGSUMEXP_WEIGHT=logsumexp_weight is not None,
                HAS_ENTROPY_WEIGHT=entropy_weight is not None,
                BLOCK_ROWS=_TILE_ROWS,
                BLOCK_COLUMNS=_TILE_COLUMNS,
            )


class _Walk:
    """What the two designs share: statistics of rows, and the gradient from what is stored.

    The gradient of a chunk lies in one buffer of the operands' dtype; the logits of a block of it in others, or, where
    the dtypes allow it, the student's in the gradient's own place.
    """

    chunk_rows: int
    block_rows: int | None

    def __init__(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, wanted: Wanted
    ) -> None:
        self._student, self._teacher, self._beta, self._wanted = student, teacher, beta, wanted
        self._statistics: torch.Tensor | None = None
        self._partials: torch.Tensor | None = None

    def begin(self, rows: slice) -> None:
        """Logits are made block by block."""

    def gradient_tile(self, count: int) -> torch.Tensor:
        return self._gradient[:count]

    _gradient: torch.Tensor

    def _split_rows(self, workspace_bytes: int, chunk_row_bytes: int, block_row_bytes: int) -> None:
        most_rows(workspace_bytes, chunk_row_bytes + block_row_bytes, self._student.num_columns)
        self.chunk_rows, self.block_rows = split_rows(
            self._student.hidden.shape[0], workspace_bytes, chunk_row_bytes, block_row_bytes
        )

    def _teacher_rows(self, rows: slice) -> tuple[Projection, torch.Tensor]:
        """The teacher's projection of some rows, of which those marked hold h_t - h_s; and the marks, [rows] int8."""
        student, teacher = (
            self._student.of_rows(self._student.hidden[rows]),
            self._teacher.of_rows(self._teacher.hidden[rows]),
        )
        count = student.hidden.shape[0]
        if not student.differs_by_rows(teacher):
            return teacher, torch.zeros(count, dtype=torch.int8, device=student.hidden.device)
        marks = torch.empty(count, dtype=torch.int8, device=student.hidden.device)
        s, t = row_major(student.hidden), row_major(teacher.hidden)
        out = torch.empty(s.shape, dtype=s.dtype, device=s.device)
        if out.numel():
            row_kernels.difference_rows_kernel[(count,)](
                s,
                t,
                out,
                marks,
                s.shape[1],
                s.stride(0),
                t.stride(0),
                out.stride(0),
                _PRODUCT_ROUNDING,
                BLOCK_COLUMNS=min(1024, triton.next_power_of_2(s.shape[1])),
            )
        else:
            marks.zero_()
        return teacher.of_rows(out), marks

    def _combine(self, num_blocks: int, has_targets: bool, want_entropy: bool) -> None:
        assert self._statistics is not None
        rows = self._statistics.shape[1]
        statistics.combine_kernel[(rows,)](
            self._partials,
            self._statistics,
            rows,
            num_blocks,
            HAS_TARGETS=has_targets,
            WANT_ENTROPY=want_entropy,
            REVERSE=self._beta == 1.0,
            BLOCKS=min(1024, triton.next_power_of_2(num_blocks)),
        )

    def _rows(self, has_targets: bool, want_entropy: bool) -> DivergenceRows:
        values = self._statistics
        assert values is not None
        return DivergenceRows(
            values[statistics.DIVERGENCE.value],
            values[statistics.STUDENT_LOGPROB.value] if has_targets else None,
            values[statistics.TEACHER_LOGPROB.value] if has_targets else None,
            values[statistics.STUDENT_ENTROPY.value] if want_entropy else None,
            values[statistics.TEACHER_ENTROPY.value] if want_entropy else None,
        )

    def _write_gradient(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        out: torch.Tensor,
        marks: torch.Tensor,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
        num_blocks: int,
        shifted: bool,
        block: tuple[int, int],
    ) -> None:
        cap, teacher_cap = self._student.transform.tanh_scale, self._teacher.transform.tanh_scale
        with on_device(student):
            gradients.divergence_gradient_kernel[_grid(out, *block)](
                student,
                teacher,
                out,
                marks,
                self._partials,
                self._statistics,
                _contiguous(target_ids),
                _contiguous(weight),
                _contiguous(logprob_weight),
                *out.shape,
                student.stride(0),
                teacher.stride(0),
                out.stride(0),
                num_blocks,
                cap or 1.0,
                teacher_cap or 1.0,
                self._beta,
                FORWARD=self._beta == 0.0,
                REVERSE=self._beta == 1.0,
                SHIFTED=shifted,
                STUDENT_CAP=cap is not None,
                TEACHER_CAP=teacher_cap is not None,
                HAS_WEIGHT=weight is not None,
                HAS_LOGPROB_WEIGHT=logprob_weight is not None,
                BLOCK_ROWS=block[0],
                BLOCK_COLUMNS=block[1],
            )


class FusedWalk(_Walk):
    """One product kernel for both views; what the gradient needs in 16 bits (32 for float32 operands)."""

    def __init__(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, wanted: Wanted
    ) -> None:
        self._shared = student.weight_is(teacher)
        student, teacher = _row_major_pair(student, teacher)
        super().__init__(student, teacher, beta, workspace_bytes, wanted)
        dtype, device, columns = student.hidden.dtype, student.hidden.device, student.num_columns
        size = dtype.itemsize
        self._kind = "pair" if self._shared else "pair-separate"
        # What the copy engine cannot address row by row, it cannot address as a block of rows either.
        operands = (student.hidden, teacher.hidden, student.weight, teacher.weight)
        if torch.float32 in (dtype, teacher.hidden.dtype):
            self._kind += "-float32"
        elif not all(takes_descriptor(operand) for operand in operands):
            self._kind += "-plain"
        narrowest = min(config.columns // config.parts for config in candidates(self._kind, device))
        partials_bytes = 4 * statistics.NUM_PARTIALS * triton.cdiv(columns, narrowest)
        if wanted.any:
            row_bytes = row_stride(columns, ROW_PADDING) * size
            self._split_rows(workspace_bytes, row_bytes, row_bytes + partials_bytes)
            self._gradient = row_buffer(self.chunk_rows, columns, ROW_PADDING, dtype, device)
            block = self.block_rows or self.chunk_rows
            stored = torch.float32 if size == 4 else torch.float16
            self._shifted = row_buffer(block, columns, ROW_PADDING, stored, device)
        else:
            self._split_rows(workspace_bytes, 0, partials_bytes)

    def statistics(
        self, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> DivergenceRows:
        student = self._student.of_rows(self._student.hidden[rows])
        device, num_rows = student.hidden.device, student.hidden.shape[0]
        self._local, self._targets = local, None if target_ids is None else target_ids.contiguous()
        self._statistics = torch.empty(statistics.NUM_STATISTICS, num_rows, dtype=torch.float32, device=device)
        with on_device(student.hidden):
            teacher, self._marks = self._teacher_rows(rows)

            def run(config: ProductConfig) -> None:
                self._launch(config, student, teacher, want_entropy)

            shape = (num_rows, student.num_columns, student.hidden.shape[1])
            run(choose(self._kind, device, shape, run))
            self._combine(self._num_blocks, target_ids is not None, want_entropy)
        return self._rows(target_ids is not None, want_entropy)

    def _launch(self, config: ProductConfig, student: Projection, teacher: Projection, want_entropy: bool) -> None:
        num_rows, num_columns = student.hidden.shape[0], student.num_columns
        device = student.hidden.device
        self._block_columns = config.columns // config.parts
        self._num_blocks = triton.cdiv(num_columns, self._block_columns)
        self._partials = torch.empty(
            statistics.NUM_PARTIALS, num_rows, self._num_blocks, dtype=torch.float32, device=device
        )
        shifted_student = shifted_teacher = None
        if self._wanted.any:
            shifted_student = self._gradient[self._local].view(self._shifted.dtype)
            shifted_teacher = self._shifted[:num_rows]
        hidden, teacher_hidden = student.hidden, teacher.hidden
        weight, teacher_weight = student.weight, teacher.weight
        operands, with_descriptors = _operands(
            config,
            (hidden, config.rows),
            (teacher_hidden, config.rows),
            (weight, config.columns),
            (teacher_weight, config.columns),
        )
        tiles = triton.cdiv(num_rows, config.rows) * triton.cdiv(num_columns, config.columns)
        programs = min(tiles, config.occupancy * num_processors(device))
        cap, teacher_cap = student.transform.tanh_scale, teacher.transform.tanh_scale
        pair.pair_kernel[(programs,)](
            *operands,
            student.bias,
            teacher.bias,
            self._marks,
            self._targets,
            shifted_student,
            shifted_teacher,
            self._partials,
            self._statistics,
            num_rows,
            num_columns,
            hidden.shape[1],
            teacher_hidden.shape[1],
            hidden.stride(0),
            teacher_hidden.stride(0),
            weight.stride(0),
            teacher_weight.stride(0),
            0 if shifted_student is None else shifted_student.stride(0),
            0 if shifted_teacher is None else shifted_teacher.stride(0),
            self._num_blocks,
            programs,
            student.transform.product_scale,
            teacher.transform.product_scale,
            cap or 1.0,
            teacher_cap or 1.0,
            SHARED_WEIGHT=self._shared,
            STUDENT_BIAS=student.bias is not None,
            TEACHER_BIAS=teacher.bias is not None,
            STUDENT_CAP=cap is not None,
            TEACHER_CAP=teacher_cap is not None,
            HAS_TARGETS=self._targets is not None,
            WANT_ENTROPY=want_entropy,
            STORE=self._wanted.any,
            DESCRIPTORS=with_descriptors,
            EVEN_WIDTH=hidden.shape[1] % config.width == 0 and teacher_hidden.shape[1] % config.width == 0,
            PRECISION=product_precision(hidden),
            FLATTEN=config.flatten,
            WARP_SPECIALIZE=config.warp_specialize and with_descriptors,
            BLOCK_ROWS=config.rows,
            BLOCK_COLUMNS=config.columns,
            BLOCK_WIDTH=config.width,
            PARTS=config.parts,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    def gradient(
        self,
        local: slice,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        out = self._gradient[local]
        self._write_gradient(
            out.view(self._shifted.dtype),
            self._shifted[: out.shape[0]],
            out,
            self._marks,
            target_ids,
            weight,
            logprob_weight,
            self._num_blocks,
            shifted=True,
            block=(max(1, 2048 // self._block_columns), self._block_columns),
        )


class ChunkedWalk(_Walk):
    """Library products into float32 tiles of a block of rows; the gradient of a chunk in the operands' dtype."""

    def __init__(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, wanted: Wanted
    ) -> None:
        super().__init__(student, teacher, beta, workspace_bytes, wanted)
        dtype, device, columns = student.hidden.dtype, student.hidden.device, student.num_columns
        # Where it has their dtype, the gradient overwrites the student's logits.
        self._in_place = dtype == torch.float32
        stride = row_stride(columns, ROW_PADDING)
        partials_bytes = 4 * statistics.NUM_PARTIALS * triton.cdiv(columns, _STATISTICS_COLUMNS)
        tiles_held = 1 if wanted.any and self._in_place else 2
        self._split_rows(
            workspace_bytes,
            stride * dtype.itemsize if wanted.any else 0,
            stride * 4 * tiles_held + partials_bytes,
        )
        block = self.block_rows or self.chunk_rows
        self._teacher_logits = row_buffer(block, columns, ROW_PADDING, torch.float32, device)
        if wanted.any:
            self._gradient = row_buffer(self.chunk_rows, columns, ROW_PADDING, dtype, device)
        if not (wanted.any and self._in_place):
            self._student_logits = row_buffer(block, columns, ROW_PADDING, torch.float32, device)

    def statistics(
        self, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> DivergenceRows:
        student = self._student
        count, columns, device = rows.stop - rows.start, student.num_columns, student.hidden.device
        in_place = self._in_place and self._wanted.any
        self._student_tile = self._gradient[local] if in_place else self._student_logits[:count]
        self._teacher_tile = self._teacher_logits[:count]
        cap, teacher_cap = student.transform.tanh_scale, self._teacher.transform.tanh_scale
        with on_device(student.hidden):
            teacher, self._marks = self._teacher_rows(rows)
            student.logits(rows, self._student_tile)
            teacher.logits(slice(0, count), self._teacher_tile)
            if teacher.bias is not None and student.differs_by_rows(teacher):
                # The products added the bias to differences too.
                bias = teacher.bias.float().mul(teacher.transform.product_scale)
                self._teacher_tile.addcmul_(self._marks.float().unsqueeze(-1), bias, value=-1.0)
            num_blocks = triton.cdiv(columns, _STATISTICS_COLUMNS)
            self._statistics = torch.empty(statistics.NUM_STATISTICS, count, dtype=torch.float32, device=device)
            self._partials = torch.empty(statistics.NUM_PARTIALS, count, num_blocks, dtype=torch.float32, device=device)
            statistics.block_statistics_kernel[_grid(self._student_tile, _TILE_ROWS, _STATISTICS_COLUMNS)](
                self._student_tile,
                self._teacher_tile,
                self._marks,
                _contiguous(target_ids),
                self._partials,
                self._statistics,
                count,
                columns,
                self._student_tile.stride(0),
                self._teacher_tile.stride(0),
                num_blocks,
                cap or 1.0,
                teacher_cap or 1.0,
                STUDENT_CAP=cap is not None,
                TEACHER_CAP=teacher_cap is not None,
                HAS_TARGETS=target_ids is not None,
                WANT_ENTROPY=want_entropy,
                BLOCK_ROWS=_TILE_ROWS,
                BLOCK_COLUMNS=_STATISTICS_COLUMNS,
                num_warps=8,
            )
            self._num_blocks = num_blocks
            self._combine(num_blocks, target_ids is not None, want_entropy)
            if 0.0 < self._beta < 1.0:
                statistics.mixture_kernel[(count,)](
                    self._student_tile,
                    self._teacher_tile,
                    self._marks,
                    self._statistics,
                    count,
                    columns,
                    self._student_tile.stride(0),
                    self._teacher_tile.stride(0),
                    cap or 1.0,
                    teacher_cap or 1.0,
                    self._beta,
                    STUDENT_CAP=cap is not None,
                    TEACHER_CAP=teacher_cap is not None,
                    BLOCK_COLUMNS=min(_LONG_COLUMNS, triton.next_power_of_2(columns)),
                    num_warps=8,
                )
        return self._rows(target_ids is not None, want_entropy)

    def gradient(
        self,
        local: slice,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        self._write_gradient(
            self._student_tile,
            self._teacher_tile,
            self._gradient[local],
            self._marks,
            target_ids,
            weight,
            logprob_weight,
            self._num_blocks,
            shifted=False,
            block=(_TILE_ROWS, _TILE_COLUMNS),
        )


def _row_major_pair(student: Projection, teacher: Projection) -> tuple[Projection, Projection]:
    """Both with contiguous rows, and still sharing what they share."""
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}

    def once(matrix: torch.Tensor) -> torch.Tensor:
        key = (matrix.data_ptr(), matrix.shape, matrix.stride())
        if key not in copies:
            copies[key] = row_major(matrix) if matrix.dim() == 2 else matrix.contiguous()
        return copies[key]

    def of(projection: Projection) -> Projection:
        bias = None if projection.bias is None else once(projection.bias)
        return Projection(once(projection.hidden), once(projection.weight), bias, projection.transform)

    return of(student), of(teacher)


def _operands(config: ProductConfig, *matrices: tuple[torch.Tensor, int]) -> tuple[list[Any], bool]:
    """Descriptors of all matrices, or the matrices where one of them cannot have one."""
    if config.descriptors and all(takes_descriptor(matrix) for matrix, _ in matrices):
        return [descriptor(matrix, (rows, config.width)) for matrix, rows in matrices], True
    return [matrix for matrix, _ in matrices], False


def _grid(tile: torch.Tensor, rows: int, columns: int) -> tuple[int, int]:
    return (triton.cdiv(tile.shape[1], columns), triton.cdiv(tile.shape[0], rows))


def _contiguous(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.contiguous()
