"""setup.py's search for torch when the build has none of its own."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "csrc" / "find_torch.py"


@pytest.fixture
def find_torch(tmp_path, monkeypatch):
    """The module as it is in an isolated build of a machine without torch: each test puts one somewhere."""
    spec = importlib.util.spec_from_file_location("find_torch", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "target" / "lib" / name))
    monkeypatch.setattr(module.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(module, "PROJECT", tmp_path / "project")
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "base"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    return module


def install(folder: Path, version: str = "2.11.0+cu130", headers: bool = True) -> Path:
    torch_folder = folder / "torch"
    (torch_folder / "include" / "torch" / "csrc" / ("stable" if headers else "api")).mkdir(parents=True)
    (torch_folder / "version.py").write_text(f"__all__ = ['__version__']\n__version__ = '{version}'\ncuda = None\n")
    return torch_folder


def packages(prefix: Path) -> Path:
    return prefix / "lib" / "python3.12" / "site-packages"


def test_the_running_torch_is_found_and_its_version_read():
    spec = importlib.util.spec_from_file_location("find_torch", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = module.torch_directory()
    assert folder == Path(torch.__file__).parent
    assert module.torch_version(folder) == tuple(map(int, torch.__version__.split(".")[:2]))


def test_nowhere(find_torch):
    assert find_torch.torch_directory() is None


def test_pip_builds_for_the_environment_it_installs_into(find_torch, tmp_path, monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "active"))
    install(packages(tmp_path / "active"))
    target = install(tmp_path / "target" / "lib" / "platlib")
    assert find_torch.torch_directory() == target  # and not the one that is only active


def test_an_environment_that_is_active(find_torch, tmp_path, monkeypatch):
    torch_folder = install(packages(tmp_path / "active"))
    assert find_torch.torch_directory() is None
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(tmp_path / "active"))
            assert find_torch.torch_directory() == torch_folder
    # uv puts the build's own environment into VIRTUAL_ENV and in front of PATH; the user's is still on PATH.
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "build"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'build' / 'bin'}:{tmp_path / 'active' / 'bin'}")
    assert find_torch.torch_directory() is None  # a folder of programs, not an environment
    (tmp_path / "active" / "pyvenv.cfg").touch()
    assert find_torch.torch_directory() == torch_folder


@pytest.mark.parametrize("place", ["project/.venv", "base"])
def test_an_environment_that_is_not_active(find_torch, tmp_path, place):
    assert find_torch.torch_directory() is None
    torch_folder = install(packages(tmp_path / place))
    assert find_torch.torch_directory() == torch_folder


def test_what_is_too_old_or_has_no_headers_is_passed_over(find_torch, tmp_path):
    install(tmp_path / "target" / "lib" / "platlib", version="2.9.1")
    install(tmp_path / "target" / "lib" / "purelib", headers=False)
    assert find_torch.torch_directory() is None
    torch_folder = install(tmp_path / "user", version="2.10.0a0+git1")
    assert find_torch.torch_directory() == torch_folder


def test_sysconfig_names_the_folder_that_torch_lies_in():
    """What the search rests on."""
    assert Path(torch.__file__).parents[1] in {Path(sysconfig.get_path(name)) for name in ("platlib", "purelib")}
