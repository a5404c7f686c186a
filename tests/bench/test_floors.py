"""The second floor and whose products the first one is; memory where no other's leftovers are."""

from __future__ import annotations

import platform
import time

import pytest
import torch

from bench.cases import CASES, shaped_case
from bench.measuring import fresh_memory, measure
from bench.measuring import run as run_command
from bench.peers import FLOOR, FLOORS, OURS, PEAK, names
from bench.records import machine, products, verdict
from bench.records.failures import NotHere
from bench.report.tables import table
from bench.roofline import fma_peak

CPU = torch.device("cpu")
PAIR = [torch.bfloat16] if machine.multiplies_bfloat16() else []


@pytest.fixture
def no_library():
    """The loop is compiled anew, or not at all."""
    fma_peak._library.cache_clear()
    yield
    fma_peak._library.cache_clear()


def fastest(call):
    """Seconds of this thread's own time, which another process does not lengthen."""
    seconds = []
    for _ in range(9):
        begun = time.thread_time()
        call()
        seconds.append(time.thread_time() - begun)
    return min(seconds)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the loop is written for x86-64")
@pytest.mark.parametrize("dtype", [torch.float32, *PAIR])
def test_no_product_is_faster_than_registers_alone(dtype):
    """A loop of fewer multiply-adds than it says would be far ahead of a library; one of more, far behind."""
    size = 768
    a, b, out = (torch.ones(size, size, dtype=dtype) for _ in range(3))
    loop = fma_peak.loop(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    registers, library = fastest(lambda: loop.run(2 * size**3, 1)), fastest(lambda: torch.mm(a, b, out=out))
    torch.set_num_threads(threads)
    assert 0.1 * library < registers < 1.3 * library


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path, no_library):
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(fma_peak.shutil, "which", lambda name: None)
    with pytest.raises(NotHere, match=r"no C\+\+ compiler for its loop: none of c\+\+, g\+\+, clang\+\+ is there"):
        fma_peak.loop(torch.float32)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NotHere, match="false does not compile its loop: it said nothing"):
        fma_peak.loop(torch.float32)
    monkeypatch.setenv("CXX", "nonesuch")
    with pytest.raises(NotHere, match="CXX names no compiler"):
        fma_peak.loop(torch.float32)
    assert not list((tmp_path / "bench").iterdir())
    monkeypatch.setattr(fma_peak.platform, "machine", lambda: "aarch64")
    with pytest.raises(NotHere, match="written for x86-64 under Linux, this is aarch64"):
        fma_peak.loop(torch.float32)


def test_the_share_of_the_peak_is_within_a_round(monkeypatch):
    seconds = {FLOOR: [1.0, 2.0, 3.0], PEAK: [0.8, 1.6, 2.4], OURS: [1.0, 2.0, 4.0]}
    assert measure._figures(seconds, FLOOR)["share_of_peak"] == pytest.approx(0.8)
    assert measure._figures(seconds, OURS)["share_of_peak"] == pytest.approx(0.8)
    assert "share_of_peak" not in measure._figures({FLOOR: [1.0], OURS: [1.0]}, OURS)
    rows = measure.measure(CASES["smoke.kl"], CPU, 1, [FLOOR, OURS])
    shown = table([rows[0], {**rows[1], "share_of_peak": 0.843, "peak_bar": 0.85}])
    assert "| of the FMA peak |" in shown
    assert "| 84% (under the bar of 85%) |" in shown


def test_floors_come_first_where_they_fit():
    assert names(["all"], CASES["kl_cpu_bf16"])[:4] == [*FLOORS, OURS]
    assert names(["all"], CASES["kl_cpu"])[:3] == [FLOOR, PEAK, OURS]
    assert names([OURS, PEAK], CASES["kl_cpu"]) == [FLOOR, PEAK, OURS]
    assert not {*FLOORS[1:]} & {*names(["all"], CASES["llama3.1-8b.kl.8192"])}


