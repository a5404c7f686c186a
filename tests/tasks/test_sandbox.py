"""What passes in the sandbox, what does not, and what code may not do there."""

import os
import pickle
import pwd
import shutil
import socket
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import unisd
from unisd.sandbox import Outcome, Program, Sandbox
from unisd.sandbox.inside import wire

NO_BUBBLEWRAP = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


PYTHON = (sys.prefix, sys.base_prefix, unisd.__path__[0])


@pytest.fixture(
    scope="module", params=[pytest.param(False, marks=NO_BUBBLEWRAP), True], ids=["bubblewrap", "unsafe code"]
)
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
    assert Sandbox(unsafe_code=True).run(Program(code, (test,))) == Outcome("passed")


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
    assert Sandbox(unsafe_code=True, memory_mib=512).run(Program(code, ("assert f(1) == 14711",))) == outcome


def test_loops_and_floods_end(sandbox):
    quick = Sandbox(sandbox.unsafe_code, seconds=0.7)
    codes = ["def f(x):\n    while True: pass", "def f(x):\n    while True: print('x' * 100_000)"]
    outcomes = quick.run_all([Program(code, ("assert f(1) == 2",)) for code in codes])
    assert outcomes == [Outcome("timed out")] * 2


# Whatever Python itself refuses in these processes is allowed again: what still holds is bubblewrap and the limits.
PAST_PYTHON = """
import gc, os, sys
guard = sys.modules['unisd.sandbox.inside.candidate']
guard._REFUSED = guard._CHANGING = ()
for item in gc.get_objects():
    if getattr(item, '__name__', '') == 'outside':
        for cell in item.__closure__:
            if isinstance(cell.cell_contents, str) and len(cell.cell_contents) > 1:
                cell.cell_contents = ''
"""


@pytest.fixture(scope="module")
def contained():
    """The outcome, under bubblewrap and past Python, of a function's body that has to return 2."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    sandbox = Sandbox(memory_mib=512)

    def outcome(*lines):
        body = "".join(f"    {line}\n" for line in lines)
        return sandbox.run(Program(f"{PAST_PYTHON}\nimport os\ndef f():\n{body}", ("assert f() == 2",)))

    return outcome


@pytest.fixture
def visible():
    """A folder that is neither in /tmp nor at home, with a file."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        (Path(folder) / "kept").write_text("a secret")
        yield Path(folder)


def test_a_fork_bomb_starts_no_process(contained):
    bomb = "for number in range(100): os.fork()"  # so many at most, should it start some
    assert contained(bomb, "return 2") == Outcome("crashed", "PermissionError")
    assert contained("os.posix_spawn('/bin/true', ['true'], {})", "return 2") == Outcome("crashed", "PermissionError")
    thread = ("import threading", "done = []", "one = threading.Thread(target=lambda: done.append(2))", "one.start()")
    assert contained(*thread, "one.join()", "return done[0]").passed


def test_files_are_neither_deleted_nor_written(contained, visible):
    file, read_only = str(visible / "kept"), Outcome("crashed", "OSError")
    assert contained(f"return 2 * (open({file!r}).read() == 'a secret')").passed  # it is there to be deleted
    assert contained(f"os.remove({file!r})", "return 2") == read_only
    assert contained("import shutil", f"shutil.rmtree({str(visible)!r})", "return 2") == read_only
    assert contained(f"open({str(visible / 'new')!r}, 'w')", "return 2") == read_only
    assert contained(f"open({str(Path.home() / 'new')!r}, 'w')", "return 2") == read_only
    assert [path.name for path in visible.iterdir()] == ["kept"]


def test_python_refuses_it_too(visible):
    for line in (f"os.remove({str(visible / 'kept')!r})", f"open({str(visible / 'new')!r}, 'w')"):
        outcome = Sandbox(unsafe_code=True).run(Program(f"import os\ndef f():\n    {line}", ("f()",)))
        assert outcome == Outcome("crashed", "PermissionError")
    assert [path.name for path in visible.iterdir()] == ["kept"]


