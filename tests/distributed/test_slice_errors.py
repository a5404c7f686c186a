"""Mistakes with slices of a vocabulary: one message on every rank, and nobody left waiting."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.ranks import run
from unisd_kernels import LMHead, linear_divergence, linear_logprobs, unisd_loss
from unisd_kernels.certified.int8_head import Int8Head

HIDDEN, IDS = torch.randn(3, 4), torch.tensor([0, 5, 2])


def head_of(group, bounds, **settings) -> LMHead:
    start, end = bounds[group.rank()]
    return LMHead(torch.randn(end - start, 4), vocab_start=start, group=group, **settings)


def everywhere(ranks, function) -> str:
    """The message with which every rank ends."""

    def on(group):
        with pytest.raises((ValueError, TypeError)) as caught:
            function(group)
        return str(caught.value)

    messages, _ = run(ranks, on)
    assert len(set(messages)) == 1, messages
    return messages[0]


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ([(0, 3), (2, 6)], "overlap at column 2"),
        ([(0, 3), (4, 6)], "leave a gap at column 3"),
        ([(1, 3), (3, 6)], "must begin at column 0"),
        ([(0, 0), (3, 3)], "all empty"),
        ([(0, 3), (0, 3)], "overlap at column 0"),
    ],
)
def test_slices_that_do_not_tile_the_vocabulary(bounds, says):
    assert says in everywhere(2, lambda group: head_of(group, bounds))


def test_slices_in_any_order_tile_it():
    heads, _ = run(3, lambda group: head_of(group, [(4, 6), (0, 3), (3, 4)]))
    assert [head.num_columns for head in heads] == [6, 6, 6]
    assert [head.active_weight.shape[0] for head in heads] == [2, 3, 1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (lambda rank: {"softcap": 30.0 + rank}, r"softcap: [30.0, 31.0]"),
        (lambda rank: {"logit_scale": 1.0 + rank}, "logit_scale"),
        (lambda rank: {"vocab_size": 5 + rank}, "vocab_size"),
        (lambda rank: {"bias": torch.zeros(3)} if rank else {}, "biases"),
        (lambda rank: {"vocab_size": 7}, "between 1 and the 6 rows of all ranks' weights, got 7"),
    ],
)
def test_slices_of_different_heads(settings, says):
    message = everywhere(2, lambda group: head_of(group, [(0, 3), (3, 6)], **settings(group.rank())))
    assert says in message


def test_slices_of_different_widths_and_dtypes():
    assert "hidden sizes" in everywhere(
        2, lambda g: LMHead(torch.randn(3, 4 + g.rank()), vocab_start=3 * g.rank(), group=g)
    )
    dtypes = (torch.float32, torch.bfloat16)
    message = everywhere(2, lambda g: LMHead(torch.randn(3, 4).to(dtypes[g.rank()]), vocab_start=3 * g.rank(), group=g))
    assert "dtypes: ['torch.float32', 'torch.bfloat16']" in message


def test_half_of_the_arguments():
    with pytest.raises(ValueError, match="got vocab_start without group"):
        LMHead(torch.randn(3, 4), vocab_start=0)
    assert "got group without vocab_start" in everywhere(1, lambda g: LMHead(torch.randn(3, 4), group=g))
    assert "vocab_start must be >= 0, got -1" in everywhere(
        1, lambda g: LMHead(torch.randn(3, 4), vocab_start=-1, group=g)
    )
    assert "vocab_start must be an integer, got float" in everywhere(
        1, lambda g: LMHead(torch.randn(3, 4), vocab_start=0.0, group=g)
    )
    with pytest.raises(TypeError, match=r"must be a torch\.distributed process group, got str"):
        LMHead(torch.randn(3, 4), vocab_start=0, group="tp")


def test_ids_outside_the_whole_vocabulary():
    def score(group):
        linear_logprobs(HIDDEN, head_of(group, [(0, 3), (3, 6)]), torch.tensor([0, 6, 2]))

    assert r"target_ids must lie in [0, 6), got values from 0 to 6" in everywhere(2, score)


def test_student_and_teacher_in_different_slices():
    def different(group):
        student, teacher = (head_of(group, bounds) for bounds in ([(0, 3), (3, 6)], [(0, 2), (2, 6)]))
        linear_divergence(HIDDEN, student, HIDDEN, teacher)

    assert "sliced differently over the ranks" in everywhere(2, different)

    def one_whole(group):
        linear_divergence(HIDDEN, head_of(group, [(0, 3), (3, 6)]), HIDDEN, LMHead(torch.randn(6, 4)))

    assert "student_head is a slice of its vocabulary (vocabulary-parallel) but teacher_head is a whole" in everywhere(
        2, one_whole
    )


def test_what_takes_no_slices_says_so():
    def dense(group):
        linear_logprobs(HIDDEN, head_of(group, [(0, 3), (3, 6)]), IDS, impl="reference")

    assert "the dense reference (impl='reference') is of one process" in everywhere(2, dense)

    def certified(group):
        Int8Head.of(head_of(group, [(0, 3), (3, 6)]), HIDDEN)

    assert "int8 products is of one process" in everywhere(2, certified)


@pytest.mark.exhaustive
def test_a_compiled_function_breaks_its_graph():
    """A process group has no place in an operator's schema: the call runs eagerly, and a whole graph cannot be had."""
    torch._dynamo.reset()

    def compiled(group):
        head, cu_seqlens = head_of(group, [(0, 6)]), torch.tensor([0, 3])

        def loss(hidden):
            return unisd_loss(hidden, head, HIDDEN, head, IDS, cu_seqlens).loss * 2.0

        found = torch.compile(loss, backend="eager")(HIDDEN + 1.0)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"disable"):
            torch.compile(loss, backend="eager", fullgraph=True)(HIDDEN + 1.0)
        return torch.equal(found, loss(HIDDEN + 1.0))

    assert run(1, compiled)[0] == [True]
