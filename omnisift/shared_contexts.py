"""Contexts read once, and branches side by side behind them that share their keys and values.

All questions about a video are one row of the LLM's batch: a token sees the context and what stands
before it in its own branch, and nothing of the others. So a context's keys and values are
computed once, lie in memory once and are read once a step, whatever the number of its questions.

Shapes: C contexts, L tokens of the longest, B branches, N of them behind one context at most, S
tokens of the longest branch, K keys so far, D width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from omnisift.backbone import Backbone


class Branch(NamedTuple):
    """Tokens behind a context."""

    context: int  # which one
    embeds: Tensor  # [S, D]
    positions: Tensor  # [3, S]


class SharedContexts:
    """The keys and values of C contexts, and of what is read behind them."""

    def __init__(self, backbone: Backbone, contexts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Read contexts: embeddings [L, D] and positions [3, L] each.

        Those of one length are read together and no padding is computed; it only stands in front
        of the shorter ones' keys behind it.
        """
        self._backbone = backbone
        self._cache = self._read_contexts(contexts)
        lengths = torch.tensor([len(embeds) for embeds, _ in contexts])
        self._length = int(lengths.max())
        columns = torch.arange(self._length)
        self._context_seen = (columns >= self._length - lengths[:, None]).to(backbone.device)

    def _read_contexts(self, contexts: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
        config = self._backbone.model.config.text_config
        by_length: dict[int, list[int]] = {}
        for row, (embeds, _) in enumerate(contexts):
            by_length.setdefault(len(embeds), []).append(row)
        read = []
        for rows in by_length.values():
            cache = DynamicCache(config=config)
            embeds = torch.stack([contexts[row][0] for row in rows])
            positions = torch.stack([contexts[row][1] for row in rows], dim=1)
            self._backbone.forward_text(embeds, None, positions.to(embeds.device), cache)
            read.append(cache)
        if len(read) == 1:
            return read[0]
        longest = max(by_length)
        order = torch.tensor([row for rows in by_length.values() for row in rows])
        joined = DynamicCache(config=config)
        for index in range(config.num_hidden_layers):
            layers: list[Any] = [cache.layers[index] for cache in read]
            keys, values = (
                torch.cat([_padded(getattr(layer, name), longest) for layer in layers])
                for name in ("keys", "values")
            )
            joined.update(keys, values, index)
            for layer in layers:  # so that a layer is there twice, and not the whole
                layer.keys = layer.values = None
        joined.batch_select_indices(order.argsort().to(self._backbone.device))
        return joined

    def read(self, branches: Sequence[Branch]) -> Tensor:
        """Read branches behind their contexts; return their last states [B, S, D].

        They end together: shorter ones are padded on the left. What was read before is forgotten.
        """
        self._cache.crop(self._length - self._cache.get_seq_length())
        device, width = self._backbone.device, self._backbone.width
        # Each branch has a place beside its context's others; a place may stay empty.
        taken = [0] * len(self._context_seen)
        places = []
        for branch in branches:
            places.append((branch.context, taken[branch.context]))
            taken[branch.context] += 1
        most, longest = max(taken), max(len(branch.embeds) for branch in branches)
        shape = (len(taken), most, longest)
        embeds_CNSD = torch.zeros(*shape, width, device=device, dtype=self._backbone.dtype)
        positions_3CNS = torch.zeros((3, *shape), dtype=torch.long)
        real_CNS = torch.zeros(shape, dtype=torch.bool)
        for branch, (row, place) in zip(branches, places, strict=True):
            start = longest - len(branch.embeds)
            embeds_CNSD[row, place, start:] = branch.embeds
            positions_3CNS[:, row, place, start:] = branch.positions
            real_CNS[row, place, start:] = True
        of_context = self._context_seen[:, None, None].expand(*shape, -1)
        seen_CNSK = torch.cat([of_context, _seen_of_branches(real_CNS).to(device)], dim=3)
        positions = positions_3CNS.to(device)
        self._places = torch.tensor(places, device=device).unbind(1)
        self._seen_CNK = seen_CNSK[:, :, -1]  # a branch's last token sees all of it
        self._own_CNN = torch.eye(most, dtype=torch.bool, device=device).expand(len(taken), -1, -1)
        self._positions_3CN = positions[..., -1]
        hidden = self._backbone.forward_text(
            embeds_CNSD.flatten(1, 2),
            seen_CNSK.flatten(1, 2)[:, None],
            positions.flatten(2),
            self._cache,
        )
        states: Tensor = hidden.unflatten(1, (most, longest))[self._places]
        return states

    def extend(self, embeds: Tensor) -> Tensor:
        """Read one more token of each branch [B, D], at its next position; return [B, D]."""
        self._seen_CNK = torch.cat([self._seen_CNK, self._own_CNN], dim=2)
        self._positions_3CN = self._positions_3CN + 1
        embeds_CND = embeds.new_zeros(*self._own_CNN.shape[:2], embeds.shape[1])
        embeds_CND[self._places] = embeds
        hidden = self._backbone.forward_text(
            embeds_CND, self._seen_CNK[:, None], self._positions_3CN, self._cache
        )
        return hidden[self._places]


def _seen_of_branches(real_CNS: Tensor) -> Tensor:
    """Return which tokens of all branches each one sees [C, N, S, N * S]: its own before it."""
    _, most, longest = real_CNS.shape
    own_NN = torch.eye(most, dtype=torch.bool)
    before_SS = torch.ones(longest, longest, dtype=torch.bool).tril()
    seen = own_NN[:, None, :, None] & before_SS[None, :, None] & real_CNS[:, None, None]
    return seen.flatten(3)


def _padded(states_BHLd: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(states_BHLd, (0, 0, length - states_BHLd.shape[2], 0))
