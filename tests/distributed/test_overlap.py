"""The hidden gradient of a sliced head is on its way, some rows at a time, while the next rows are multiplied."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed.ranks import Rank, run
from tests.distributed.slices import EVERYTHING, V, joined, limits, loss_of, sliced, whole_problem
from tests.distributed.test_slices import assert_same
from tests.support import make_problem
from unisd_kernels import linear_divergence, linear_logprobs, unisd_loss
from unisd_kernels.backends import hidden_sum
from unisd_kernels.backends.projection import Projection

WIDTH, COLUMNS, ROWS = 16, 64, 12
# Bytes of a row of a chunk: of two views of 32 columns in float64, or of one.
PAIR_ROW, ROW = 2 * 32 * 8, 32 * 8


@contextmanager
def small_messages(rows: int, width: int = WIDTH, itemsize: int = 8):
    with mock.patch.object(hidden_sum, "MESSAGE_BYTES", rows * width * itemsize):
        yield


@contextmanager
def recorded_products():
    """With each product among the events of its rank, which is the group of its slice."""

    def recording(name: str) -> Any:
        function = getattr(Projection, name)

        def call(self: Projection, *args: Any) -> None:
            self.shard.group.events.append(name)
            function(self, *args)

        return call

    with ExitStack() as stack:
        for name in ("logits", "hidden_gradient", "add_weight_gradient"):
            stack.enter_context(mock.patch.object(Projection, name, recording(name)))
        yield


SHORT = {
    "logits": "z",
    "hidden_gradient": "h",
    "add_weight_gradient": "w",
    "maximum": "m",
    "sum": "s",
    "started sum": "S",
    "wait": ".",
}


def events_of(function, message_rows: int, bounds=None, frozen: bool = True) -> str:
    """What a rank does in which order, a letter each: products of logits z, of hidden h and weight gradients w,
    messages of statistics m and s, sums of the hidden gradient that begin S and are waited for `.`."""
    problem = make_problem(lengths=(ROWS,), hidden_size=WIDTH, vocab_size=COLUMNS, shared_head=True, frozen_head=frozen)
    bounds = bounds or limits(COLUMNS, 2)

    def on(group: Rank) -> str:
        own = sliced(problem, group.rank(), group, bounds)
        group.events.clear()
        function(own)
        return "".join(SHORT[event] for event in group.events)

    with small_messages(message_rows), recorded_products():
        found, _ = run(2, on)
    sent = [[event for event in events if event in "msS."] for events in found]
    assert sent[0] == sent[1]
    return found[0]


def divergence(own, **options) -> torch.Tensor:
    heads = (own.student_head, own.teacher_head)
    return linear_divergence(own.student_hidden, heads[0], own.teacher_hidden, heads[1], impl="torch", **options)


def test_rows_are_on_their_way_while_the_next_are_multiplied():
    """Chunks of four rows and messages of as many: each begins before the next chunk's products, all end at the end."""
    forward = events_of(lambda own: divergence(own, workspace_bytes=4 * PAIR_ROW), 4)
    assert forward == "zzmshS" * 3 + "..."


def test_a_large_chunk_is_multiplied_and_sent_in_pieces():
    assert events_of(divergence, 4) == "zzms" + "hS" * 3 + "..."


def test_small_chunks_are_sent_together():
    """Five messages of two to three rows do not become twelve."""
    forward = events_of(lambda own: divergence(own, workspace_bytes=PAIR_ROW), 5)
    assert forward == "zzmsh" * 4 + "zzmshS" + "zzmsh" * 4 + "zzmshS" + "zzmsh" + "zzmshS" + "..."


def test_a_slice_without_a_column_sends_in_the_same_order():
    found = events_of(lambda own: divergence(own, workspace_bytes=4 * 2 * COLUMNS * 8), 4, [0, COLUMNS, COLUMNS])
    assert found == "zzmshS" * 3 + "..."


def test_the_weights_gradient_is_made_meanwhile():
    """A trainable head: forward without a gradient, then the walk of the backward."""

    def both(own):
        divergence(own, workspace_bytes=6 * PAIR_ROW).sum().backward()

    assert events_of(both, 6, frozen=False) == "zzms" * 2 + "zzmshSw" * 2 + ".."


def test_log_probabilities():
    """A frozen head's rows are scaled in the backward and sent meanwhile; a trainable one's are made there."""

    def scored(own):
        found = linear_logprobs(
            own.student_hidden, own.student_head, own.target_ids, impl="torch", workspace_bytes=4 * ROW
        )
        (found.logprobs.sum() + found.logsumexp.sum()).backward()

    assert events_of(scored, 4) == "zh" * 3 + "ms" + "SSS..."
    assert events_of(scored, 4, frozen=False).endswith("ms" + "zhSw" * 3 + "...")
    # A slice without a column walks no chunk in the backward, but sends as many rows.
    bounds = [0, COLUMNS, COLUMNS]
    assert events_of(scored, 4, bounds, frozen=False).endswith("zhSw" + "...")


