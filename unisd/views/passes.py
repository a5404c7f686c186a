"""One pass of a backbone over a tree of tokens."""

from __future__ import annotations

from typing import Any

import torch

from unisd.modules import backbone, model_device
from unisd.views.attention import KeyValues, Layout, UnsupportedModelError, tree_attention
from unisd.views.tree import PrefixTree


def tree_states(
    model: Any,
    tree: PrefixTree,
    cached: list[KeyValues] | None = None,
    captured: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[KeyValues]]:
    """Last hidden states [N, H] of the N tokens that a tree runs, in the order of their keys, and the keys and values
    of the tokens `captured` [C] in each layer.

    Args:
        model: PEFT or not, in eval mode.
        cached: of each layer, keys and values of the tree's cached tokens.

    Raises:
        UnsupportedModelError: a layer whose attention does not go through transformers' attention interface, or has
            something that a tree has no place for.
    """
    decoder, device = backbone(model), model_device(model)
    layout = Layout.of(tree, device, cached=cached or [], captured=None if captured is None else captured.to(device))
    with tree_attention(decoder, layout):
        hidden = decoder(
            input_ids=torch.tensor([tree.tokens], device=device),
            attention_mask=None,
            position_ids=tree.positions.unsqueeze(0).to(device),
            use_cache=False,
        ).last_hidden_state[0]
    layers = decoder.config.get_text_config().num_hidden_layers
    if layout.calls != layers:
        raise UnsupportedModelError(
            f"{layout.calls} of its {layers} layers go through transformers' attention interface"
        )
    return hidden, layout.kept
