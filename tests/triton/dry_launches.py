"""Calls of the operations as a GPU gets them, up to their launches: `python -m tests.triton.dry_launches 90 CASE...`.

Prints what was launched and what the assembler says of each kernel as JSON. Outside the interpreter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from bench.roofline.assembler import assemble
from tests.triton.stand_in import as_triton_would, compiled, kernels, stand_in
from unisd_kernels import LMHead, linear_divergence, linear_logprobs, unisd_loss
from unisd_kernels.backends.triton import configs
from unisd_kernels.backends.triton.rows import scale_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Inputs:
    """Inputs of one call. The shapes are those of real models; nothing of them is in memory."""

    def __init__(self, rows: int, width: int, columns: int, dtype: torch.dtype, **head: Any) -> None:
        self.rows, self.width, self.columns, self.dtype = rows, width, columns, dtype
        self.student = self.hidden().requires_grad_()
        self.teacher = self.hidden()
        self.head, self.other_head = self.make_head(**head), self.make_head(**head)
        self.ids = torch.empty(rows, dtype=torch.int64, device="cuda")
        self.offsets = torch.empty(3, dtype=torch.int32, device="cuda")

    def hidden(self) -> torch.Tensor:
        return torch.empty(self.rows, self.width, dtype=self.dtype, device="cuda")

    def make_head(self, bias: bool = False, trainable: bool = False, **options: Any) -> LMHead:
        weight = torch.empty(self.columns, self.width, dtype=self.dtype, device="cuda", requires_grad=trainable)
        return LMHead(weight, torch.empty(self.columns, dtype=self.dtype, device="cuda") if bias else None, **options)

    def divergence(self, beta: float = 0.0, two_heads: bool = False, **options: Any) -> None:
        head = self.other_head if two_heads else self.head
        linear_divergence(self.student, self.head, self.teacher, head, beta=beta, **options).sum().backward()

    def score(self, entropy: bool = True) -> None:
        linear_logprobs(self.teacher, self.head, self.ids, return_entropy=entropy)

    def score_gradient(self, entropy: bool = False) -> None:
        result = linear_logprobs(self.student, self.head, self.ids, return_entropy=entropy)
        (result.entropy if entropy else result.logprobs).sum().backward()

    def loss(self, **options: Any) -> None:
        views = {"auxiliary_hidden": [self.hidden(), self.hidden()], "negative_hidden": self.hidden()}
        arguments = (self.student, self.head, self.teacher, self.head, self.ids, self.offsets)
        unisd_loss(*arguments, **views, **options).loss.backward()


def headline() -> None:
    """The default of a GPU: bfloat16, one head, the forward KL; a step with every mechanism."""
    Inputs(8192, 4096, 128256, BF16).divergence()
    Inputs(8192, 4096, 128256, BF16).loss(feature_weight=0.1)


def one_row() -> None:
    """Triton makes constants of ones."""
    inputs = Inputs(1, 2048, 151936, BF16)
    inputs.score()
    inputs.divergence()


def odd() -> None:
    """A vocabulary and a width that 16 does not divide: rows start off alignment."""
    inputs = Inputs(700, 577, 50257, BF16)
    inputs.score()
    inputs.divergence()


def odd_vocabulary() -> None:
    """50257 columns with aligned rows, whose width does not end with a step."""
    inputs = Inputs(3000, 784, 50257, BF16)
    inputs.score()
    inputs.divergence(1.0)


def expanded() -> None:
    """One row of a teacher for all rows of the student."""
    inputs = Inputs(700, 1024, 32000, BF16)
    inputs.teacher = inputs.hidden()[:1].expand(700, 1024)
    inputs.divergence(impl="triton_fused")


def jensen_shannon() -> None:
    inputs = Inputs(3000, 896, 151936, FP16)
    inputs.divergence(0.5)
    inputs.score_gradient()
    inputs.score_gradient(entropy=True)


def many_rows() -> None:
    """More than 65535 blocks of 4 rows."""
    inputs = Inputs(300_000, 64, 96, FP32)
    inputs.score_gradient()
    inputs.divergence(0.5)


def float32() -> None:
    inputs = Inputs(500, 513, 32003, FP32, bias=True, softcap=30.0)
    inputs.score()
    inputs.divergence(impl="triton_fused")
    inputs.divergence(two_heads=True, impl="triton_fused")


def heads() -> None:
    """Biases, soft caps, scales, two heads, gradients of the head; both designs and both KLs."""
    for options in ({"bias": True}, {"bias": True, "softcap": 30.0}, {"softcap": 30.0, "logit_scale": 0.5}):
        for beta in (0.0, 1.0):
            inputs = Inputs(700, 1536, 49152, BF16, **options)
            inputs.divergence(beta)
            inputs.divergence(beta, two_heads=True, impl="triton_fused")
            inputs.divergence(beta, impl="triton_chunked")
        inputs.score()
        inputs.score_gradient(entropy=True)
    Inputs(700, 1536, 49152, BF16, bias=True, trainable=True).loss(beta=0.5, clip_quantile=0.9)
    Inputs(700, 1536, 49152, BF16, trainable=True).loss(beta=1.0, clip_cap=1.0)


def layouts() -> None:
    """What slicing, transposing and small sizes make of strides and of alignment."""
    for dtype in (BF16, FP16, FP32):
        for rows, width, columns in ((1, 1, 2), (1, 17, 3), (65, 16, 1), (64, 64, 64), (129, 1000, 33), (7, 8, 65)):
            inputs = Inputs(rows, width, columns, dtype)
            for impl in ("triton_fused", "triton_chunked"):
                inputs.divergence(impl=impl)
                inputs.divergence(0.3, impl=impl)
            inputs.score()
            inputs.score_gradient(entropy=True)
        inputs = Inputs(300, 512, 4000, dtype)
        wide = torch.empty(300, 3, 1031, dtype=dtype, device="cuda")
        for view in (wide[:, 1, 5:517], wide[:, 0, :512], wide[:, 2, ::2][:, :512], wide[0, 0, :512].expand(300, 512)):
            inputs.teacher = view
            inputs.score()
            for impl in ("triton_fused", "triton_chunked"):
                inputs.divergence(impl=impl)
        inputs.head = LMHead(torch.empty(512, 4000, dtype=dtype, device="cuda").T)
        inputs.score()
        inputs.divergence(impl="triton_fused")


def variants() -> None:
    """Two calls of the same sizes that need kernels of their own, and two that need not."""
    for width in (48, 50, 1):  # of which 16 divides one, and one is a constant of the kernel
        rows = torch.empty(9, 64, dtype=BF16, device="cuda")
        for start in (0, 1, 8):  # off alignment, and not
            scale_rows(rows[:, start : start + width], torch.empty(9, device="cuda"), BF16)
    wide = torch.empty(9, 64, dtype=FP32, device="cuda")
    scale_rows(wide[:, :48], torch.empty(10, device="cuda")[1:], BF16)
    scale_rows(wide[:, :48], torch.empty(9, device="cuda"), BF16)
    for rows in (50, 100):  # the same sizes in other tiles
        Inputs(rows, 64, 300, BF16).score(entropy=False)
    for options in ({}, {"bias": True, "softcap": 30.0}, {"logit_scale": 2.0}):
        for rows in (100, 112):
            inputs = Inputs(rows, 64, 96, BF16, **options)
            inputs.score(entropy=not options)
            inputs.ids = torch.empty(rows + 1, dtype=torch.int64, device="cuda")[1:]
            inputs.score(entropy=not options)


def tf32() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    float32()
    many_rows()


def candidates() -> None:
    """Every tile that a measurement may pick."""

    def all_of_them(run: Callable[[Any], object], option: Any) -> float:
        run(option)
        return 1.0

    with (
        mock.patch.object(configs, "autotuning", return_value=True),
        mock.patch("unisd_kernels.backends.triton.fused_divergence.autotuning", return_value=True),
        mock.patch.object(configs, "_median_milliseconds", all_of_them),
        mock.patch.object(configs, "_load", return_value={}),
        mock.patch.object(configs, "_store"),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
    ):
        for rows in (8, 700):
            for head in ({}, {"bias": True, "softcap": 30.0}):
                inputs = Inputs(rows, 1024, 32000, BF16, **head)
                inputs.score(entropy=False)
                inputs.score()
                inputs.divergence()
                inputs.divergence(two_heads=True, impl="triton_fused")


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        headline, one_row, odd, odd_vocabulary, expanded, jensen_shannon, many_rows, float32,
        heads, layouts, variants, tf32, candidates,
    )
}  # fmt: skip


def main(capability: str, *names: str) -> None:
    launches: dict[str, list[Any]] = {}
    found: dict[str, int] = {}
    for number, name in enumerate(names):
        with stand_in(int(capability), stream=7 * number) as gpu, as_triton_would() as known:
            CASES[name]()
        found[name] = sum(known)
        assert all(launch.stream == 7 * number for launch in gpu.launches), "a launch on another stream"
        launches[name] = sorted({(launch.kernel, launch.grid) for launch in gpu.launches})
    reports = []
    for name, built in compiled():
        used = assemble(built.asm["ptx"], int(capability))
        signature = {key: value for key, value in built.src.signature.items() if value != "constexpr"}
        constants = {
            ".".join((built.src.fn.arg_names[place], *map(str, fields))): repr(value)
            for (place, *fields), value in built.src.constants.items()
        }
        reports.append(
            {
                "kernel": name,
                "registers": used.registers,
                "spilled": used.spilled,
                "advisories": used.advisories,
                "shared": built.metadata.shared,
                "warps": built.metadata.num_warps,
                "asserts": "__assertfail" in built.asm["ptx"],
                "signature": signature,
                "constants": constants,
            }
        )
    report = {"kernels": sorted(kernels()), "launches": launches, "found": found, "compiled": reports}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
