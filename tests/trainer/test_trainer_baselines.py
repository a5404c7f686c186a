"""The baselines of the same command line: SFT, SDFT, GKD; and what masks take out."""

from __future__ import annotations

import pytest
import torch

from tests.trainer import tiny_run
from tests.trainer.tiny_run import EOS, completion_of, tokenized
from unisd.masks import loss_mask, most_entropic, truncated
from unisd.trainer import UniSDTrainer


def demonstrated(count=4):
    return [
        {**row, "demonstration": tiny_run.words(9 * i + 2, 2 + i)} for i, row in enumerate(tiny_run.rows(count=count))
    ]


def cross_entropies(model, items):
    """Sum over the tokens of each demonstration, its EOS included, and their number."""
    sums, counts = [], []
    for item in items:
        prompt, reply = tokenized(item["prompt"]), [*tokenized(item["demonstration"]), EOS]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].double()
        picked = logits.log_softmax(-1).gather(1, torch.tensor(reply).unsqueeze(1))
        sums.append(-picked.sum().item())
        counts.append(len(reply))
    return sums, counts


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_sft_is_the_cross_entropy_of_the_demonstration(tmp_path, normalization, accumulation):
    model = tiny_run.llama()
    sums, counts = cross_entropies(model, demonstrated())
    expected = sum(sums) / sum(counts) if normalization == "token" else sum(map(lambda s, n: s / n, sums, counts)) / 4
    run = tiny_run.trainer(
        tmp_path,
        model,
        items=[{"prompt": row["prompt"], "demonstration": row["demonstration"]} for row in demonstrated()],
        cls=UniSDTrainer,
        preset="sft",
        normalization=normalization,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
    )
    run.train()
    assert tiny_run.losses(run)[0] == pytest.approx(expected, rel=1e-5)
    assert tiny_run.losses(run)[-1] < tiny_run.losses(run)[0]
    assert run.args.normalization == normalization


def test_sft_without_demonstrations_names_the_column(tmp_path):
    with pytest.raises(ValueError, match="column 'demonstration' is needed by the mechanisms of preset 'sft'"):
        tiny_run.trainer(tmp_path, preset="sft")


def test_sft_leaves_out_demonstrations_that_are_too_long(tmp_path):
    items = [{"prompt": "w5 w6", "demonstration": tiny_run.words(3 * i, 3)} for i in range(4)]
    items[2]["demonstration"] = tiny_run.words(0, 6)  # and its EOS
    run = tiny_run.trainer(tmp_path, items=items, cls=UniSDTrainer, preset="sft", per_device_train_batch_size=3)
    assert run.rows.reports["train_dataset"].overlong == {2: "more than max_completion_length=6"}
    run.train()
    with pytest.raises(ValueError, match=r"(?s)1 of 4 rows cannot be used.*max_completion_length=6"):
        tiny_run.trainer(tmp_path, items=items, cls=UniSDTrainer, preset="sft", overlong="error")


@pytest.mark.parametrize("preset", ["sdft", "gkd"])
def test_a_baseline_trains(tmp_path, preset):
    run = tiny_run.trainer(tmp_path, preset=preset, max_steps=4, learning_rate=0.5)
    run.train()
    losses = tiny_run.losses(run)
    assert losses[-1] < losses[0]
    assert run.teacher.mode == {"sdft": "full", "gkd": "base"}[preset]


