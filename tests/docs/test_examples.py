"""Every Python example of the pages runs as it is pasted, with a tiny model in the place of the one it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import unisd
from tests.trainer import tiny_run
from unisd_kernels import LMHead

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def test_no_page_has_an_example_that_is_not_run():
    pages = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"))
    found = {str(path.relative_to(ROOT)): len(blocks(str(path.relative_to(ROOT)))) for path in pages}
    # The first of mixtures.md is run by tests/ops/test_mixture.py, and tests/gpu has gpu.md's, which needs a GPU.
    assert {page: count for page, count in found.items() if count} == {
        "README.md": 4,
        "docs/gpu.md": 1,
        "docs/mixtures.md": 2,
        "docs/row-groups.md": 1,
    }


@pytest.fixture(scope="module")
def readme() -> dict[str, object]:
    """What the examples on a loop of one's own leave behind, one after the other in one session."""
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unisd, "load_model", lambda name: (tiny_run.llama(), tiny_run.tokenizer()))
        torch.manual_seed(0)
        for block in blocks("README.md")[:3]:
            exec(block, names)
    return names


def test_readme_from_models(readme):
    assert readme["model"].lm_head.weight.grad.abs().max() > 0
    assert len(readme["student"].target_ids) == 4  # three words and the end


def test_readme_states_predict_the_completion(readme):
    """One position before each token: the scores are those of the model's own logits."""
    context, completion = readme["teacher_prompt"], readme["completion"]
    with torch.no_grad():
        logits = readme["model"](torch.cat([context, completion], dim=1)).logits
    own = logits.log_softmax(-1)[:, context.shape[1] - 1 : -1].gather(-1, completion[..., None])
    assert torch.allclose(readme["scores"].logprobs, own.flatten(), atol=1e-5)
    assert readme["result"].loss > 0
    assert len(readme["auxiliary_hidden"]) == 3
    assert readme["per_token"].shape == (10,)


def test_readme_from_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_run.llama(max_position_embeddings=1024)
    monkeypatch.setattr(unisd, "load_model", lambda name: (model, tiny_run.tokenizer()))
    names: dict[str, object] = {}
    exec(blocks("README.md")[3], names)
    assert names["trainer"].state.global_step == 2


def test_mixtures_from_prompts():
    torch.manual_seed(0)
    names = {"model": tiny_run.llama(), "tokenizer": tiny_run.tokenizer(), "completions": ["w5 w6", "w7"]}
    names |= {"asked": ["w9", "w10 w11"], "told": ["w9 w12", "w10 w11 w13"]}
    names["others"] = [["w14 w9", "w15"], ["w16", "w17 w18"]]
    exec(blocks("docs/mixtures.md")[1], names)
    assert names["loss"] > 0


def test_row_groups(tmp_path):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    names = {"student": student, "teacher": teacher, "head": LMHead(torch.randn(11, 8))}
    names |= {"ids": torch.arange(5), "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        exec(blocks("docs/row-groups.md")[0], names)
    finally:
        dist.destroy_process_group()
    assert student.grad.abs().max() > 0
