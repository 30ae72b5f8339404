"""Branches behind shared contexts against the stock model on each whole sequence."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import eager_attention_forward

from omnisift.backbone import Backbone, language_model
from omnisift.grouped_attention import grouped_attention
from omnisift.measure.random_model import random_model
from omnisift.mini.tiny import tiny_config
from omnisift.shared_contexts import Branch, SharedContexts


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(random_model(tiny_config(), torch.device("cpu"), llm_layers=2))


def _tokens(backbone: Backbone, length: int, start: int) -> tuple[Tensor, Tensor]:
    """Return random embeddings, and positions with gaps as kept tokens have them."""
    gaps = torch.randint(1, 4, (3, length)).cumsum(1)
    return torch.randn(length, backbone.width), start + gaps


def _whole(
    stock: Any, context: tuple[Tensor, Tensor], pieces: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Return the states [L, D] of a model that we never touched: one sequence, no cache, eager."""
    embeds = torch.cat([context[0], *(piece[0] for piece in pieces)])
    positions = torch.cat([context[1], *(piece[1] for piece in pieces)], dim=1)
    with torch.no_grad():
        hidden: Tensor = language_model(stock)(
            inputs_embeds=embeds[None], position_ids=positions[:, None]
        ).last_hidden_state[0]
    return hidden


def test_a_branch_is_read_as_if_it_were_alone(backbone: Backbone) -> None:
    torch.manual_seed(0)
    stock = copy.deepcopy(backbone.model)
    stock.set_attn_implementation("eager")
    contexts = [_tokens(backbone, length, 0) for length in (11, 5, 11, 8)]
    shared = SharedContexts(backbone, contexts)
    # Twice, for what was read before is forgotten; the third context has no branch at first.
    for rows in ((0, 3, 0, 1, 0, 3), (2, 1)):
        branches = [Branch(row, *_tokens(backbone, 2 + i, 60)) for i, row in enumerate(rows)]
        hidden = shared.read(branches)
        assert hidden.shape == (len(rows), 1 + len(rows), backbone.width)
        longer = [[branch[1:]] for branch in branches]
        for step in range(3):
            for branch, pieces, states in zip(branches, longer, hidden, strict=True):
                right = _whole(stock, contexts[branch.context], pieces)
                count = len(pieces[0][0]) if step == 0 else 1
                torch.testing.assert_close(states[-count:], right[-count:], rtol=0, atol=2e-5)
            more = torch.randn(len(rows), backbone.width)
            hidden = shared.extend(more)[:, None]
            for pieces, embeds in zip(longer, more, strict=True):
                pieces.append((embeds[None], pieces[-1][1][:, -1:] + 1))


def test_keys_of_a_context_lie_in_memory_once(backbone: Backbone) -> None:
    shared = SharedContexts(backbone, [_tokens(backbone, 40, 0)])
    shared.read([Branch(0, *_tokens(backbone, 3, 200)) for _ in range(6)])
    shared.extend(torch.randn(6, backbone.width))
    layer: Any = shared._cache.layers[0]
    assert layer.keys.shape[0] == 1
    assert layer.keys.shape[2] == 40 + 6 * 3 + 6


def test_grouped_attention_is_that_of_repeated_keys(backbone: Backbone) -> None:
    torch.manual_seed(1)
    module = language_model(backbone.model).layers[0].self_attn
    groups = module.num_key_value_groups
    assert groups > 1
    query = torch.randn(2, 2 * groups, 5, 16)
    key, value = torch.randn(2, 2, 2, 9, 16)
    seen = torch.rand(2, 1, 5, 9) < 0.5
    seen[..., 0] = True
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    right, _ = eager_attention_forward(module, query, key, value, bias, scaling=0.3)
    ours, _ = grouped_attention(module, query, key, value, seen, scaling=0.3)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-6)
