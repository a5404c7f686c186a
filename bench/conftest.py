"""Options of `pytest bench/`, which peers it runs, and the inputs that those of one case share."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench.cases import find_case
from bench.measuring.setting import Setting, make_sets, make_setting
from bench.peers import PEERS, names
from bench.records.environment import chosen_device, environment

QUICK = ("kl", "scoring")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Plan:
    """Tests to run: (case, beta) and peer; those of one setting follow each other."""

    device: torch.device
    entries: tuple[tuple[tuple[str, float], str], ...]


PLAN = pytest.StashKey[Plan]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "peers (pytest bench/)")
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
    """Raises ValueError for a case or a peer that is not known."""
    cases = {case.name: case for case in (find_case(name, device) for name in case_names)}
    entries = [
        ((case.name, beta), peer) for case in cases.values() for beta in case.beta for peer in names(peers, case)
    ]
    return Plan(device, tuple(dict.fromkeys(entries)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "setting" in metafunc.fixturenames:
        plan = metafunc.config.stash.get(PLAN, None)
        entries = plan.entries if plan else ()
        ids = [f"{case}-beta={beta:g}-{peer}" for (case, beta), peer in entries]
        metafunc.parametrize(("setting", "name"), entries, indirect=["setting"], ids=ids)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add the machine in a key of its own, without what says nothing of it: pytest-benchmark warns of differences."""
    plan = config.stash.get(PLAN, None)
    if plan:
        surroundings = environment(plan.device)
        left_out = ("commit", "date", "command")
        machine_info["unisd"] = {name: value for name, value in surroundings.items() if name not in left_out}


@pytest.fixture(scope="session")
def held() -> dict[tuple[str, float], Setting]:
    """The setting of the latest test: a GPU has room for one."""
    return {}


@pytest.fixture
def setting(request: pytest.FixtureRequest, held: dict[tuple[str, float], Setting]) -> Setting:
    if request.param not in held:
        device = request.config.stash[PLAN].device
        for former in held.values():
            former.sets.clear()  # a failed test's traceback still refers to the setting
        held.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        name, beta = request.param
        case = find_case(name, device)
        held[request.param] = make_setting(case, beta, device, make_sets(case, device))
    return held[request.param]
