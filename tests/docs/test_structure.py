"""The house is as docs/design.md says: its tree, its layers, and files that one can read."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("unisd_kernels", "unisd", "bench")
MOST_LINES = 500


def tree_script():
    spec = importlib.util.spec_from_file_location("tree", ROOT / "scripts" / "tree.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(path: Path, everywhere: bool) -> set[str]:
    """Names of modules that a file imports: at its top level, or `everywhere` in it; with what it takes from them."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_tree_of_the_design_names_every_file():
    script = tree_script()
    page = script.PAGE.read_text()
    assert script.tree() in page, "docs/design.md: run python scripts/tree.py"
    assert "unisd_kernels/" in script.tree()
    assert all(script.says(path) for path in script.files()), "a file that does not say what it is"


def test_a_file_more_is_noticed(monkeypatch):
    script = tree_script()
    page, files = script.PAGE.read_text(), script.files()
    monkeypatch.setattr(script, "files", lambda: files[:-1])
    assert script.tree() not in page


def test_folders_that_the_script_describes_exist():
    script = tree_script()
    missing = [folder for folder in script.FOLDERS if not (ROOT / folder).is_dir()]
    assert not missing


def test_no_file_is_too_long_to_read():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.splitlines() if name.endswith((".py", ".h", ".cpp", ".cu", ".cuh", ".sh"))]
    long = {str(path.relative_to(ROOT)): n for path in paths if (n := len(path.read_text().splitlines())) > MOST_LINES}
    assert not long
    assert len((ROOT / "unisd" / "trainer.py").read_text().splitlines()) < 350


def test_the_reference_and_the_fast_paths_know_nothing_of_each_other():
    """An oracle that shares a formula with what it checks is none. The public functions choose between the two."""
    for path in sources("unisd_kernels/reference"):
        fast = [
            name for name in imports(path, True) if name.startswith(("unisd_kernels.ops", "unisd_kernels.backends"))
        ]
        assert not fast, (path, fast)
    public = {"loss.py", "divergence.py", "logprobs.py"}
    for path in sources("unisd_kernels/ops", "unisd_kernels/backends"):
        if path.parent.name != "ops" or path.name not in public:
            of_reference = [name for name in imports(path, True) if name.startswith("unisd_kernels.reference")]
            assert not of_reference, (path, of_reference)
        elif path.name in public:
            assert not [name for name in imports(path, True) if name.startswith("unisd_kernels.reference.")], path


def test_no_import_goes_in_a_circle():
    paths = {module_name(path): path for path in sources(*PACKAGES)}
    needs = {
        name: {other for other in imports(path, everywhere=False) if other in paths and other != name}
        for name, path in paths.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            pytest.fail(" -> ".join((*trail[trail.index(name) :], name)))
        if name not in done:
            for other in sorted(needs[name]):
                # A package's __init__ runs before its own modules in any case.
                if not name.startswith(f"{other}."):
                    visit(other, (*trail, name))
            done.add(name)

    for name in sorted(needs):
        visit(name, ())


def test_layers_point_one_way():
    """unisd_kernels needs neither the trainer nor the benchmarks, and the trainer not the benchmarks."""
    for path in sources("unisd_kernels"):
        assert not [name for name in imports(path, True) if name.split(".")[0] in ("unisd", "bench", "transformers")], (
            path
        )
    for path in sources("unisd"):
        if path.name != "bench.py":
            assert not [name for name in imports(path, True) if name.split(".")[0] == "bench"], path


def test_docstrings_begin_with_what_stands_alone():
    for path in sources(*PACKAGES, "tests", "scripts"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                assert not text.startswith("Of "), f"{path}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"


def test_pytest_enters_every_folder_of_tests(request):
    """A folder named as one that it leaves out of its own accord, such as build, would never run."""
    left_out = request.config.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(folders) > 20
    for folder in folders:
        for part in folder.relative_to(ROOT).parts:
            assert not any(fnmatch(part, pattern) for pattern in left_out), folder
