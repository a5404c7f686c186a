"""A small server in this process that speaks OpenAI's HTTP interface as vLLM's does, and fails where it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        with server.lock:
            failure = server.failures.pop() if server.failures and server.fails_at_models else None
        if failure is not None:
            self.fail(failure)
            return
        cards = [{"id": name, "max_model_len": server.longest} for name in server.models]
        self.answer(200, {"data": cards} if server.cards is None else server.cards)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append((self.path, self.headers.get("Authorization"), body))
            failure = server.failures.pop() if server.failures else None
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            if failure is not None:
                self.fail(failure)
            elif self.path.endswith("/chat/completions"):
                content = f"{body['messages'][-1]['content']} with {body['seed']}"
                self.answer(200, {"choices": [{"message": {"content": content}}]})
            else:
                choice = server.score(body)
                if choice is not None:  # else it hangs up
                    self.answer(200, {"choices": [choice]})
        finally:
            with server.lock:
                server.under_way -= 1

    def fail(self, failure):
        if failure == "hang up":
            return
        if failure == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices":')
        elif failure == "silence":
            self.server.silence.wait(5.0)
        else:
            self.answer(*failure)

    def answer(self, status, value):
        text = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def scores_of(model, lock, scale: float = 1.0):
    """What the server answers to `prompt_logprobs`: those of `model`, from one unpadded pass a sequence.

    Args:
        scale: of the logits, as a temperature would.
    """

    def score(body):
        ids = body["prompt"]
        with lock, torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0] * scale
        logprobs = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        listed = [{str(token): {"logprob": value, "rank": 1}} for token, value in zip(ids[1:], logprobs.tolist())]
        return {"text": "", "prompt_logprobs": [None, *listed]}

    return score


@contextmanager
def running(model=None, scale: float = 1.0) -> Iterator[ThreadingHTTPServer]:
    """A server; `stop()` and `start()` of it are a crash and a restart on the same port.

    `failures` are answers to come, the last first; `bodies` the requests so far.
    """
    server = None
    port = 0

    def start():
        nonlocal server, port
        again = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        if server is not None:
            again.__dict__.update({name: getattr(server, name) for name in kept})
        port, server = again.server_port, again
        server.thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        server.thread.start()
        return server

    def stop():
        server.shutdown()
        server.thread.join()
        server.server_close()

    first = start()
    lock = threading.Lock()
    state = {
        "bodies": [],
        "failures": [],
        "models": ["tiny"],
        "cards": None,
        "longest": 128,
        "fails_at_models": False,
        "lock": lock,
        "under_way": 0,
        "most_under_way": 0,
        "silence": threading.Event(),
        "score": None if model is None else scores_of(model, threading.Lock(), scale),
        "url": f"http://127.0.0.1:{port}",
        "stop": stop,
        "start": start,
    }
    kept = list(state)
    first.__dict__.update(state)
    yield first
    first.silence.set()
    if server.thread.is_alive():
        stop()
