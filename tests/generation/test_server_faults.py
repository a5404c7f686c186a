"""What may go wrong between a server and us, against a small server in this process."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import time

import pytest

from tests import fake_server
from unisd.daemon_threads import DaemonThreads
from unisd.generation import Request, Sampling, make_generator
from unisd.generation.server import ServerGenerator
from unisd.server import Server

SAMPLING = Sampling(temperature=0.3, max_new_tokens=5, top_p=0.9)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("unisd.server._FIRST_WAIT", 0.01)
    with fake_server.running() as server:
        yield server


def test_requests_and_replies(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    generator = make_generator(server.url, "", batch_size=3)
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "last"}]
    requests = [*(Request(f"prompt {number}", number) for number in range(7)), Request(conversation, 2**40 + 5)]
    found = dict(generator.replies(requests, SAMPLING))
    assert [found[place] for place in range(7)] == [f"prompt {number} with {number}" for number in range(7)]
    assert found[7] == "last with 5"  # a seed that every server takes
    path, key, body = server.bodies[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer a key")
    assert (body["model"], body["temperature"], body["max_tokens"], body["top_p"]) == ("tiny", 0.3, 5, 0.9)
    assert conversation in [body["messages"] for _, _, body in server.bodies]


@pytest.mark.parametrize("failure", [(503, "busy"), (429, "slowly"), "hang up", "cut"])
def test_what_may_pass_is_tried_again_and_said_once(server, failure, caplog):
    server.failures = [failure] * 3
    assert dict(ServerGenerator(server.url, "m").replies([Request("p", 1)], SAMPLING)) == {0: "p with 1"}
    assert len(server.bodies) == 4
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "trying again for 600 s" in caplog.messages[0]
    assert "answers again" in caplog.messages[1]


def test_silence_counts_as_a_failure(server):
    server.failures = ["silence"]
    generator = ServerGenerator(server.url, "m", timeout=0.2)
    assert dict(generator.replies([Request("p", 1)], SAMPLING)) == {0: "p with 1"}


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ((400, "too long a prompt"), "answered 400 Bad Request: too long a prompt"),
        ((200, "<html>"), "something else than JSON"),
        ((200, {"error": "x"}), "without a message"),
    ],
)
def test_what_does_not_pass_is_said_at_once(server, failure, said):
    server.failures = [failure]
    with pytest.raises(ValueError, match=said):
        list(ServerGenerator(server.url, "m").replies([Request("p", 1)], SAMPLING))
    assert len(server.bodies) == 1


def test_patience_ends(server):
    server.failures = [(503, "loading")] * 1000
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"answered 503 Service Unavailable: loading, tried for \d+ s: is the"):
        list(ServerGenerator(server.url, "m", patience=0.1).replies([Request("p", n) for n in range(200)], SAMPLING))
    assert time.monotonic() - started < 10.0  # the requests that had not been sent are not tried one after another


def test_a_restart_in_the_middle_loses_nothing(server, caplog):
    """The server goes down with requests under way and comes back: every reply arrives, and is the right one."""
    generator = ServerGenerator(server.url, concurrency=4)
    requests = [Request(f"p{number}", number) for number in range(30)]
    found = {}
    for number, (place, reply) in enumerate(generator.replies(requests, SAMPLING)):
        found[place] = reply
        if number == 9:
            server.stop()
            threading.Timer(1.0, server.start).start()
    assert found == {number: f"p{number} with {number}" for number in range(30)}
    assert sum("trying again" in message for message in caplog.messages) >= 1
    assert "answers again" in caplog.messages[-1]


def test_what_is_no_choice_of_models_is_told(server):
    server.models = ["a", "b"]
    with pytest.raises(ValueError, match=r"serves 2 models \(a, b\); name one as --model"):
        make_generator(server.url, "")
    server.cards = ["nothing"]
    with pytest.raises(ValueError, match="without models"):
        Server(server.url)


def test_a_process_that_fails_waits_for_no_server():
    """An exception between the requests and their answers ends the process, whatever they would still wait for."""
    script = (
        "from unisd.server import Server\n"
        "Server('http://127.0.0.1:9', 'm', patience=600.0).post('/completions', [{}] * 3)\n"
        "raise SystemExit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30)
    # Its own status, and no message: what the waiting threads say may come between, or behind.
    assert done.returncode == 7, done.stderr


def test_threads_are_few_and_go_with_their_server():
    threads = DaemonThreads(2, "few")
    both = threading.Barrier(3, timeout=10)
    futures = [threads.submit(both.wait) for _ in range(2)]
    both.wait()
    for future in futures:  # two threads have met here
        future.result(10)
    names = {threads.submit(lambda: threading.current_thread().name).result(10) for _ in range(8)}
    assert names <= {"few-1", "few-2"}
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result(10)
    running = [thread for thread in threading.enumerate() if thread.name.startswith("few-")]
    del threads
    gc.collect()
    for thread in running:
        thread.join(10)
    assert not any(thread.is_alive() for thread in running)
