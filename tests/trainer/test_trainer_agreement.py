"""Selective agreement: which sequences are scored, what the others weigh, what it costs."""

from itertools import pairwise

import pytest
import torch

from tests.trainer import tiny_run
from unisd.agreement import scored_count
from unisd_kernels import agreement_weights, linear_logprobs, reference

PRESETS = ["agreement_token", "agreement_sequence", "unisd_star"]


def step(tmp_path, fraction, preset, model=None, **overrides):
    gradients = tiny_run.Gradients()
    run = tiny_run.trainer(
        tmp_path, model, preset=preset, agreement_gamma=2.0, agreement_fraction=fraction, **overrides
    )
    run.add_callback(gradients)
    run.train()
    return run, tiny_run.losses(run)[0], gradients.steps[0]


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("preset", PRESETS)
def test_all_sequences_equal_full_agreement(tmp_path, preset, normalization):
    """0.99 of 4 sequences are 4, so the selective path must give what the plain one does."""
    _, loss, gradients = step(tmp_path, 1.0, preset, normalization=normalization)
    run, selective_loss, selective = step(tmp_path, 0.99, preset, normalization=normalization)
    assert selective_loss == pytest.approx(loss, rel=1e-5)
    tiny_run.assert_same_gradients(selective, gradients)
    assert tiny_run.logged(run, "unisd/auxiliary_share") == [1.0]


@pytest.mark.parametrize(("preset", "micro_batch"), [("unisd_star", 1), ("agreement_token", 2)])
def test_the_ranking_is_over_the_step_whatever_the_micro_batch(tmp_path, preset, micro_batch):
    """The same sequences are scored, with the same gradient, however a step is cut into micro-batches."""
    args = tiny_run.config(tmp_path, preset=preset, agreement_gamma=2.0)
    expected_loss, expected, *_ = selective_reference(tiny_run.llama(), args, 1)
    run, loss, gradients = step(
        tmp_path,
        0.25,
        preset,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=tiny_run.NUM_ROWS // micro_batch,
    )
    assert tiny_run.logged(run, "unisd/auxiliary_share") == [0.25]
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    tiny_run.assert_same_gradients(gradients, expected)


@pytest.mark.parametrize(("fraction", "size"), [(0.25, 1), (0.25, 2), (0.3, 4), (0.9, 3), (1 / 3, 2), (0.01, 16)])
def test_the_share_over_all_windows_is_what_was_asked_for(fraction, size):
    total = 0
    for window in range(200):
        count = scored_count(fraction, size, window)
        assert 0 <= count <= size
        assert abs(count - fraction * size) < 1
        total += count
        assert abs(total - fraction * size * (window + 1)) < 1
    assert scored_count(fraction, size, 0) >= 1


def test_a_window_of_one_sequence_is_scored_in_its_share_of_the_steps(tmp_path):
    run, *_ = step(tmp_path, 0.25, "unisd_star", per_device_train_batch_size=1, max_steps=8)
    assert tiny_run.logged(run, "unisd/auxiliary_share") == [1, 0, 0, 0, 1, 0, 0, 0]


def selective_reference(model, args, count):
    """(loss, gradients, chosen rows) where only the `count` most uncertain rows are weighted."""
    items = tiny_run.rows()
    inputs = tiny_run.reference_inputs(model, items, args.num_auxiliary, args.uses_contrastive)
    bounds = inputs.cu_seqlens.tolist()
    spans = [slice(a, b) for a, b in pairwise(bounds)]
    entropy = linear_logprobs(
        inputs.teacher_hidden,
        inputs.teacher_head,
        inputs.target_ids,
        temperature=args.temperature,
        return_entropy=True,
        impl="reference",
    ).entropy
    uncertainty = torch.stack([entropy[span].mean() for span in spans])
    chosen = sorted(uncertainty.argsort(descending=True)[:count].tolist())
    lengths = torch.tensor([0, *(spans[b].stop - spans[b].start for b in chosen)])
    rows = torch.cat([torch.arange(spans[b].start, spans[b].stop) for b in chosen])
    logprobs = torch.stack(
        [
            linear_logprobs(view[rows], inputs.teacher_head, inputs.target_ids[rows], impl="reference").logprobs
            for view in inputs.auxiliary_hidden
        ]
    )
    agreement = agreement_weights(logprobs, lengths.cumsum(0).int(), level=args.agreement, gamma=args.agreement_gamma)
    weights = torch.ones(bounds[-1])
    weights[rows] = agreement.weights
    assert (weights[rows] < 1).any()
    fields = {**inputs.__dict__, "auxiliary_hidden": (), "token_weights": weights}
    loss = reference.unisd_loss(type(inputs)(**fields), tiny_run.reference_spec(args)).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, chosen, weights


@pytest.mark.parametrize(
    ("preset", "fraction", "count"),
    [
        *((preset, 0.5, 2) for preset in PRESETS),
        ("agreement_token", 0.26, 2),
        ("agreement_token", 0.25, 1),
        ("agreement_token", 0.01, 1),
    ],
)
def test_only_the_uncertain_sequences_are_weighted(tmp_path, preset, fraction, count):
    args = tiny_run.config(tmp_path, preset=preset, agreement_gamma=2.0, agreement_fraction=fraction)
    expected_loss, expected, _, weights = selective_reference(tiny_run.llama(), args, count)
    run, loss, gradients = step(tmp_path, fraction, preset)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    tiny_run.assert_same_gradients(gradients, expected)
    assert tiny_run.logged(run, "unisd/agreement_weight") == [pytest.approx(float(weights.mean()), rel=1e-5)]
    assert tiny_run.logged(run, "unisd/auxiliary_share") == [count / tiny_run.NUM_ROWS]
    full = step(tmp_path, 1.0, preset)[1]
    assert abs(full - loss) > 1e-4  # the selection matters here


@pytest.mark.parametrize(("fraction", "scored"), [(1.0, 4), (0.5, 2)])
def test_the_other_sequences_are_not_read_again(tmp_path, fraction, scored):
    model = tiny_run.llama()
    rows_read = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows_read.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    step(tmp_path, fraction, "unisd_star", model, view_passes="padded")
    # At construction the head is checked, with a row or two at a time. Then teacher and negative, the K auxiliary
    # contexts, and the student.
    assert sorted(rows_read)[-6:] == sorted([4, 4, *[scored] * 3, 4])
    assert all(count == 1 for count in sorted(rows_read)[:-6])