def test_without_a_gradient_nothing_of_it_is_sent():
    def quiet(own):
        with torch.no_grad():
            divergence(own)
        divergence(type(own)(**own.arguments() | {"student_hidden": own.student_hidden.detach()}))

    assert "S" not in events_of(quiet, 4)

    def weight_only(own):
        detached = type(own)(**own.arguments() | {"student_hidden": own.student_hidden.detach()})
        divergence(detached).sum().backward()
        assert own.student_head.weight.grad is not None

    assert "S" not in events_of(weight_only, 4, frozen=False)

    def features_only(own):
        arguments = {**own.arguments(), "token_weights": None}
        result = unisd_loss(
            **arguments, divergence_weight=0.0, contrastive_weight=0.0, feature_weight=1.0, return_statistics=False
        )
        result.loss.backward()

    assert events_of(features_only, 4) == ""


CASES: dict[str, dict[str, Any]] = {
    "JSD, quantile": {"beta": 0.5, "clip_quantile": 0.6},
    "KL, cap": {"beta": 0.0, "clip_cap": 0.4},
    "reverse KL": {"beta": 1.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_messages_of_any_size_give_one_processs_numbers(case, frozen, rows):
    """To 1e-12 in float64, with every mechanism, weights of zero among the rows, over one and over many chunks."""
    problem = whole_problem(frozen_head=frozen, shared_head=frozen)
    problem.token_weights[[0, 5, 6, 29]] = 0.0
    for workspace in (None, 11 * 2 * 505 * 8):
        options = {**EVERYTHING, **CASES[case], "impl": "torch", "workspace_bytes": workspace}
        wanted = loss_of(problem, **options)
        for bounds in (limits(V, 2), [0, 0, 505, V]):

            def on(group, bounds=bounds, options=options):
                found = loss_of(sliced(problem, group.rank(), group, bounds), **options)
                return found, group.messages

            with small_messages(rows):
                parts, ranks = run(len(bounds) - 1, on)
            assert_same(joined([part for part, _ in parts]), wanted, 1e-12)
            started = [message.shape for message in ranks[0].messages if message.kind == "started sum"]
            assert len(started) == -(-problem.num_rows // rows)
            assert sum(shape[0] for shape in started) == problem.num_rows
            assert {shape[1] for shape in started} == {16}


def test_messages_are_of_rows_that_all_ranks_choose_alike():
    """N, the width and the dtype say how many rows: whole tiles, at most 16 MiB."""
    for num_rows, width, rows in ((8192, 4096, 1024), (8192, 2560, 1408), (300, 64, 300), (0, 64, 0)):
        total = hidden_sum.HiddenSum(object(), torch.empty(num_rows, width, device="meta"))  # type: ignore[arg-type]
        cut = list(total._unsent)
        assert [each.start for each in cut] == [0, *(each.stop for each in cut)][:-1] if cut else num_rows == 0
        assert all(before.stop == after.start for before, after in pairwise(cut))
        assert max((each.stop - each.start for each in cut), default=0) == rows
        assert not cut or cut[-1].stop == num_rows


def test_an_error_within_the_walk_is_raised_and_the_ranks_go_on():
    """Messages that have begun are left to themselves: to wait for them could be to wait for a rank that raised."""
    problem = make_problem(lengths=(ROWS,), hidden_size=WIDTH, vocab_size=COLUMNS, shared_head=True, frozen_head=True)
    failing = mock.patch.object(
        Projection, "hidden_gradient", side_effect=[None, None, RuntimeError("no more"), RuntimeError("no more")]
    )

    def on(group: Rank) -> torch.Tensor:
        own = sliced(problem, group.rank(), group, limits(COLUMNS, 2))
        group.events.clear()
        with pytest.raises(RuntimeError, match="no more"):
            divergence(own, workspace_bytes=4 * PAIR_ROW)
        assert group.events.count("started sum") == 1
        assert "wait" not in group.events
        return own

    with small_messages(4), failing:
        run(2, on)


def test_waits_come_after_all_messages_of_a_real_loss():
    """The whole loss in the C++ or PyTorch backend: each message begins in the walk, none is waited for in it."""
    problem = whole_problem(torch.float32, shared_head=True, frozen_head=True).to(torch.float32)

    def on(group: Rank) -> list[str]:
        own = sliced(problem, group.rank(), group, limits(V, 2))
        group.events.clear()
        loss_of(own, **EVERYTHING, workspace_bytes=8 * 2 * 505 * 4)
        return group.events

    with small_messages(8, itemsize=4):
        found, _ = run(2, on)
    events = found[0]
    assert events == found[1]
    started = [place for place, event in enumerate(events) if event == "started sum"]
    assert len(started) == events.count("wait") == 4
    assert events.index("wait") > started[-1]
    # Statistics of later rows are exchanged between the first message and the last.
    assert "maximum" in events[started[0] : started[-1]]
