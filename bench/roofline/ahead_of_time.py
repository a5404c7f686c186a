"""Compile the kernels for GPUs that are not here: `python -m bench ahead-of-time`.

Prints, for each architecture and variant, what the compiler reports: shared memory, registers, bytes spilled, and which
matrix and copy instructions are in the code. Needs no GPU; must not run under the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.parser import command_parser
from bench.roofline.assembler import TOOLS, assemble
from unisd.cli.errors import CommandError
from unisd_kernels.backends.triton import fused_divergence, gradients, rows, score, statistics
from unisd_kernels.backends.triton.configs import TABLE, GemmConfig

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# What a product kernel must contain to run on the tensor cores at full rate.
MATRIX_INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
# Bytes of shared memory a program may have.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
_REGISTERS_PER_PROCESSOR = 65536


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that is fixed at compile time."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    config: GemmConfig | None = None
    # Endings of arguments that are no multiples of 16.
    odd: tuple[str, ...] = ()


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
    """Raises what Triton or ptxas raises."""
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    # As at run time: addresses, sizes and strides that are multiples of 16 let accesses be whole vectors.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if _is_aligned(name, signature[name]) and not (variant.odd and name.endswith(variant.odd))
    }
    capability = int(architecture.removeprefix("sm_"))
    compiled = triton.compile(
        ASTSource(variant.kernel, signature=signature, constexprs=variant.constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
    code = compiled.asm["ptx"]
    used = assemble(code, capability)
    # Warp specialization adds warps of its own.
    threads = 32 * compiled.metadata.num_warps
    shared = compiled.metadata.shared
    fits = min(_REGISTERS_PER_PROCESSOR // (used.registers * threads), SHARED_MEMORY[architecture] // max(shared, 1))
    config = variant.config
    return Report(
        architecture,
        variant.name,
        ""
        if config is None
        else f"{config.rows}x{config.columns}x{config.width}, {config.warps} warps, {config.stages} stages",
        shared,
        used.registers,
        used.spilled,
        _instructions(compiled.asm["cubin"]),
        code.count(MATRIX_INSTRUCTIONS[architecture]),
        code.count("cp.async.bulk.tensor"),
        fits,
        used.advisories,
    )


def _is_aligned(name: str, kind: str) -> bool:
    return kind.startswith("*") or name.endswith(("_stride", "width")) or name in ("stride", "num_columns")


def _instructions(binary: bytes) -> int:
    """Machine instructions of the kernel, those of a loop counted once."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", listing, re.MULTILINE))


