"""What passes in the sandbox, what does not, and what code may not do there."""

import os
import pickle
import shutil
import socket
import threading
from pathlib import Path

import pytest

from unisd.sandbox import ISOLATIONS, Outcome, Program, Sandbox
from unisd.sandbox.inside import wire

NO_BUBBLEWRAP = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture(scope="module", params=[pytest.param("bubblewrap", marks=NO_BUBBLEWRAP), "process"])
def sandbox(request):
    return Sandbox(request.param, seconds=5, memory_mib=512)


RIGHT = {
    "value": ("def f(x): return x + 1", "assert f(1) == 2"),
    "generator": ("def f(x): yield from x", "assert list(f([1, 2])) == [1, 2]"),
    "views": ("def f(x): return x.keys()", "assert f({1: 2}) == {1}"),
    "named tuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'a b')\ndef f(x): return P(x, [P(1, 2)])",
        "assert f(1) == (1, [(1, 2)])",
    ),
    "library types": (
        "from collections import Counter, defaultdict\nfrom decimal import Decimal\n"
        "def f(x): return Counter(x), defaultdict(int, {1: 2}), Decimal('1.5')",
        "assert f('aab') == ({'a': 2, 'b': 1}, {1: 2}, 1.5)",
    ),
    "in place": ("def f(x): x.sort()", "a = [3, 1]\nf(a)\nassert a == [1, 3]"),
    "exception": ("def f(x): raise ValueError", "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass"),
    "check": ("def f(x): return x + 1", "def check(candidate):\n    assert candidate(1) == 2\ncheck(f)"),
    "file of its own": ("def f(x):\n    open('mine', 'w').write('x')\n    return 2", "assert f(1) == 2"),
}


@pytest.mark.parametrize("case", RIGHT)
def test_code_that_satisfies_its_tests_passes(case):
    code, test = RIGHT[case]
    assert Sandbox("process").run(Program(code, (test,))) == Outcome("passed")


def test_objects_of_the_code_and_imports_of_the_setup(sandbox):
    node = "class Node:\n    def __init__(self, data):\n        self.data, self.left = data, None\n"
    code = node + "def f(root): return math.floor(root.left.data)"
    setup = "import math\nroot = Node(1)\nroot.left = Node(2.5)"
    assert sandbox.run(Program(code, ("assert f(root) == 2", "assert root.data == math.gcd(1, 3)"), setup)).passed


FRAMES = """
import sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [*frame.f_code.co_consts, *frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    import gc
    seen += [item for held in gc.get_objects() if type(held) in (list, tuple) for item in held]
    return next((item for item in seen if type(item) is int and 14_000 < item < 15_000), None)
"""
WRONG = {
    "wrong value": ("def f(x): return x", Outcome("failed", "AssertionError")),
    "exception": ("def f(x): return x / 0", Outcome("crashed", "ZeroDivisionError")),
    "own exception": ("class Mine(Exception): pass\ndef f(x): raise Mine", Outcome("crashed", "Mine")),
    "no parse": ("def f(x: return", Outcome("crashed", "SyntaxError")),
    "not defined": ("g = 1", Outcome("crashed", "NameError")),
    "exit before the tests": ("import sys\nsys.exit(0)", Outcome("crashed", "SystemExit")),
    "hard exit in the call": ("import os\ndef f(x): os._exit(0)", Outcome("crashed")),
    "equal to anything": (
        "class Any(int):\n    def __eq__(self, other): return True\ndef f(x): return Any(1)",
        Outcome("failed", "AssertionError"),
    ),
    "an object equal to anything": (
        "class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()",
        Outcome("failed", "AssertionError"),
    ),
    "the answer in a frame": (FRAMES, Outcome("failed", "AssertionError")),
    "memory": ("def f(x): return len('a' * 10**10)", Outcome("crashed", "MemoryError")),
    "other processes": ("import os\ndef f(x): os.fork()", Outcome("crashed", "PermissionError")),
    "a message of its own": (
        "import os\ndef f(x):\n    for number in range(3, 20):\n        try: os.write(number, b'passed' * 10)\n"
        "        except OSError: pass\n    return 0",
        Outcome("crashed"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_code_that_does_not_satisfy_its_tests_never_passes(case):
    code, outcome = WRONG[case]
    assert Sandbox("process", memory_mib=512).run(Program(code, ("assert f(1) == 14711",))) == outcome


def test_loops_and_floods_end(sandbox):
    quick = Sandbox(sandbox.isolation, seconds=0.7)
    codes = ["def f(x):\n    while True: pass", "def f(x):\n    while True: print('x' * 100_000)"]
    outcomes = quick.run_all([Program(code, ("assert f(1) == 2",)) for code in codes])
    assert outcomes == [Outcome("timed out")] * 2


def test_no_file_outside_is_written(sandbox, tmp_path):
    target = tmp_path / "outside"
    code = f"def f(x):\n    open({str(target)!r}, 'w').write('x')\n    return 2"
    outcome = sandbox.run(Program(code, ("assert f(1) == 2",)))
    assert outcome.status == "crashed"
    assert not target.exists()


def test_no_network(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        connected = threading.Event()

        def accept():
            try:
                server.accept()
                connected.set()
            except OSError:
                pass  # closed at the end of the test

        threading.Thread(target=accept, daemon=True).start()
        code = f"import socket\ndef f(x):\n    socket.create_connection({server.getsockname()!r}, 1)\n    return 2"
        outcome = sandbox.run(Program(code, ("assert f(1) == 2",)))
        assert outcome.status == "crashed"
        assert not connected.is_set()


@NO_BUBBLEWRAP
def test_bubblewrap_holds_what_gets_past_python():
    target = Path(__file__).parent / "outside"
    code = (
        "import gc\nfor item in gc.get_objects():\n"
        "    if getattr(item, '__name__', '') == 'outside':\n"
        "        for cell in item.__closure__:\n"
        "            if isinstance(cell.cell_contents, str) and len(cell.cell_contents) > 1: cell.cell_contents = ''\n"
        f"def f(x):\n    open({str(target)!r}, 'w').write('x')\n    return 2"
    )
    # Python's refusal would be a PermissionError.
    assert Sandbox().run(Program(code, ("assert f(1) == 2",))) == Outcome("crashed", "OSError")
    assert not target.exists()


def test_results_stand_in_the_order_of_the_programs(sandbox):
    programs = [Program(f"def f(): return {number % 2}", ("assert f() == 1",)) for number in range(6)]
    assert [outcome.passed for outcome in sandbox.run_all(programs, workers=3)] == [False, True] * 3


def test_without_bubblewrap_the_way_on_is_named(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ValueError, match=r"install bubblewrap, or allow .*isolation='process'"):
        Sandbox()
    with pytest.raises(ValueError, match=f"one of {', '.join(ISOLATIONS)}, got 'none'"):
        Sandbox("none")


def test_a_message_that_is_no_plain_value_is_refused():
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    with pytest.raises(wire.Ended, match="UnpicklingError"):
        wire.unpack(pickle.dumps(Evil()), lambda number: None)
