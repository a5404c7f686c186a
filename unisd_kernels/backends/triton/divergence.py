"""The two designs of a divergence in the Triton backend (`backend.py` says when which, `docs/gpu.md` why)."""

from __future__ import annotations

import torch
import triton

from unisd_kernels.backends.base import DivergenceRows, NeedsGrad
from unisd_kernels.backends.buffers import contiguous, most_rows, row_buffer, row_major, row_stride, split_rows
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton import fused_divergence, gradients, statistics
from unisd_kernels.backends.triton import rows as row_kernels
from unisd_kernels.backends.triton.configs import GemmConfig, autotuning, candidates, choose, with_loads
from unisd_kernels.backends.triton.launch import (
    LONG_COLUMNS,
    ROW_PADDING,
    TILE_COLUMNS,
    TILE_ROWS,
    matrices_or_descriptors,
    num_sms,
    on_device,
    product_precision,
    tile_grid,
)

# A block of statistics that are taken from logits in memory.
_STATISTICS_ROWS, _STATISTICS_COLUMNS = 2, 1024
# The kernels index partial statistics with 32 bits: this many rows times NUM_PARTIALS times 8192 blocks of columns.
_MOST_BLOCK_ROWS = 16384
# A float32 sum of products of 16-bit numbers is off by about this fraction of the rows' norms.
_PRODUCT_ROUNDING = 2.0**-20