def test_the_float32_floor_of_bfloat16_operands_is_of_float32(monkeypatch):
    dtypes = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (dtypes.append(a.dtype), product(a, b, out=out)))
    case = shaped_case("kl", 16, 8, 100, 0, torch.bfloat16)
    rows = measure.measure(case, CPU, 1, FLOORS[:2])
    assert [row["peer"] for row in rows] == [*FLOORS[:2]]
    assert {torch.float32, torch.bfloat16} == set(dtypes)
    assert all(row["ratio_to_floor"] > 0 for row in rows)
    # A CPU's rows are a CPU's, whatever their operands.
    assert verdict.on_cpu(rows[0])
    assert not verdict.on_cpu({"dtype": "bfloat16"})


MKL = "MKL_VERBOSE oneMKL 2024.0\nMKL_VERBOSE SGEMM(T,N,256,64,128,0x7,0x7) 812us CNR:OFF\n"
ONEDNN = (
    "onednn_verbose,v1,info,cpu,runtime:OpenMP,nthr:2\n"
    "onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_bf16,undef,src:bf16::blocked:ab::f0,,,64x128\n"
)


@pytest.mark.parametrize(
    ("said", "named"),
    [(MKL, "MKL's sgemm"), (ONEDNN, "oneDNN's brg_matmul:avx512_core_bf16"), ("", "neither MKL nor oneDNN (torch is")],
)
def test_the_library_of_a_product_is_the_one_that_reports_it(said, named, monkeypatch):
    monkeypatch.setattr(products, "_said_by_libraries", lambda call: said)
    assert products.products()["float32"].startswith(named)


def test_libraries_are_heard_and_standard_output_is_given_back(capfd):
    said = products._said_by_libraries(lambda: print("from here", flush=True))
    print("from there", flush=True)
    out = capfd.readouterr().out
    assert "from here" in said + out  # Python's own stream may be another than the process's
    assert "from there" in out
    assert set(products.products()) == {"float32", "bfloat16"}


def test_memory_is_measured_apart_but_for_floors(monkeypatch):
    asked = []
    monkeypatch.setattr(measure, "peak_in_fresh_process", lambda case, beta, name: asked.append((beta, name)) or 12345)
    peers = [FLOOR, OURS, "dense float32"]
    rows = measure.measure(CASES["smoke"], CPU, 1, peers, memory_apart=True)
    assert asked == [(beta, name) for beta in (0.0, 0.5) for name in peers[1:]]
    assert [row.get("extra_peak_bytes") for row in rows] == [None, 12345, 12345] * 2


def test_a_step_in_a_fresh_process_needs_its_logits():
    """Here without the process: dense formulas hold both models' [N, V], twice at least."""
    case = shaped_case("kl", 64, 8, 65536, 0)
    assert fresh_memory._peak(case, 0.0, "dense float32", 1) > 3 * 64 * 65536 * 4


@pytest.mark.exhaustive
def test_a_fresh_process_knows_nothing_of_this_one():
    case = shaped_case("kl", 64, 8, 65536, 0)
    assert fresh_memory.peak_in_fresh_process(case, 0.0, "dense float32") > 3 * 64 * 65536 * 4


def test_a_processor_without_units_is_not_measured_in_bfloat16(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(run_command, "multiplies_bfloat16", lambda: False)
    name = "scaling.kl.N16.H8.V100.K0.bfloat16"
    output = tmp_path / "x.json"
    arguments = ["--device", "cpu", "--case", name, "--peers", OURS, "--rounds", "1", "--output", str(output)]
    assert run_command.main(arguments) == 0
    assert f"{name}: left out: this processor has no units for bfloat16" in capsys.readouterr().out
    monkeypatch.setattr(run_command, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert run_command.main([*arguments, "--threads", "5"]) == 0
    assert "of the FMA" not in capsys.readouterr().out
    assert asked == [5]
