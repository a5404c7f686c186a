"""Generators: a reply is a sample of the model's distribution and belongs to its prompt and seed alone."""

from __future__ import annotations

import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from tests.trainer import tiny_run
from unisd.generation import Request, Sampling, TransformersGenerator, make_generator


def replies(generator, requests, sampling):
    found = dict(generator.replies(requests, sampling))
    assert sorted(found) == list(range(len(requests)))
    return [found[place] for place in range(len(requests))]


def test_a_reply_depends_on_its_prompt_and_seed_alone():
    model, tokenizer = tiny_run.llama(), tiny_run.tokenizer()
    requests = [Request(tiny_run.words(3 * i, 1 + i), seed=i) for i in range(7)]
    sampling = Sampling(temperature=1.0, max_new_tokens=8)
    alone = [replies(TransformersGenerator(model, tokenizer, 1), [one], sampling)[0] for one in requests]
    assert replies(TransformersGenerator(model, tokenizer, 3), requests, sampling) == alone
    assert replies(TransformersGenerator(model, tokenizer, 7), requests[::-1], sampling) == alone[::-1]
    other = replies(
        TransformersGenerator(model, tokenizer, 7), [Request(r.prompt, r.seed + 100) for r in requests], sampling
    )
    assert other != alone


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_tokens_have_the_models_probabilities(temperature, top_p):
    model, tokenizer = tiny_run.llama(), tiny_run.tokenizer()
    prompt, count = tiny_run.words(4, 3), 4000
    sampling = Sampling(temperature=temperature, max_new_tokens=1, top_p=top_p)
    found = replies(
        TransformersGenerator(model, tokenizer, 500), [Request(prompt, seed) for seed in range(count)], sampling
    )
    with torch.no_grad():
        logits = model(torch.tensor([tiny_run.tokenized(prompt)])).logits[0, -1]
    expected = (logits / temperature).softmax(-1).double()
    if top_p < 1:
        order = expected.argsort(descending=True)
        kept = order[: int((expected[order].cumsum(0) < top_p).sum()) + 1]
        expected = torch.zeros_like(expected).index_copy(0, kept, expected[kept])
        expected /= expected.sum()
    probability: dict[str, float] = {}  # by text: special tokens have none
    for token, p in enumerate(expected.tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True)
        probability[text] = probability.get(text, 0.0) + p
    for text, p in sorted(probability.items(), key=lambda pair: -pair[1])[:6]:
        share = found.count(text) / count
        assert abs(share - p) < 5 * (p * (1 - p) / count) ** 0.5 + 1e-3


def test_identity_tells_weights_apart():
    tokenizer = tiny_run.tokenizer()
    one, other = TransformersGenerator(tiny_run.llama(), tokenizer), TransformersGenerator(tiny_run.llama(1), tokenizer)
    assert one.identity == TransformersGenerator(tiny_run.llama(), tokenizer).identity != other.identity


def test_vllm_gets_prompts_and_seeds(monkeypatch):
    calls, given = [], []

    class LLM:
        def __init__(self, model, **options):
            assert model == "someone/model"
            given.append(options)

        def _answer(self, prompts, parameters):
            calls.append((prompts, [vars(p) for p in parameters]))
            return [
                types.SimpleNamespace(outputs=[types.SimpleNamespace(text=f"{prompt} {p.seed}")])
                for prompt, p in zip(prompts, parameters, strict=True)
            ]

        def chat(self, messages, sampling_params, use_tqdm):
            return self._answer([one[0]["content"] for one in messages], sampling_params)

        def generate(self, prompts, sampling_params, use_tqdm):
            return self._answer(prompts, sampling_params)

    module = types.SimpleNamespace(LLM=LLM, SamplingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", module)
    generator = make_generator("vllm", "someone/model")
    requests = [Request("a", 1), Request([{"role": "user", "content": "b"}], 2), Request("c", 2**31 + 3)]
    assert replies(generator, requests, Sampling(0.7, 32)) == ["a 1", "b 2", "c 3"]
    assert calls[0][1][0] == {"temperature": 0.7, "top_p": 1.0, "max_tokens": 32, "seed": 1}
    options = {"dtype": "float32", "max_model_len": 64}
    other = make_generator("vllm", "someone/model", options=options)
    assert given == [{"trust_remote_code": False}, {"trust_remote_code": False, **options}]
    # In other portions it writes the same, in another precision it may not.
    assert generator.identity == make_generator("vllm", "someone/model", options={"max_model_len": 9}).identity
    assert generator.identity != other.identity


def test_vllm_does_not_read_an_adapter(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a PEFT adapter, and the generator vllm reads whole models: merge it"):
        make_generator("vllm", str(tmp_path))


def test_options_of_vllm_are_of_no_other_generator():
    for kind in ("transformers", "http://127.0.0.1:9"):
        with pytest.raises(ValueError, match=f"generator_options are of the generator vllm, and .* is {kind}"):
            make_generator(kind, "someone/model", options={"dtype": "float32"})


def test_without_vllm_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"pip install vllm, or give --generator transformers"):
        make_generator("vllm", "someone/model")
    with pytest.raises(ValueError, match="must be transformers, vllm or a URL"):
        make_generator("llama.cpp", "someone/model")


@pytest.fixture
def server():
    """A chat server that fails once for each prompt, then answers with prompt and seed."""
    seen: dict[str, int] = {}
    state = types.SimpleNamespace(status=503, models=["tiny"])

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def _send(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self._send(200, {"data": [{"id": name} for name in state.models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            seen[prompt] = seen.get(prompt, 0) + 1
            if seen[prompt] == 1:
                self._send(state.status, {"error": "busy"})
                return
            content = f"{prompt} {body['seed']} {body['model']} {body['max_tokens']}"
            self._send(200, {"choices": [{"message": {"content": content}}]})

    listener = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{listener.server_port}"
    yield state
    listener.shutdown()
    listener.server_close()


def test_a_server_is_asked_again_after_a_failure_that_may_pass(server, monkeypatch):
    monkeypatch.setattr("unisd.server._FIRST_WAIT", 0.01)
    generator = make_generator(server.url, "")
    requests = [Request("a", 1), Request([{"role": "user", "content": "b"}], 2)]
    assert replies(generator, requests, Sampling(0.7, 32)) == ["a 1 tiny 32", "b 2 tiny 32"]
    server.status = 400
    with pytest.raises(ValueError, match="answered 400"):
        replies(generator, [Request("c", 1)], Sampling(0.7, 32))
    server.models = ["one", "two"]
    with pytest.raises(ValueError, match=r"serves 2 models \(one, two\); name one"):
        make_generator(server.url, "")


def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("unisd.server._AT_FIRST", 0.05)
    with pytest.raises(ValueError, match=r"does not answer .* is the server up"):
        make_generator("http://127.0.0.1:9", "")
