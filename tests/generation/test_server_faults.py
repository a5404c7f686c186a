"""What may go wrong between a server and us, against a small server in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from unisd.generation import Request, Sampling, make_generator
from unisd.generation.server import ServerGenerator

SAMPLING = Sampling(temperature=0.3, max_new_tokens=5, top_p=0.9)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append((self.path, self.headers.get("Authorization"), body))
            failure = server.failures.pop() if server.failures else None
        if failure == "hang up":
            return
        if failure == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices":')
        elif failure is not None:
            self.answer(*failure)
        else:
            content = f"{body['messages'][-1]['content']} with {body['seed']}"
            self.answer(200, {"choices": [{"message": {"content": content}}]})

    def answer(self, status, value):
        text = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr("unisd.generation.server.time.sleep", lambda seconds: None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.bodies, server.failures, server.models, server.lock = [], [], ["tiny"], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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
def test_what_may_pass_is_tried_again(server, failure):
    server.failures = [failure] * 2
    assert dict(ServerGenerator(server.url, "m").replies([Request("p", 1)], SAMPLING)) == {0: "p with 1"}
    assert len(server.bodies) == 3


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
