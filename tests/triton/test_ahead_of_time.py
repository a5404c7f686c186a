"""Every kernel compiles for GPUs that are not here, without spilling registers, with their matrix instructions, and
with nothing that the assembler advises against (C75xx: matrix products that are waited for one by one).

In a process of its own: kernels that were imported for the interpreter cannot be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import triton

from bench.roofline.ahead_of_time import main
from bench.roofline.assembler import Resources, assemble, resources
from bench.roofline.targets import ARCHITECTURES, SHARED_MEMORY, is_amd, of_amdgcn
from unisd.cli.errors import CommandError


def reports_of(architecture: str, *options: str) -> list[dict]:
    command = [sys.executable, "-m", "bench", "ahead-of-time", "--json", "--architectures", architecture]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = json.loads(done.stdout)
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["advisories"] == [], report
        assert report["shared"] <= SHARED_MEMORY[architecture], report
        assert report["programs_per_processor"] >= 1, report
    products = [report for report in reports if report["variant"].startswith(("score", "fused"))]
    for report in products:
        # Of float32 numbers in full precision NVIDIA has no matrix instruction.
        multiplied = is_amd(architecture) or "ieee" not in report["variant"]
        assert (report["matrix_instructions"] > 0) == multiplied, report
        has_bulk_copies = architecture in ("sm_90", "sm_100")
        addressed = has_bulk_copies and not any(word in report["variant"] for word in ("plain", "float32"))
        assert (report["bulk_copies"] > 0) == addressed, report
    return products


@pytest.mark.parametrize(
    "architecture",
    [each if each == "sm_90" else pytest.param(each, marks=pytest.mark.exhaustive) for each in ARCHITECTURES],
)
def test_the_products_of_the_headline(architecture):
    assert len(reports_of(architecture, "--variants", "score", "fused divergence")) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant(architecture):
    assert len(reports_of(architecture)) >= 25


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(CommandError, match="unset it"):
        main([])


def test_what_the_assembler_prints_is_read():
    printed = """
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to a reason
ptxas info    : Compiling entry function 'fused_divergence_kernel' for 'sm_90a'
ptxas info    : Function properties for fused_divergence_kernel
    8 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size
"""
    assert resources(printed) == Resources(255, 40, ("C7515",))
    with pytest.raises(RuntimeError, match=r"ptxas\S* failed"):
        assemble(".version 8.0\n.target sm_90a\nnonsense", 90)


def test_the_notes_behind_amds_assembly_are_read():
    notes = "\ts_endpgm\n; TotalNumSgprs: 106\n; NumVgprs: 120\n; TotalNumVgprs: 137\n; ScratchSize: 24\n"
    assert of_amdgcn(notes) == (137, 24)
    with pytest.raises(ValueError, match="another Triton"):
        of_amdgcn("\ts_endpgm\n")