def variants(architecture: str, everything: bool = False) -> Iterator[Variant]:
    """The kernels as an architecture runs them; `everything`: also the candidates that only a measurement picks."""
    table = TABLE[architecture]

    def configs(kind: str) -> tuple[GemmConfig, ...]:
        return table[kind] if everything else table[kind][:1]

    for config in configs("score"):
        yield _score("score", config)
    for config in configs("score-heavy"):
        yield _score("score, entropy and soft cap", config, WANT_ENTROPY=True, HAS_SOFTCAP=True, HAS_BIAS=True)
    for config in configs("score-few"):
        yield _score("score, few rows", config)
        yield _score("score, few rows, entropy and soft cap", config, WANT_ENTROPY=True, HAS_SOFTCAP=True)
    biased: dict[str, Any] = {"WANT_ENTROPY": True, "STUDENT_BIAS": True, "TEACHER_BIAS": True}
    # A soft cap leaves no difference of rows that gives one of logits.
    capped = {**biased, "STUDENT_SOFTCAP": True, "TEACHER_SOFTCAP": True, "MARKED": False}
    for config in configs("pair"):
        yield _pair("pair", config)
        yield _pair("pair, entropy", config, WANT_ENTROPY=True)
        yield _pair("pair, entropy, statistics only", config, WANT_ENTROPY=True, STORE=False)
    for config in configs("pair-heavy"):
        yield _pair("pair, entropy and bias", config, **biased)
        yield _pair("pair, entropy, bias and soft cap", config, **capped)
    separate: dict[str, Any] = {"SHARED_WEIGHT": False, "MARKED": False}
    for config in configs("pair-separate"):
        yield _pair("pair, two heads, entropy", config, WANT_ENTROPY=True, **separate)
        yield _pair("pair, two heads, entropy, bias and soft cap", config, **{**capped, **separate})
    # Rows that start off alignment, and a width that does not end with a step.
    odd = ("_stride", "width", "num_columns", "hidden", "weight")
    uneven: dict[str, Any] = {"EVEN_WIDTH": False, "odd": odd}
    plain = table["score-plain"][0]
    yield _score("score, plain loads", plain, **uneven)
    yield _score("score, plain loads, entropy and soft cap", plain, **uneven, WANT_ENTROPY=True, HAS_SOFTCAP=True)
    yield _pair("pair, plain loads, entropy and bias", table["pair-plain"][0], **biased, **uneven)
    yield _pair("pair, plain loads, entropy, bias and soft cap", table["pair-plain"][0], **capped, **uneven)
    plain = table["pair-separate-plain"][0]
    yield _pair("pair, two heads, plain loads, entropy", plain, WANT_ENTROPY=True, **separate, **uneven)
    # Aligned rows of a width that does not end with a step, an odd vocabulary.
    some: dict[str, Any] = {"EVEN_WIDTH": False, "WANT_ENTROPY": True, "odd": ("num_columns",)}
    yield _score("score, odd vocabulary, uneven width, entropy", table["score-heavy"][0], **some)
    yield _pair("pair, odd vocabulary, uneven width, entropy", table["pair"][0], **some)
    # Triton makes constants of arguments that are 1 (but of functions.COUNTS): rows of one number.
    one: dict[str, Any] = {"WANT_ENTROPY": True, **uneven}
    of_score: dict[str, Any] = dict.fromkeys(("width", "hidden_stride", "weight_stride"), 1)
    yield _score("score, plain loads, width 1", table["score-plain"][0], **of_score, **one)
    of_pair: dict[str, Any] = {f"{view}_{name}": 1 for view in ("student", "teacher") for name in of_score}
    yield _pair("pair, plain loads, width 1", table["pair-plain"][0], **of_pair, **one)
    for precision in ("tf32", "ieee"):
        options: dict[str, Any] = {"element": "fp32", "PRECISION": precision}
        yield _score(f"score, float32, {precision}", table["score-float32"][0], **options)
        odd_score: dict[str, Any] = {**uneven, "WANT_ENTROPY": True, "HAS_SOFTCAP": True}
        yield _score(f"score, float32, {precision}, plain loads", table["score-float32"][0], **options, **odd_score)
        yield _pair(f"pair, float32, {precision}", table["pair-float32"][0], **options)
        yield _pair(f"pair, float32, {precision}, plain loads", table["pair-float32"][0], **options, **capped, **uneven)
        both: dict[str, Any] = {**separate, **options, **uneven}
        yield _pair(f"pair, two heads, float32, {precision}, plain loads", table["pair-separate-float32"][0], **both)
    yield from _elementwise(table["pair"][0])


def _types(kernel: Any, **known: str) -> dict[str, str]:
    """Signature types by the names of the arguments."""
    types = {}
    for name in kernel.arg_names:
        if name in known:
            types[name] = known[name]
        elif name.endswith(("_tanh", "_scale")) or name in ("beta", "complement", "rounding"):
            types[name] = "fp32"
        elif name == "target_ids":
            types[name] = "*i64"
        elif name == "is_difference":
            types[name] = "*i8"
        elif name.startswith("num_") or name.endswith(("_stride", "width", "_span")) or name == "stride":
            types[name] = "i32"
        else:
            types[name] = "*fp32"
    return types


def _operand(element: str, rows_of_tile: int, config: GemmConfig, descriptors: bool) -> str:
    return f"tensordesc<{element}[{rows_of_tile},{config.width}]>" if descriptors else f"*{element}"


def _score(
    name: str, config: GemmConfig, element: str = "bf16", odd: tuple[str, ...] = (), **constants: Any
) -> Variant:
    fixed = {
        "HAS_BIAS": False,
        "HAS_SOFTCAP": False,
        "WANT_ENTROPY": False,
        "DESCRIPTORS": config.descriptors,
        "EVEN_WIDTH": True,
        "PRECISION": "ieee",
        "WARP_SPECIALIZE": config.warp_specialize,
        "BLOCK_ROWS": config.rows,
        "BLOCK_COLUMNS": config.columns,
        "BLOCK_WIDTH": config.width,
        "GROUP": config.group,
        **constants,
    }
    descriptors = fixed["DESCRIPTORS"]
    types = _types(
        score.score_kernel,
        hidden=_operand(element, config.rows, config, descriptors),
        weight=_operand(element, config.columns, config, descriptors),
        bias=f"*{element}",
    )
    return Variant(name, score.score_kernel, types, fixed, config.warps, config.stages, config, odd)


