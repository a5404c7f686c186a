"""Hidden states of a micro-batch's completions under several of its views.

Padded: a pass a view, [B, L]. Packed: all rows of all views in one row of tokens without padding. Prefix: the same,
and what rows share from their beginning is run once and, between two updates of the weights, once for all micro-batches
(`unisd.views.cache`). All three give the same states but for rounding.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unisd.batch import CompletionRows
from unisd.modules import HiddenStates, backbone, model_device
from unisd.views.attention import KeyValues, UnsupportedModelError
from unisd.views.cache import PrefixCache
from unisd.views.passes import tree_states
from unisd.views.tree import Ids, PrefixTree

VIEW_PASSES = ("auto", "padded", "packed", "prefix")
MAX_TOKENS = 16384
"""Tokens of one packed pass; more rows make more passes."""

View = tuple[str, int | None]
"""Name of a view ("teacher_prompt", ...), and which one if there are several."""

logger = logging.getLogger(__name__)


@dataclass
class ViewScorer:
    """Way from views to packed hidden states.

    Attributes:
        passes: one of `VIEW_PASSES`; "auto" becomes "prefix" or "padded" at the first use, with `reason`.
        hidden_states: a padded pass.
        cache: of prefixes.
        padded_because: why passes have to be padded whatever the model, or None.
    """

    passes: str
    hidden_states: HiddenStates
    cache: PrefixCache
    padded_because: str | None = None
    reason: str = ""
    max_tokens: int = MAX_TOKENS

    def __call__(
        self, model: Any, batch: dict[str, Any], rows: CompletionRows, views: Sequence[View], version: Hashable
    ) -> list[torch.Tensor]:
        """[N, H] hidden states that predict the batch's N counted completion tokens, under each view.

        Args:
            model: what scores; inside `Teacher.scoring`.
            batch: ids and masks, cropped.
            rows: the counted tokens.
            views: which.
            version: equal for two calls only if the weights are.
        """
        if not views:
            return []
        if self.reason == "":
            self._decide(model)
        if self.passes == "padded":
            return [rows.take(padded_view(self.hidden_states, model, batch, view)) for view in views]
        return self._packed(model, batch, rows, views, version)

    def _decide(self, model: Any) -> None:
        """Settle on the kind of passes, once."""
        reason = self.padded_because
        if reason is None and self.passes != "padded":
            try:
                _compare(model, self.hidden_states)
            except UnsupportedModelError as error:
                reason = f"{type(backbone(model)).__name__} cannot be run on packed rows: {error}"
        if self.passes in ("packed", "prefix") and reason is not None:
            raise ValueError(f"view_passes={self.passes!r}, but {reason}; set view_passes='padded' or 'auto'")
        if self.passes == "auto":
            self.passes = "prefix" if reason is None else "padded"
            self.reason = reason or "its packed states agree with its padded ones"
            if reason is not None and self.padded_because is None:
                warnings.warn(f"the views are scored in padded passes, one a view: {reason}", stacklevel=4)
            logger.info("view_passes='auto' is %r: %s", self.passes, self.reason)
        self.reason = self.reason or "as set"

    def _packed(
        self, model: Any, batch: dict[str, Any], rows: CompletionRows, views: Sequence[View], version: Hashable
    ) -> list[torch.Tensor]:
        contexts, completions = view_contexts(batch, views), unpadded(batch["completion_ids"], batch["completion_mask"])
        size, share = len(completions), self.passes == "prefix"
        # The state after the last token predicts nothing; an empty completion needs no pass.
        items = [context + completions[place % size][:-1] for place, context in enumerate(contexts)]
        used = [place for place in range(len(items)) if completions[place % size]]
        states: dict[int, torch.Tensor] = {}
        if share:
            self.cache.begin(version)
            self.cache.observe([contexts[place] for place in used])
        for places in _passes([items[place] for place in used], used, self.max_tokens):
            found = self._run(model, [contexts[place] for place in places], [items[place] for place in places], share)
            states.update(zip(places, found, strict=True))
        # Positions of the counted tokens among those of all completions.
        width = batch["completion_ids"].shape[1]
        sequence, token = rows.positions // width, rows.positions % width
        lengths = torch.tensor([len(each) for each in completions], device=sequence.device)
        counted = (lengths.cumsum(0) - lengths)[sequence] + token
        out = []
        for view in range(len(views)):
            parts = [states[view * size + place] for place in range(size) if completions[place]]
            if not parts:
                hidden = backbone(model).get_input_embeddings().weight
                out.append(hidden.new_zeros(0, hidden.shape[1]).to(rows.ids.device))
                continue
            hidden = torch.cat(parts)
            out.append(hidden.index_select(0, counted.to(hidden.device)).to(rows.ids.device))
        return out

    def _run(self, model: Any, contexts: list[Ids], items: list[Ids], share: bool) -> Iterator[torch.Tensor]:
        """States of each item from the last token of its context, with which it begins, on."""
        prefixes, of_row = self.cache.match(contexts) if share else ([], [None] * len(items))
        missing = self.cache.missing(contexts) if share else {}
        tree = PrefixTree.of(items, prefixes, of_row, share=share)
        captured = [tree.paths[place][: len(prefix)] for prefix, place in missing.items()]
        hidden, kept = tree_states(
            model, tree, self.cache.get(prefixes) if prefixes else None, torch.cat(captured) if captured else None
        )
        start = 0
        for prefix in missing:
            stop = start + len(prefix)
            self.cache.put(prefix, [_copied(layer, start, stop, len(missing) > 1) for layer in kept])
            start = stop
        for context, path in zip(contexts, tree.paths, strict=True):
            # A cached prefix is shorter than the context, so these tokens have been run.
            yield hidden.index_select(0, (path[len(context) - 1 :] - tree.num_cached).to(hidden.device))


def view_scorer(
    args: Any, hidden_states: HiddenStates, *, is_sharded: bool, pads: bool, takes_positions: bool
) -> ViewScorer:
    """The scorer of a run.

    Args:
        args: the `UniSDConfig`.
        hidden_states: a padded pass.
        is_sharded: whether a pass is a collective.
        pads: whether batches keep their padding.
        takes_positions: whether the backbone takes `position_ids`.
    """
    reason = None
    if is_sharded:
        reason = "weights are sharded, where every process has to make the same passes"
    elif pads:
        reason = "pad_to_multiple_of asks for padding"
    elif not takes_positions:
        reason = "the model takes no position_ids"
    return ViewScorer(args.view_passes, hidden_states, PrefixCache(args.view_cache_bytes), reason)


def padded_view(hidden_states: HiddenStates, model: Any, batch: dict[str, Any], view: View) -> torch.Tensor:
    """[B, T, H] hidden states of the completions under one view, in a padded pass."""
    ids, mask = _columns(batch, view)
    completion_ids, completion_mask = batch["completion_ids"], batch["completion_mask"]
    return hidden_states(
        model,
        torch.cat([ids, completion_ids], dim=1),
        torch.cat([mask, completion_mask], dim=1),
        completion_ids.shape[1],
    )


def _columns(batch: dict[str, Any], view: View) -> tuple[torch.Tensor, torch.Tensor]:
    name, k = view
    ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]  # [B, L], or [B, K, L]
    return (ids, mask) if k is None else (ids[:, k], mask[:, k])


def view_contexts(batch: dict[str, Any], views: Sequence[View]) -> list[Ids]:
    """The contexts of all rows under the first view, then under the second, ..."""
    return [ids for view in views for ids in unpadded(*_columns(batch, view))]


def unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[Ids]:
    """The rows of ids [B, L] without padding."""
    pairs = zip(ids.tolist(), mask.tolist(), strict=True)
    return [tuple(token for token, used in zip(row, kept, strict=True) if used) for row, kept in pairs]


def _passes(items: list[Ids], places: list[int], max_tokens: int) -> Iterator[list[int]]:
    """The places in passes of at most about `max_tokens` tokens; rows that begin alike stay together."""
    order = sorted(range(len(items)), key=lambda each: items[each])
    group: list[int] = []
    total = 0
    for each in order:
        if group and total + len(items[each]) > max_tokens:
            yield group
            group, total = [], 0
        group.append(places[each])
        total += len(items[each])
    if group:
        yield group


def _copied(layer: KeyValues, start: int, stop: int, is_part: bool) -> KeyValues:
    """One prefix of what was captured; a part is copied, or it would keep the whole alive."""
    k, v = (each[start:stop] for each in layer)
    return (k.clone(), v.clone()) if is_part else (k, v)


def _compare(model: Any, hidden_states: HiddenStates) -> None:
    """Verify on a few tokens that packed rows give a model's states.

    Raises:
        UnsupportedModelError: they do not, or cannot be run.
    """
    device, vocabulary = model_device(model), model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (3, 40), generator=generator)
    ids[1, :24] = ids[0, :24]
    items = [tuple(row) for row in ids.tolist()]
    prefix = items[0][:20]
    of_row = [0, 0, None]
    kept_tree = PrefixTree.of([prefix])
    _, kept = tree_states(model, kept_tree, captured=kept_tree.paths[0])
    tree = PrefixTree.of(items, [prefix], of_row)
    packed, _ = tree_states(model, tree, cached=kept)
    expected = hidden_states(model, ids.to(device), torch.ones_like(ids, device=device), 10)  # before the last ten
    actual = torch.stack([packed[(path[29:39] - tree.num_cached).to(packed.device)] for path in tree.paths])
    error = (actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6)
    exact = expected.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    bound = 1e-3 if exact or expected.dtype == torch.float64 else 0.1
    if not error <= bound:
        raise UnsupportedModelError(f"its packed states are {error:.1e} away from its padded ones")