@NO_BUBBLEWRAP
def test_the_home_directory_is_not_read(visible, monkeypatch):
    monkeypatch.setenv("HOME", str(visible))
    sandbox = Sandbox()
    for home in (str(visible), pwd.getpwuid(os.getuid()).pw_dir):
        # Python itself may live at home, and then its folder is all there is.
        lives = {Path(each).relative_to(home).parts[0] for each in PYTHON if Path(each).is_relative_to(home)}
        tests = (f"assert sorted(f({home!r})) == {sorted(lives)}",)
        assert sandbox.run(Program("import os\ndef f(x): return os.listdir(x)", tests)).passed
    code = f"def f(): return open({str(visible / 'kept')!r}).read()"
    assert sandbox.run(Program(code, ("f()",))) == Outcome("crashed", "FileNotFoundError")


def test_a_gigabyte_of_output_goes_nowhere(contained):
    assert contained("for _ in range(1000): os.write(1, b'x' * 10**6); os.write(2, b'x' * 10**6)", "return 2").passed
    assert contained("return 'x' * 10**9").status == "crashed"
    write = "file.write(b'x' * 10**6)"
    one_file = ("try:", "    with open('/tmp/0', 'wb') as file:", f"        for _ in range(1000): {write}")
    ends = ("except OSError: pass", "return 2 if 10**7 < os.path.getsize('/tmp/0') < 2 * 10**7 else 0")
    assert contained(*one_file, *ends).passed
    several = ("n = 0", "try:", "    while n < 1000:", f"        with open(f'/tmp/{{n}}', 'wb') as file: {write}")
    assert contained(*several, "        n += 1", "except OSError: pass", "return 2 if 30 < n < 80 else n").passed
    assert contained("open('/dev/shm/big', 'wb')", "return 2") == Outcome("crashed", "OSError")


def test_no_network(sandbox):
    assert not _connects(sandbox, "")


@NO_BUBBLEWRAP
def test_no_network_past_python():
    assert not _connects(Sandbox(), PAST_PYTHON)


def _connects(sandbox, before):
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
        outcome = sandbox.run(Program(before + code, ("assert f(1) == 2",)))
        assert outcome.status == "crashed"
        return connected.is_set()


def test_what_the_tests_print_is_no_outcome(sandbox):
    tests = ('print(\'{"status": "failed"}\')', "assert f() == 1")
    assert sandbox.run(Program("def f(): return 1", tests)) == Outcome("passed")


@NO_BUBBLEWRAP
def test_answers_do_not_fill_the_memory_of_the_tests():
    sandbox = Sandbox(False, seconds=5, memory_mib=512)
    # Where a generator is sent as its values, the code sends that they are 50 million.
    packer = "import sys\npacker = sys.modules['unisd.sandbox.inside.wire']._Packer\nplain = packer.persistent_id\n"
    packer += (
        "packer.persistent_id = lambda self, value: ('iterator', range({n})) if value == 7.5 else plain(self, value)"
    )
    outcomes = [
        sandbox.run(Program(f"{packer.format(n=n)}\ndef f(): return 7.5", ("assert next(f()) == 0",)))
        for n in (5, 50_000_000)
    ]
    assert outcomes[0].status == "passed"
    # Whichever limit it meets first: of memory, or of time on a slow machine.
    assert outcomes[1].status in ("crashed", "timed out")


def test_results_stand_in_the_order_of_the_programs(sandbox):
    programs = [Program(f"def f(): return {number % 2}", ("assert f() == 1",)) for number in range(6)]
    assert [outcome.passed for outcome in sandbox.run_all(programs, workers=3)] == [False, True] * 3


def test_without_bubblewrap_the_way_on_is_named(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ValueError, match=r"install bubblewrap, or run .* no security boundary: --unsafe_code"):
        Sandbox()
    assert Sandbox(unsafe_code=True).run(Program("def f(): return 1", ("assert f() == 1",))).passed


def test_a_message_that_is_no_plain_value_is_refused():
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    with pytest.raises(wire.Ended, match="UnpicklingError"):
        wire.unpack(pickle.dumps(Evil()), lambda number: None)
