"""Options of `pytest bench/`, which contenders it runs, and the inputs that those of one case share."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench.accuracy import Expected, expected_outcome
from bench.cases import Case, find_case
from bench.environment import chosen_device, environment
from bench.inputs import Inputs, make_inputs, more_inputs
from bench.peers import PEERS, names

QUICK = ("kl", "scoring")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Plan:
    """What to run: (case, beta) and contender; those of one group follow each other."""

    device: torch.device
    entries: tuple[tuple[tuple[str, float], str], ...]


@dataclass(frozen=True)
class Group:
    """What the contenders of one case and divergence share. `sets`: inputs to go round, the first one first."""

    case: Case
    beta: float
    device: torch.device
    sets: list[Inputs]
    expected: Expected

    @property
    def divergence(self) -> str:
        return self.case.divergence(self.beta)

    @property
    def name(self) -> str:
        return self.case.name if self.case.operation == "scoring" else f"{self.case.name}, {self.divergence}"


PLAN = pytest.StashKey[Plan]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "contenders (pytest bench/)")
    group.addoption("--bench-case", nargs="+", action="extend", help=f"operations or cases; default: {' '.join(QUICK)}")
    group.addoption("--bench-device", choices=DEVICES, default="auto", help="auto: CUDA if there is one")
    group.addoption("--bench-peers", nargs="+", action="extend", help=f"all (default), or some of: {', '.join(PEERS)}")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Not called in `pytest .`, which finds this file later: there, where nobody asked for benchmarks, none run."""
    config = session.config
    device = config.option.bench_device
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda: there is no CUDA device")
    try:
        config.stash[PLAN] = make_plan(
            chosen_device(device),
            config.option.bench_case or list(QUICK),
            config.option.bench_peers or ["all"],
        )
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def make_plan(device: torch.device, case_names: list[str], peers: list[str]) -> Plan:
    """Raises ValueError for a case or a contender that is not known."""
    cases = {case.name: case for case in (find_case(name, device) for name in case_names)}
    entries = [
        ((case.name, beta), peer) for case in cases.values() for beta in case.beta for peer in names(peers, case)
    ]
    return Plan(device, tuple(dict.fromkeys(entries)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "group" in metafunc.fixturenames:
        plan = metafunc.config.stash.get(PLAN, None)
        entries = plan.entries if plan else ()
        ids = [f"{case}-beta={beta:g}-{peer}" for (case, beta), peer in entries]
        metafunc.parametrize(("group", "peer"), entries, indirect=["group"], ids=ids)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """In a key of its own, without what says nothing of the machine: pytest-benchmark warns of differences."""
    plan = config.stash.get(PLAN, None)
    if plan:
        surroundings = environment(plan.device, "pytest")
        left_out = ("commit", "date", "command")
        machine_info["unisd"] = {name: value for name, value in surroundings.items() if name not in left_out}


@pytest.fixture(scope="session")
def held() -> dict[tuple[str, float], Group]:
    """The group of the latest test: a GPU has room for one."""
    return {}


@pytest.fixture
def group(request: pytest.FixtureRequest, held: dict[tuple[str, float], Group]) -> Group:
    if request.param not in held:
        device = request.config.stash[PLAN].device
        for former in held.values():
            former.sets.clear()  # a failed test's traceback still refers to the group
        held.clear()
        _free(device)
        held[request.param] = make_group(*request.param, device)
        _free(device)
    return held[request.param]


def make_group(case_name: str, beta: float, device: torch.device) -> Group:
    case = find_case(case_name, device)
    # Compiled code of other cases would count towards torch.compile's limit of variants.
    torch.compiler.reset()
    sets = more_inputs(make_inputs(case, device), device)
    return Group(case, beta, device, sets, expected_outcome(sets[0], beta))


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