def test_a_mask_leaves_out_what_was_cut_off_and_what_comes_first():
    ids = torch.tensor([[5, 6, EOS, 0], [5, 6, 7, 8], [EOS, 0, 0, 0], [0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert truncated(ids, mask, [EOS]).tolist() == [False, True, False, False]
    kept = loss_mask(ids, mask, end_ids=[EOS], mask_truncated=True, skip_first=1)
    assert kept.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert loss_mask(ids, mask, end_ids=[EOS, 8], mask_truncated=True, skip_first=0).equal(mask)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_the_loss_is_that_of_the_tokens_that_count(tmp_path, normalization):
    class CutOff(tiny_run.FixedRollouts):
        """The rollout of the second row has no end."""

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            second = tokenized(tiny_run.rows()[1]["prompt"])
            return [completion_of(ids)[: -1 if ids == second else None] for ids in prompt_ids]

    settings = {"cls": CutOff, "preset": "plain", "normalization": normalization, "skip_first_tokens": 1}
    run = tiny_run.trainer(tmp_path / "a", mask_truncated_completions=True, **settings)
    run.train()
    items = tiny_run.rows()
    keep = [
        [i != 1 and place >= 1 for place in range(len(completion_of(tokenized(row["prompt"]))))]
        for i, row in enumerate(items)
    ]
    inputs = tiny_run.reference_inputs(tiny_run.llama(), items, 0, False, keep=keep)
    from unisd_kernels import unisd_loss

    settings = {"temperature": 0.7, "normalization": normalization}
    expected = unisd_loss(**inputs.arguments(), **settings, impl="reference").loss.item()
    assert tiny_run.losses(run)[0] == pytest.approx(expected, rel=1e-5)
    assert tiny_run.logged(run, "unisd/masked_completions") == [1.0]


def test_the_most_entropic_share_is_rounded_up_and_in_order():
    entropies = torch.tensor([0.5, 2.0, 0.1, 2.0, 1.0])
    assert most_entropic(entropies, 0.41).tolist() == [1, 3, 4]
    assert most_entropic(entropies, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert most_entropic(entropies[:0], 0.5).tolist() == []


def test_two_evaluations_of_the_same_weights_are_equal(tmp_path):
    run = tiny_run.trainer(tmp_path, cls=UniSDTrainer, preset="plain")
    first, second = (run.evaluate(tiny_run.dataset())["eval_loss"] for _ in range(2))
    assert first == second
    assert run.generation_config.do_sample


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_the_most_entropic_tokens_alone_make_the_loss(tmp_path, normalization):
    from unisd_kernels import linear_logprobs, unisd_loss

    run = tiny_run.trainer(tmp_path, preset="plain", normalization=normalization, top_entropy_quantile=0.5)
    run.train()
    items, model = tiny_run.rows(), tiny_run.llama()
    whole = tiny_run.reference_inputs(model, items, 0, False)
    scores = linear_logprobs(
        whole.student_hidden,
        whole.student_head,
        whole.target_ids,
        temperature=0.7,
        return_entropy=True,
        impl="reference",
    )
    chosen = torch.zeros(whole.target_ids.numel(), dtype=torch.bool)
    chosen[scores.entropy.topk(-(-chosen.numel() // 2)).indices] = True
    keep = [part.tolist() for part in chosen.split(whole.cu_seqlens.diff().tolist())]
    inputs = tiny_run.reference_inputs(model, items, 0, False, keep=keep)
    expected = unisd_loss(**inputs.arguments(), temperature=0.7, normalization=normalization, impl="reference").loss
    share = chosen.sum() / (0.5 * chosen.numel()) if normalization == "token" else 1.0
    assert tiny_run.losses(run)[0] == pytest.approx((expected * share).item(), rel=1e-5)
    kept = chosen.sum().item() / chosen.numel()
    assert tiny_run.logged(run, "unisd/top_entropy_share") == [pytest.approx(kept, abs=1e-4)]


@pytest.mark.filterwarnings("ignore:unisd_loss got no rows")
def test_a_step_of_nothing_but_truncated_completions_changes_nothing(tmp_path):
    class Truncated(tiny_run.FixedRollouts):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            return [completion_of(ids)[:-1] for ids in prompt_ids]

    model = tiny_run.llama()
    settings = {"preset": "unisd_star", "ema": "none", "agreement_fraction": 0.5, "per_device_train_batch_size": 2}
    run = tiny_run.trainer(
        tmp_path, model, cls=Truncated, mask_truncated_completions=True, gradient_accumulation_steps=2, **settings
    )
    run.train()
    assert tiny_run.losses(run) == [0.0]
    assert tiny_run.logged(run, "unisd/masked_completions") == [4.0]
    for name, weight in tiny_run.llama().state_dict().items():
        assert model.state_dict()[name].equal(weight), name
