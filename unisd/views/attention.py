"""Attention over a tree of tokens, as an attention function of transformers.

The linear layers of a model see the tree's tokens as one row without padding. Only the attention needs to know the
tree: each segment's queries attend to the segment's own tokens, causally, and to all tokens on its path. Segments of
similar size are stacked, and go through `scaled_dot_product_attention` with a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from unisd.views.tree import PrefixTree, Segment

NAME = "unisd_tree"
"""Name of the attention function among those of transformers."""
MAX_WASTE = 1.5
"""Stacked segments may cost this much more attention than they need."""
_UNKNOWN = ("softcap", "s_aux", "sinks", "head_mask", "position_bias")

KeyValues = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each [tokens, key-value heads, head size]."""


class UnsupportedModelError(ValueError):
    """A model whose attention is none that a tree of tokens can go through."""


@dataclass(frozen=True)
class _Stack:
    """S segments as one call: queries [S, n], keys [S, m], mask [S, 1, n, m]; `rows` are the places of its valid
    queries among S * n."""

    queries: torch.Tensor
    keys: torch.Tensor
    distance: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor

    def to(self, device: torch.device) -> _Stack:
        return _Stack(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass
class Layout:
    """What the attention of one pass needs.

    Attributes:
        stacks: the segments of the tree.
        order: [N] where each of the tree's tokens is among the valid queries of all stacks.
        cached: of each layer, keys and values of the tokens that are not run.
        captured: [C] keys of tokens whose keys and values are to be kept, or None; `kept` then holds those of each
            layer.
        calls: layers that came through.
    """

    stacks: list[_Stack]
    order: torch.Tensor
    cached: list[KeyValues] = field(default_factory=list)
    captured: torch.Tensor | None = None
    kept: list[KeyValues] = field(default_factory=list)
    calls: int = 0

    @classmethod
    def of(cls, tree: PrefixTree, device: torch.device, **options: Any) -> Layout:
        """The layout of a tree, on the device of the model's input."""
        stacks = [_stack(tree, group).to(device) for group in _groups(tree.segments)]
        run = torch.cat([stack.queries.flatten()[stack.rows] for stack in stacks])
        order = torch.empty_like(run)
        order[run] = torch.arange(run.numel(), device=device)
        return cls(stacks, order, **options)


def _groups(segments: list[Segment]) -> Iterator[list[Segment]]:
    """Segments of similar size together."""
    group: list[Segment] = []
    area = longest = widest = 0
    for segment in sorted(segments, key=lambda each: (each.depth + each.length, each.length)):
        own = segment.length * (segment.depth + segment.length)
        n, m = max(longest, segment.length), max(widest, segment.depth + segment.length)
        if group and n * m * (len(group) + 1) > MAX_WASTE * (area + own):
            yield group
            group, area, n, m = [], 0, segment.length, segment.depth + segment.length
        group.append(segment)
        area, longest, widest = area + own, n, m
    if group:
        yield group


def _stack(tree: PrefixTree, group: list[Segment]) -> _Stack:
    size, n = len(group), max(each.length for each in group)
    m = max(each.depth + each.length for each in group)
    queries, keys = torch.zeros(size, n, dtype=torch.long), torch.zeros(size, m, dtype=torch.long)
    # A padded query sees its segment's first key: a row without any would be NaN.
    positions = torch.zeros(size, n, dtype=torch.long)
    valid = torch.zeros(size, n, dtype=torch.bool)
    for place, each in enumerate(group):
        first = each.start - tree.num_cached
        queries[place, : each.length] = torch.arange(first, first + each.length)
        keys[place, : each.depth + each.length] = each.keys
        positions[place, : each.length] = torch.arange(each.depth, each.depth + each.length)
        valid[place, : each.length] = True
    distance = positions.unsqueeze(-1) - torch.arange(m)
    return _Stack(
        queries, keys, distance.unsqueeze(1), (distance >= 0).unsqueeze(1), valid.flatten().nonzero().flatten()
    )


_layout: Layout | None = None


def _tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Output [1, N, heads, head size] of one layer; `query` and `key` are [1, heads, N, head size], as transformers
    hands them to an attention function."""
    layout = _layout
    if layout is None:
        raise RuntimeError(f"the attention {NAME!r} is for the passes of unisd.views only")
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"its attention has {', '.join(unknown) or 'a mask or dropout'}")
    if sliding_window is None and getattr(module, "layer_type", "") == "sliding_attention":
        raise UnsupportedModelError("a sliding layer does not hand its window to the attention")
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))  # [N, heads, head size]
    layer, layout.calls = layout.calls, layout.calls + 1
    if layout.cached:
        k, v = torch.cat([layout.cached[layer][0], k]), torch.cat([layout.cached[layer][1], v])
    if layout.captured is not None:
        layout.kept.append((k.index_select(0, layout.captured), v.index_select(0, layout.captured)))
    outputs = []
    for stack in layout.stacks:
        queries, keys, values = _stacked(q, stack.queries), _stacked(k, stack.keys), _stacked(v, stack.keys)
        mask = stack.mask if sliding_window is None else stack.mask & (stack.distance < sliding_window)
        output = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1).index_select(0, stack.rows))
    return torch.cat(outputs).index_select(0, layout.order).unsqueeze(0), None


def _stacked(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[N, heads, head size] to [S, heads, n, head size], by places [S, n]."""
    return states.index_select(0, places.flatten()).view(*places.shape, *states.shape[1:]).transpose(1, 2)


AttentionInterface.register(NAME, _tree_attention)


@contextmanager
def tree_attention(decoder: nn.Module, layout: Layout) -> Iterator[None]:
    """Let every layer of a backbone attend by `layout`, meanwhile."""
    global _layout
    modules: list[Any] = [module for module in decoder.modules() if hasattr(module, "config")]
    configs = {id(module.config): module.config for module in modules}.values()
    before = [(config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        _layout = layout
        yield
    finally:
        _layout = None
        for config, implementation in before:
            config._attn_implementation = implementation