class _Walk:
    """What the two designs share: statistics of rows, and the gradient from what is stored.

    The gradient of a chunk lies in one buffer of the operands' dtype; the logits of a block of it in others, or, where
    the dtypes allow it, the student's in the gradient's own place.
    """

    chunk_rows: int
    block_rows: int | None

    def __init__(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, needs_grad: NeedsGrad
    ) -> None:
        self._student, self._teacher, self._beta, self._needs_grad = student, teacher, beta, needs_grad
        self._statistics: torch.Tensor | None = None
        self._partials: torch.Tensor | None = None

    def logits(self, rows: slice) -> None:
        """Logits are made block by block."""

    def forward(
        self, chunk: None, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> tuple[DivergenceRows, slice]:
        return self.statistics(rows, local, target_ids, want_entropy), local

    def backward(
        self,
        saved: slice,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        self.write_gradient(saved, target_ids, weight, logprob_weight)

    def statistics(
        self, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> DivergenceRows:
        raise NotImplementedError

    def write_gradient(
        self,
        local: slice,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        raise NotImplementedError

    def gradient(self, count: int) -> torch.Tensor:
        return self._gradient[:count]

    _gradient: torch.Tensor
    _marks: torch.Tensor
    _num_blocks: int

    def _split_rows(self, workspace_bytes: int, chunk_row_bytes: int, block_row_bytes: int) -> None:
        most_rows(workspace_bytes, chunk_row_bytes + block_row_bytes, self._student.num_columns)
        self.chunk_rows, block_rows = split_rows(
            self._student.hidden.shape[0], workspace_bytes, chunk_row_bytes, block_row_bytes
        )
        self.block_rows = min(block_rows, _MOST_BLOCK_ROWS)

    def _teacher_rows(self, rows: slice) -> tuple[Projection, torch.Tensor]:
        """The teacher's projection of some rows, of which those marked hold h_t - h_s; and the marks, [rows] int8."""
        student, teacher = (
            self._student.of_rows(self._student.hidden[rows]),
            self._teacher.of_rows(self._teacher.hidden[rows]),
        )
        count = student.hidden.shape[0]
        if not student.delta_is_projection(teacher):
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

    def _combine(
        self, student: Projection, teacher: Projection, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> None:
        """Statistics of rows from those of their blocks; `teacher` as `_teacher_rows` gives it."""
        assert self._statistics is not None
        rows = self._statistics.shape[1]
        marked = student.delta_is_projection(teacher)
        if target_ids is not None:
            ids, marks = target_ids.contiguous(), self._marks if marked else None
            target_logits(student, None, ids, self._statistics[statistics.STUDENT_LOGPROB.value])
            target_logits(teacher, marks, ids, self._statistics[statistics.TEACHER_LOGPROB.value])
        statistics.combine_kernel[(rows,)](
            self._partials,
            self._marks,
            self._statistics,
            rows,
            self._num_blocks,
            MARKED=marked,
            HAS_TARGETS=target_ids is not None,
            WANT_ENTROPY=want_entropy,
            REVERSE=self._beta == 1.0,
            BLOCKS=min(1024, triton.next_power_of_2(self._num_blocks)),
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
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
        shifted: bool,
        block: tuple[int, int],
    ) -> None:
        cap, teacher_cap = self._student.transform.tanh_scale, self._teacher.transform.tanh_scale
        with on_device(student):
            gradients.divergence_gradient_kernel[tile_grid(out, *block)](
                student,
                teacher,
                out,
                self._marks,
                self._partials,
                self._statistics,
                contiguous(target_ids),
                contiguous(weight),
                contiguous(logprob_weight),
                *out.shape,
                student.stride(0),
                teacher.stride(0),
                out.stride(0),
                self._num_blocks,
                cap or 1.0,
                teacher_cap or 1.0,
                self._beta,
                1.0 - self._beta,
                FORWARD=self._beta == 0.0,
                REVERSE=self._beta == 1.0,
                SHIFTED=shifted,
                STUDENT_SOFTCAP=cap is not None,
                TEACHER_SOFTCAP=teacher_cap is not None,
                HAS_WEIGHT=weight is not None,
                HAS_LOGPROB_WEIGHT=logprob_weight is not None,
                BLOCK_ROWS=block[0],
                BLOCK_COLUMNS=block[1],
            )


class FusedDivergence(_Walk):
    """One product kernel for both views; what the gradient needs in 16 bits (32 for float32 operands)."""

    def __init__(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, needs_grad: NeedsGrad
    ) -> None:
        self._shared = student.weight_is(teacher)
        student, teacher = _row_major_pair(student, teacher)
        super().__init__(student, teacher, beta, workspace_bytes, needs_grad)
        dtype, device, columns = student.hidden.dtype, student.hidden.device, student.num_columns
        size = dtype.itemsize
        heavy = any(p.bias is not None or p.transform.softcap is not None for p in (student, teacher))
        self._kind = "pair" if self._shared else "pair-separate"
        if torch.float32 in (dtype, teacher.hidden.dtype):
            self._kind += "-float32"
        else:
            # Rows that start off alignment are not aligned as blocks of rows either, nor the other way round.
            of_operands = with_loads(self._kind, student.hidden, teacher.hidden, student.weight, teacher.weight)
            self._kind = "pair-heavy" if of_operands == "pair" and heavy else of_operands
        options = candidates(self._kind, device) if autotuning() else candidates(self._kind, device)[:1]
        narrowest = min(config.columns // config.parts for config in options)
        partials_bytes = 4 * statistics.NUM_PARTIALS * triton.cdiv(columns, narrowest)
        if needs_grad.any:
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
        self._local = local
        self._statistics = torch.empty(statistics.NUM_STATISTICS, num_rows, dtype=torch.float32, device=device)
        with on_device(student.hidden):
            teacher, self._marks = self._teacher_rows(rows)

            def run(config: GemmConfig) -> None:
                self._launch(config, student, teacher, want_entropy)

            shape = (num_rows, student.num_columns, student.hidden.shape[1])
            run(choose(self._kind, device, shape, run))
            self._combine(student, teacher, target_ids, want_entropy)
        return self._rows(target_ids is not None, want_entropy)

    def _launch(self, config: GemmConfig, student: Projection, teacher: Projection, want_entropy: bool) -> None:
        num_rows, num_columns = student.hidden.shape[0], student.num_columns
        device = student.hidden.device
        self._block_columns = config.columns // config.parts
        self._num_blocks = triton.cdiv(num_columns, self._block_columns)
        self._partials = _partial_statistics(num_rows, self._num_blocks, want_entropy, device)
        shifted_student = shifted_teacher = None
        if self._needs_grad.any:
            shifted_student = self._gradient[self._local].view(self._shifted.dtype)
            shifted_teacher = self._shifted[:num_rows]
        hidden, teacher_hidden = student.hidden, teacher.hidden
        weight, teacher_weight = student.weight, teacher.weight
        operands, with_descriptors = matrices_or_descriptors(
            config.descriptors,
            config.width,
            (hidden, config.rows),
            (teacher_hidden, config.rows),
            (weight, config.columns),
            (teacher_weight, config.columns),
        )
        tiles = triton.cdiv(num_rows, config.rows) * triton.cdiv(num_columns, config.columns)
        programs = min(tiles, config.occupancy * num_sms(device))
        cap, teacher_cap = student.transform.tanh_scale, teacher.transform.tanh_scale
        fused_divergence.fused_divergence_kernel[(programs,)](
            *operands,
            student.bias,
            teacher.bias,
            self._marks,
            shifted_student,
            shifted_teacher,
            self._partials,
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
            MARKED=student.delta_is_projection(teacher),
            STUDENT_BIAS=student.bias is not None,
            TEACHER_BIAS=teacher.bias is not None,
            STUDENT_SOFTCAP=cap is not None,
            TEACHER_SOFTCAP=teacher_cap is not None,
            WANT_ENTROPY=want_entropy,
            STORE=self._needs_grad.any,
            FORWARD=self._beta == 0.0,
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

    def write_gradient(
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
            target_ids,
            weight,
            logprob_weight,
            shifted=True,
            block=(max(1, 2048 // self._block_columns), self._block_columns),
        )


class ChunkedDivergence(_Walk):
    """Library products into float32 tiles of a block of rows; the gradient of a chunk in the operands' dtype."""

    def __init__(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, needs_grad: NeedsGrad
    ) -> None:
        super().__init__(student, teacher, beta, workspace_bytes, needs_grad)
        dtype, device, columns = student.hidden.dtype, student.hidden.device, student.num_columns
        # Where it has their dtype, the gradient overwrites the student's logits.
        self._in_place = dtype == torch.float32
        stride = row_stride(columns, ROW_PADDING)
        partials_bytes = 4 * statistics.NUM_PARTIALS * triton.cdiv(columns, _STATISTICS_COLUMNS)
        tiles_held = 1 if needs_grad.any and self._in_place else 2
        self._split_rows(
            workspace_bytes,
            stride * dtype.itemsize if needs_grad.any else 0,
            stride * 4 * tiles_held + partials_bytes,
        )
        block = self.block_rows or self.chunk_rows
        self._teacher_logits = row_buffer(block, columns, ROW_PADDING, torch.float32, device)
        if needs_grad.any:
            self._gradient = row_buffer(self.chunk_rows, columns, ROW_PADDING, dtype, device)
        if not (needs_grad.any and self._in_place):
            self._student_logits = row_buffer(block, columns, ROW_PADDING, torch.float32, device)

    def statistics(
        self, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> DivergenceRows:
        student = self._student
        count, columns, device = rows.stop - rows.start, student.num_columns, student.hidden.device
        in_place = self._in_place and self._needs_grad.any
        self._student_tile = self._gradient[local] if in_place else self._student_logits[:count]
        self._teacher_tile = self._teacher_logits[:count]
        cap, teacher_cap = student.transform.tanh_scale, self._teacher.transform.tanh_scale
        with on_device(student.hidden):
            teacher, self._marks = self._teacher_rows(rows)
            student.logits(rows, self._student_tile)
            teacher.logits(slice(0, count), self._teacher_tile)
            if teacher.bias is not None and student.delta_is_projection(teacher):
                # The products added the bias to differences too.
                bias = teacher.bias.float().mul(teacher.transform.product_scale)
                self._teacher_tile.addcmul_(self._marks.float().unsqueeze(-1), bias, value=-1.0)
            num_blocks = self._num_blocks = triton.cdiv(columns, _STATISTICS_COLUMNS)
            self._statistics = torch.empty(statistics.NUM_STATISTICS, count, dtype=torch.float32, device=device)
            self._partials = _partial_statistics(count, num_blocks, want_entropy, device)
            statistics.block_statistics_kernel[tile_grid(self._student_tile, _STATISTICS_ROWS, _STATISTICS_COLUMNS)](
                self._student_tile,
                self._teacher_tile,
                self._marks,
                self._partials,
                count,
                columns,
                self._student_tile.stride(0),
                self._teacher_tile.stride(0),
                num_blocks,
                cap or 1.0,
                teacher_cap or 1.0,
                STUDENT_SOFTCAP=cap is not None,
                TEACHER_SOFTCAP=teacher_cap is not None,
                WANT_ENTROPY=want_entropy,
                BLOCK_ROWS=_STATISTICS_ROWS,
                BLOCK_COLUMNS=_STATISTICS_COLUMNS,
                num_warps=8,
            )
            self._combine(student.of_rows(student.hidden[rows]), teacher, target_ids, want_entropy)
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
                    1.0 - self._beta,
                    STUDENT_SOFTCAP=cap is not None,
                    TEACHER_SOFTCAP=teacher_cap is not None,
                    BLOCK_COLUMNS=min(LONG_COLUMNS, triton.next_power_of_2(columns)),
                    num_warps=8,
                )
        return self._rows(target_ids is not None, want_entropy)

    def write_gradient(
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
            target_ids,
            weight,
            logprob_weight,
            shifted=False,
            block=(TILE_ROWS, TILE_COLUMNS),
        )


def _partial_statistics(rows: int, blocks: int, want_entropy: bool, device: torch.device) -> torch.Tensor:
    numbers = statistics.NUM_PARTIALS if want_entropy else statistics.RECORD.value
    return torch.empty(rows * blocks * numbers, dtype=torch.float32, device=device)


def target_logits(
    projection: Projection, marks: torch.Tensor | None, target_ids: torch.Tensor, out: torch.Tensor
) -> None:
    """The logit of one token a row into `out` [rows] float32; without the bias where `marks` says so."""
    hidden, weight = row_major(projection.hidden), row_major(projection.weight)
    tanh_scale = projection.transform.tanh_scale
    row_kernels.target_logits_kernel[(hidden.shape[0],)](
        hidden,
        weight,
        contiguous(projection.bias),
        marks,
        target_ids,
        out,
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        projection.transform.product_scale,
        tanh_scale or 1.0,
        MARKED=marks is not None,
        HAS_BIAS=projection.bias is not None,
        HAS_SOFTCAP=tanh_scale is not None,
        BLOCK_WIDTH=min(1024, triton.next_power_of_2(hidden.shape[1])),
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
