"""Compile the kernels for GPUs that are not here: `python -m bench ahead-of-time`.

Prints, for each architecture and variant, what the compiler reports: shared memory, registers, bytes spilled, and which
matrix and copy instructions are in the code. Needs no GPU; must not run under the interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import triton
from triton.compiler import ASTSource

from bench.parser import command_parser
from bench.roofline.targets import ARCHITECTURES, MATRIX_INSTRUCTIONS, is_amd, read, table_of, target
from unisd.cli.errors import CommandError
from unisd_kernels.backends.triton import (
    chunked_divergence,
    fused_divergence,
    gradients,
    mixture,
    rows,
    score,
    statistics,
)
from unisd_kernels.backends.triton.configs import TABLE, GemmConfig
from unisd_kernels.backends.triton.gemm import Side
from unisd_kernels.backends.triton.launch import LogitTile
from unisd_kernels.backends.triton.variants import OPTIONS


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that is fixed at compile time.

    Attributes:
        arguments: by name, a type or a constant; of a NamedTuple one of these for each field.
        odd: endings of the names of arguments, and fields, that are no multiples of 16.
        options: of the launch.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 3
    config: GemmConfig | None = None
    odd: tuple[str, ...] = ()
    options: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Resources of one compiled variant. Bytes; counts are of instructions in the code, not executed ones."""

    architecture: str
    variant: str
    tile: str
    shared: int
    registers: int
    spilled: int
    instructions: int
    matrix_instructions: int
    bulk_copies: int
    programs_per_processor: int
    advisories: tuple[str, ...]