def _pair(name: str, config: GemmConfig, element: str = "bf16", odd: tuple[str, ...] = (), **constants: Any) -> Variant:
    fixed = {
        "SHARED_WEIGHT": True,
        "MARKED": True,
        "STUDENT_BIAS": False,
        "TEACHER_BIAS": False,
        "STUDENT_SOFTCAP": False,
        "TEACHER_SOFTCAP": False,
        "WANT_ENTROPY": False,
        "STORE": True,
        "FORWARD": True,
        "DESCRIPTORS": config.descriptors,
        "EVEN_WIDTH": True,
        "PRECISION": "ieee",
        "FLATTEN": config.flatten,
        "WARP_SPECIALIZE": config.warp_specialize,
        "BLOCK_ROWS": config.rows,
        "BLOCK_COLUMNS": config.columns,
        "BLOCK_WIDTH": config.width,
        "PARTS": config.parts,
        **constants,
    }
    descriptors = fixed["DESCRIPTORS"]
    stored = "*fp32" if element == "fp32" else "*fp16"
    hidden = _operand(element, config.rows, config, descriptors)
    weight = _operand(element, config.columns, config, descriptors)
    types = _types(
        fused_divergence.fused_divergence_kernel,
        student_hidden=hidden,
        teacher_hidden=hidden,
        student_weight=weight,
        teacher_weight=weight,
        student_bias=f"*{element}",
        teacher_bias=f"*{element}",
        shifted_student=stored,
        shifted_teacher=stored,
    )
    return Variant(
        name, fused_divergence.fused_divergence_kernel, types, fixed, config.warps, config.stages, config, odd
    )


def _elementwise(config: GemmConfig) -> Iterator[Variant]:
    columns = config.columns // config.parts
    base = {"STUDENT_SOFTCAP": True, "TEACHER_SOFTCAP": True}
    kernel = gradients.divergence_gradient_kernel
    weights = {"HAS_WEIGHT": True, "HAS_LOGPROB_WEIGHT": True}
    yield Variant(
        "gradient from shifted logits",
        kernel,
        _types(kernel, student="*fp16", teacher="*fp16", gradient="*bf16"),
        {
            "FORWARD": True,
            "REVERSE": False,
            "SHIFTED": True,
            **base,
            **weights,
            "BLOCK_ROWS": 2048 // columns,
            "BLOCK_COLUMNS": columns,
        },
    )
    yield Variant(
        "gradient from float32 logits",
        kernel,
        _types(kernel, gradient="*bf16"),
        {
            "FORWARD": False,
            "REVERSE": False,
            "SHIFTED": False,
            **base,
            **weights,
            "BLOCK_ROWS": 4,
            "BLOCK_COLUMNS": 512,
        },
    )
    kernel = statistics.block_statistics_kernel
    yield Variant(
        "statistics of float32 logits",
        kernel,
        _types(kernel),
        {**base, "WANT_ENTROPY": True, "BLOCK_ROWS": 2, "BLOCK_COLUMNS": 1024},
        warps=8,
    )
    kernel = statistics.combine_kernel
    yield Variant(
        "statistics of rows",
        kernel,
        _types(kernel),
        {"MARKED": True, "HAS_TARGETS": True, "WANT_ENTROPY": True, "REVERSE": False, "BLOCKS": 1024},
    )
    kernel = statistics.mixture_kernel
    yield Variant("mixture", kernel, _types(kernel), {**base, "BLOCK_COLUMNS": 2048}, warps=8)
    kernel = gradients.softmax_statistics_kernel
    yield Variant("softmax", kernel, _types(kernel), {"HAS_SOFTCAP": True, "BLOCK_COLUMNS": 2048}, warps=8)
    kernel = gradients.logprob_gradient_kernel
    yield Variant(
        "gradient of scores",
        kernel,
        _types(kernel, gradient="*bf16"),
        {
            "HAS_SOFTCAP": True,
            "HAS_LOGPROB_WEIGHT": True,
            "HAS_LOGSUMEXP_WEIGHT": True,
            "HAS_ENTROPY_WEIGHT": True,
            "BLOCK_ROWS": 4,
            "BLOCK_COLUMNS": 512,
        },
    )
    kernel = rows.scale_rows_kernel
    yield Variant("scaled rows", kernel, _types(kernel, scale="*fp32", out="*bf16"), {"BLOCK_COLUMNS": 1024})
    kernel = rows.target_logits_kernel
    yield Variant(
        "target logits",
        kernel,
        _types(kernel, hidden="*bf16", weight="*bf16", bias="*bf16"),
        {"MARKED": True, "HAS_BIAS": True, "HAS_SOFTCAP": True, "BLOCK_WIDTH": 1024},
    )
    kernel = rows.difference_rows_kernel
    yield Variant(
        "differences of rows",
        kernel,
        _types(kernel, student="*bf16", teacher="*bf16", out="*bf16"),
        {"BLOCK_COLUMNS": 1024},
    )


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
