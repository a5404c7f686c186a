"""Names under which replies are kept: other weights have another one."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from unisd.generation import make_generator


def test_vllm_tells_weights_in_the_same_folder_apart(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda model, **options: None))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = make_generator("vllm", str(tmp_path)).identity
    assert make_generator("vllm", str(tmp_path)).identity == before
    weights.write_bytes(b"another")
    assert make_generator("vllm", str(tmp_path)).identity != before