def compile_variant(variant: Variant, architecture: str) -> Report:
    """Raises what Triton, or an assembler, raises."""
    constants: dict[tuple[int, ...], Any] = {}
    # As at run time: addresses, sizes and strides that are multiples of 16 let accesses be whole vectors.
    aligned = {}

    def described(name: str, value: Any, path: tuple[int, ...]) -> Any:
        """The type of an argument, or of a tuple's fields, as Triton's signatures have it."""
        if isinstance(value, tuple):
            return type(value)(*(described(field, value[i], (*path, i)) for i, field in enumerate(value._fields)))  # type: ignore[attr-defined]
        if name.isupper() or not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        if _is_aligned(name, value) and not (variant.odd and name.endswith(variant.odd)):
            aligned[path] = [["tt.divisibility", 16]]
        return value

    signature = {
        name: described(name, variant.arguments[name], (i,)) for i, name in enumerate(variant.kernel.arg_names)
    }
    compiled = triton.compile(
        ASTSource(variant.kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=target(architecture),
        options={"num_warps": variant.warps, "num_stages": variant.stages, **variant.options, **OPTIONS},
    )
    code, config = read(compiled, architecture), variant.config
    return Report(
        architecture,
        variant.name,
        ""
        if config is None
        else f"{config.rows}x{config.columns}x{config.width}, {config.warps} warps, {config.stages} stages",
        compiled.metadata.shared,
        code.registers,
        code.spilled,
        code.instructions,
        code.matrix_instructions,
        code.bulk_copies,
        code.programs,
        code.advisories,
    )


def _is_aligned(name: str, kind: str) -> bool:
    return kind.startswith("*") or name.endswith(("_stride", "width")) or name in ("stride", "num_columns")


def variants(architecture: str, everything: bool = False) -> Iterator[Variant]:
    """The kernels as an architecture runs them; `everything`: also the candidates that only a measurement picks."""
    table = TABLE[table_of(architecture)]

    def configs(kind: str) -> tuple[GemmConfig, ...]:
        return table[kind] if everything else table[kind][:1]

    for config in configs("score"):
        yield _score("score", config)
    for config in configs("score-heavy"):
        yield _score("score, entropy and soft cap", config, entropy=True, softcap=True, bias=True)
    for config in configs("score-few"):
        yield _score("score, few rows", config)
        yield _score("score, few rows, entropy and soft cap", config, entropy=True, softcap=True)
    biased: dict[str, Any] = {"entropy": True, "bias": True}
    # A soft cap leaves no difference of rows that gives one of logits.
    capped = {**biased, "softcap": True, "delta": False}
    for config in configs("fused-divergence"):
        yield _fused("fused divergence", config)
        yield _fused("fused divergence, entropy", config, entropy=True)
        yield _fused("fused divergence, entropy, statistics only", config, entropy=True, store=False)
    for config in configs("fused-divergence-heavy"):
        yield _fused("fused divergence, entropy and bias", config, **biased)
        yield _fused("fused divergence, entropy, bias and soft cap", config, **capped)
    separate: dict[str, Any] = {"SHARED_WEIGHT": False, "delta": False}
    for config in configs("fused-divergence-separate"):
        yield _fused("fused divergence, two heads, entropy", config, entropy=True, **separate)
        yield _fused("fused divergence, two heads, entropy, bias and soft cap", config, **{**capped, **separate})
    # Rows that start off alignment, and a width that does not end with a step.
    odd = ("stride", "width", "num_columns", "hidden", "weight")
    uneven: dict[str, Any] = {"EVEN_WIDTH": False, "even": False, "odd": odd}
    plain = table["score-plain"][0]
    yield _score("score, plain loads", plain, **uneven)
    yield _score("score, plain loads, entropy and soft cap", plain, **uneven, entropy=True, softcap=True)
    plain = table["fused-divergence-plain"][0]
    yield _fused("fused divergence, plain loads, entropy and bias", plain, **biased, **uneven)
    yield _fused("fused divergence, plain loads, entropy, bias and soft cap", plain, **capped, **uneven)
    plain = table["fused-divergence-separate-plain"][0]
    yield _fused("fused divergence, two heads, plain loads, entropy", plain, entropy=True, **separate, **uneven)
    # Aligned rows of a width that does not end with a step, an odd vocabulary.
    some: dict[str, Any] = {"EVEN_WIDTH": False, "entropy": True, "even": False, "odd": ("num_columns",)}
    yield _score("score, odd vocabulary, uneven width, entropy", table["score-heavy"][0], **some)
    config = table["fused-divergence"][0]
    yield _fused("fused divergence, odd vocabulary, uneven width, entropy", config, **some)
    # Triton makes constants of arguments that are 1 (but of math.COUNTS): rows of one number.
    one: dict[str, Any] = {"entropy": True, "width": 1, **uneven}
    yield _score("score, plain loads, width 1", table["score-plain"][0], **one)
    yield _fused("fused divergence, plain loads, width 1", table["fused-divergence-plain"][0], **one)
    for precision in ("ieee",) if is_amd(architecture) else ("tf32", "ieee"):
        options: dict[str, Any] = {"element": "fp32", "PRECISION": precision}
        config = table["score-float32"][0]
        yield _score(f"score, float32, {precision}", config, **options)
        odd_score: dict[str, Any] = {**uneven, "entropy": True, "softcap": True}
        yield _score(f"score, float32, {precision}, plain loads", config, **options, **odd_score)
        config = table["fused-divergence-float32"][0]
        yield _fused(f"fused divergence, float32, {precision}", config, **options)
        yield _fused(f"fused divergence, float32, {precision}, plain loads", config, **options, **capped, **uneven)
        both: dict[str, Any] = {**separate, **options, **uneven}
        config = table["fused-divergence-separate-float32"][0]
        yield _fused(f"fused divergence, two heads, float32, {precision}, plain loads", config, **both)
    yield from _elementwise(table["fused-divergence"][0])


def _arguments(kernel: Any, **known: Any) -> dict[str, Any]:
    """Arguments by their names: those that are known, and the usual types of the others."""
    arguments = {}
    for name in kernel.arg_names:
        if name in known:
            arguments[name] = known.pop(name)
        elif name in ("beta", "complement", "rounding"):
            arguments[name] = "fp32"
        elif name == "target_ids":
            arguments[name] = "*i64"
        elif name == "row_is_delta":
            arguments[name] = "*i8"
        elif name.startswith("num_") or name.endswith(("_stride", "_split")):
            arguments[name] = "i32"
        else:
            arguments[name] = "*fp32"
    assert not known, known
    return arguments


def _product(config: GemmConfig, **constants: Any) -> dict[str, Any]:
    """The constants of a product kernel, as `launch.gemm_operands` has them."""
    fixed = {
        "DESCRIPTORS": config.descriptors,
        "EVEN_WIDTH": True,
        "PRECISION": "ieee",
        "WARP_SPECIALIZE": config.warp_specialize,
        "BLOCK_ROWS": config.rows,
        "BLOCK_COLUMNS": config.columns,
        "BLOCK_WIDTH": config.width,
    }
    return {**fixed, **constants}


def _operand(element: str, rows_of_tile: int, config: GemmConfig) -> str:
    return f"tensordesc<{element}[{rows_of_tile},{config.width}]>" if config.descriptors else f"*{element}"


def _side(element: str, bias: bool, softcap: bool, width: Any) -> Any:
    """Types of a `gemm.Side`, whose width and strides may be a constant."""
    types: list[Any] = [f"*{element}" if bias else None, width, width, width, "fp32", "fp32" if softcap else None]
    return Side(*types)


def _tile(logits: str, softcap: bool = True) -> Any:
    """Types of a `launch.LogitTile`."""
    types: list[Any] = [logits, "i32", "fp32" if softcap else None]
    return LogitTile(*types)


def _score(
    name: str,
    config: GemmConfig,
    element: str = "bf16",
    odd: tuple[str, ...] = (),
    entropy: bool = False,
    bias: bool = False,
    softcap: bool = False,
    even: bool = True,
    width: Any = "i32",
    **constants: Any,
) -> Variant:
    arguments = _arguments(
        score.score_kernel,
        hidden=_operand(element, config.rows, config),
        weight=_operand(element, config.columns, config),
        side=_side(element, bias, softcap, width),
        block_entropy="*fp32" if entropy else None,
        EVEN_COLUMNS=even,
        **_product(config, **constants),
    )
    return Variant(name, score.score_kernel, arguments, config.warps, config.stages, config, odd)


def _fused(
    name: str,
    config: GemmConfig,
    element: str = "bf16",
    odd: tuple[str, ...] = (),
    entropy: bool = False,
    bias: bool = False,
    softcap: bool = False,
    delta: bool = True,
    store: bool = True,
    even: bool = True,
    width: Any = "i32",
    **constants: Any,
) -> Variant:
    side = _side(element, bias, softcap, width)
    stored = _tile("*fp32" if element == "fp32" else "*fp16", softcap) if store else None
    kernel = fused_divergence.fused_divergence_kernel
    arguments = _arguments(
        kernel,
        student_hidden=_operand(element, config.rows, config),
        teacher_hidden=_operand(element, config.rows, config),
        student_weight=_operand(element, config.columns, config),
        teacher_weight=_operand(element, config.columns, config),
        student=side,
        teacher=side,
        row_is_delta="*i8" if delta else None,
        student_out=stored,
        teacher_out=stored,
        **{
            "SHARED_WEIGHT": True,
            "WANT_ENTROPY": entropy,
            "STORE": store,
            "KEEP_FAR": True,
            "EVEN_COLUMNS": even,
            "FLATTEN": config.flatten,
            "PARTS": config.parts,
            **_product(config, **constants),
        },
    )
    return Variant(name, kernel, arguments, config.warps, config.stages, config, odd)


def _elementwise(config: GemmConfig) -> Iterator[Variant]:
    columns = config.columns // config.parts
    logits, shifted = _tile("*fp32"), _tile("*fp16")
    pair = {"student": logits, "teacher": logits}
    block = {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 512}
    kernel = gradients.divergence_gradient_kernel
    stored = {"student": shifted, "teacher": shifted}
    of_stored = {"SHIFTED": True, "BLOCK_ROWS": 2048 // columns, "BLOCK_COLUMNS": columns}
    for name, forward in (("gradient from shifted logits", True), ("gradient of a JSD from shifted logits", False)):
        arguments = _arguments(kernel, **stored, gradient="*bf16", FORWARD=forward, REVERSE=False, **of_stored)
        yield Variant(name, kernel, arguments)
    arguments = _arguments(kernel, **pair, gradient="*bf16", FORWARD=False, REVERSE=False, SHIFTED=False, **block)
    yield Variant("gradient from float32 logits", kernel, arguments)
    kernel = chunked_divergence.block_statistics_kernel
    arguments = _arguments(
        kernel,
        **pair,
        WANT_ENTROPY=True,
        BLOCK_ROWS=chunked_divergence.STATISTICS_ROWS,
        BLOCK_COLUMNS=chunked_divergence.STATISTICS_COLUMNS,
    )
    yield Variant("statistics of float32 logits", kernel, arguments, warps=chunked_divergence.STATISTICS_WARPS)
    kernel = statistics.combine_kernel
    arguments = _arguments(kernel, HAS_TARGETS=True, WANT_ENTROPY=True, REVERSE=False, BLOCKS=1024)
    yield Variant("statistics of rows", kernel, arguments)
    kernel = mixture.mixture_kernel
    for name, tiles, is_stored in (("mixture", pair, False), ("mixture of shifted logits", stored, True)):
        width, blocks, split_blocks = mixture.steps(columns if is_stored else None)
        spans = {"SPLIT_BLOCKS": split_blocks, "BLOCKS": blocks, "BLOCK_COLUMNS": width}
        yield Variant(name, kernel, _arguments(kernel, **tiles, SHIFTED=is_stored, **spans))
    kernel = mixture.mixture_rows_kernel
    arguments = _arguments(kernel, BLOCK_ROWS=mixture.ROWS_OF_SUMS)
    yield Variant("mixture of rows", kernel, arguments, warps=1)
    kernel = gradients.softmax_statistics_kernel
    yield Variant("softmax", kernel, _arguments(kernel, tile=logits, BLOCK_COLUMNS=2048), warps=8)
    kernel = gradients.score_gradient_kernel
    yield Variant("gradient of scores", kernel, _arguments(kernel, tile=logits, gradient="*bf16", **block))
    kernel = rows.scale_rows_kernel
    yield Variant("scaled rows", kernel, _arguments(kernel, out="*bf16", BLOCK_COLUMNS=1024))
    kernel = rows.target_logits_kernel
    side = _side("bf16", bias=True, softcap=True, width="i32")
    arguments = _arguments(kernel, hidden="*bf16", weight="*bf16", side=side, BLOCK_WIDTH=1024)
    yield Variant("target logits", kernel, arguments)
    kernel = score.finish_scores_kernel
    arguments = _arguments(kernel, hidden="*bf16", weight="*bf16", side=side, BLOCKS=512, BLOCK_WIDTH=1024)
    yield Variant("merged scores", kernel, arguments, options=score.ASSERTING)
    kernel = rows.difference_rows_kernel
    arguments = _arguments(kernel, student="*bf16", teacher="*bf16", out="*bf16", BLOCK_COLUMNS=1024)
    yield Variant("differences of rows", kernel, arguments)


def table(reports: list[Report]) -> str:
    lines = [
        "| architecture | kernel | tile | shared KB | registers | spilled bytes | instructions | matrix instructions "
        "| bulk copies | programs a processor | advisories |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        instructions = f"{report.matrix_instructions} {MATRIX_INSTRUCTIONS[report.architecture]}"
        lines.append(
            f"| {report.architecture} | {report.variant} | {report.tile} | {report.shared / 1024:.0f} "
            f"| {report.registers} | {report.spilled} | {report.instructions} "
            f"| {instructions if report.matrix_instructions else ''} "
            f"| {report.bulk_copies or ''} | {report.programs_per_processor} "
            f"| {' '.join(report.advisories)} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("ahead-of-time", __doc__)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--everything", action="store_true", help="also the candidates that only a measurement picks")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these, by their names in the table")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        raise CommandError("TRITON_INTERPRET is set: kernels cannot be compiled under the interpreter; unset it")
    reports = [
        compile_variant(variant, architecture)
        for architecture in options.architectures
        for variant in variants(architecture, options.everything)
        if options.variants is None or variant.name in options.variants
    ]
    print(json.dumps([asdict(report) for report in reports]) if options.json else table(reports))
    return 0
