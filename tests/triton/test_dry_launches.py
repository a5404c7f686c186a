"""The operations as a GPU gets them, up to the launch: through Triton's binder, its specialization on the values and
alignments of real shapes, tensor descriptors and NVIDIA's assembler (stand_in.py). No kernel may spill registers, be
slowed down by what the assembler advises against, or ask for more than the GPU has.

In a process of its own: kernels that were imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench.roofline.targets import SHARED_MEMORY

ALWAYS = ("headline", "one_row", "odd", "many_rows", "jensen_shannon", "variants")
THE_REST = ("odd_vocabulary", "expanded", "float32", "heads", "layouts", "tf32", "candidates")


def dry_run(capability: int, *cases: str) -> dict:
    command = [sys.executable, "-m", "tests.triton.dry_launches", str(capability), *cases]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "UNISD_TRITON_AUTOTUNE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_good_code(report: dict, capability: int) -> None:
    for kernel in report["compiled"]:
        assert kernel["spilled"] == 0, kernel
        assert kernel["advisories"] == [], kernel
        assert kernel["shared"] <= SHARED_MEMORY[f"sm_{capability}"], kernel
        assert kernel["registers"] * 32 * kernel["warps"] <= 65536, kernel


def test_a_call_reaches_its_launches():
    report = dry_run(90, *ALWAYS)
    assert_good_code(report, 90)
    launched = {name: {kernel for kernel, _ in launches} for name, launches in report["launches"].items()}
    assert set().union(*launched.values()) == set(report["kernels"])
    assert len(report["kernels"]) == 13
    assert {"fused_divergence_kernel", "divergence_gradient_kernel", "score_kernel"} <= launched["headline"]
    # The default tile of the product kernel, by TMA, in as many programs as the GPU has processors.
    assert ["fused_divergence_kernel", [132, 1, 1]] in report["launches"]["headline"]
    fused = [kernel for kernel in report["compiled"] if kernel["kernel"] == "fused_divergence_kernel"]
    by_tma = [kernel for kernel in fused if kernel["signature"].get("student_hidden", "").startswith("tensordesc<bf16")]
    # Rows that start off alignment cannot have it.
    assert len(by_tma) >= 2 < len(fused)
    # 75000 blocks of four rows.
    assert max(grid[0] for _, grid in report["launches"]["many_rows"]) >= 75000
    # A launch like an earlier one is made without Triton's binder; each took the variant that Triton would take
    # (`stand_in.as_triton_would`).
    assert report["found"]["headline"] > 20
    assert report["found"]["variants"] > 10
    # An id outside of the vocabulary is seen by the kernel that reads it, and by no other.
    assert {kernel["kernel"] for kernel in report["compiled"] if kernel["asserts"]} == {"finish_scores_kernel"}
    # Another number of rows is no other kernel.
    assert not any("num_rows" in kernel["constants"] for kernel in report["compiled"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("cases", [ALWAYS, *([case] for case in THE_REST)], ids=lambda cases: cases[0])
def test_every_call_reaches_its_launches(capability, cases):
    if capability == 90 and cases is ALWAYS:
        pytest.skip("is the test above")
    assert_good_code(dry_run(capability, *cases), capability)
