"""The compression as slow loops over chunks and tokens, in float32: the oracle of the fast one.

Shapes: L tokens of a sequence, D width, h hidden. Follows the method's wording step by step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlowChunk:
    """Indices into the sequence, in its order."""

    first: list[int]
    second: list[int]
    audio: list[int]


@dataclass(frozen=True)
class SlowCompressed:
    """What survives, and how far the closest decision was from going the other way."""

    keep: list[bool]  # [L]
    embeds: Tensor  # [n, D] float32
    margin: float  # smallest gap between a score that was kept and one that was dropped


def slow_chunks(
    ids: Sequence[int], times: Sequence[int], *, video_token_id: int, audio_token_id: int
) -> list[SlowChunk]:
    """Pair the distinct video times; give each pair the audio up to the next pair."""
    video_times = sorted(
        {time for id_, time in zip(ids, times, strict=True) if id_ == video_token_id}
    )
    chunks = []
    for start in range(0, len(video_times), 2):
        pair = video_times[start : start + 2]
        end = video_times[start + 2] if start + 2 < len(video_times) else math.inf
        first, second, audio = [], [], []
        for index, (id_, time) in enumerate(zip(ids, times, strict=True)):
            if id_ == video_token_id and time == pair[0]:
                first.append(index)
            if id_ == video_token_id and len(pair) == 2 and time == pair[1]:
                second.append(index)
            if id_ == audio_token_id and pair[0] <= time < end:
                audio.append(index)
        chunks.append(SlowChunk(first, second, audio))
    return chunks


def _cosine(one: Tensor, other: Tensor) -> float:
    norms = float(one.norm()) * float(other.norm())
    return float(one @ other) / norms if norms > 0 else 0.0


def _highest(scores: Sequence[float], count: int) -> tuple[set[int], float]:
    """Return the `count` highest scores' places, the lower place first of equal ones; the gap."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    if not 0 < count < len(scores):
        return set(order[:count]), math.inf
    return set(order[:count]), scores[order[count - 1]] - scores[order[count]]


def _layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean()
    normed = centred / torch.sqrt((centred * centred).mean() + 1e-5)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def slow_scores(
    video: Sequence[Tensor], audio: Sequence[Tensor], weights: dict[str, Tensor], num_heads: int
) -> list[Tensor]:
    """Score each audio token [D] against the surviving video tokens [D], one head at a time."""
    hidden = weights["v_proj.bias"].shape[0]
    size = hidden // num_heads
    # the packed projection holds query, key and value rows one after another
    query_rows, key_rows, value_rows = (
        (weights["cross_attn.in_proj_weight"][part], weights["cross_attn.in_proj_bias"][part])
        for part in (slice(hidden), slice(hidden, 2 * hidden), slice(2 * hidden, None))
    )
    keys, values = [], []
    for token in video:
        v = _layer_norm(_linear(token, weights, "v_proj"), weights, "v_norm")
        keys.append(key_rows[0] @ v + key_rows[1])
        values.append(value_rows[0] @ v + value_rows[1])
    scores = []
    for token in audio:
        a = _layer_norm(_linear(token, weights, "a_proj"), weights, "a_norm")
        query = query_rows[0] @ a + query_rows[1]
        heads = []
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            logits = torch.stack([query[part] @ key[part] / math.sqrt(size) for key in keys])
            exponentials = torch.exp(logits - logits.max())
            shares = exponentials / exponentials.sum()
            heads.append(
                torch.stack(
                    [share * value[part] for share, value in zip(shares, values, strict=True)]
                ).sum(0)
            )
        o = _linear(torch.cat(heads), weights, "cross_attn.out_proj")
        x = _layer_norm(o + a, weights, "post_attn_norm")
        inner = _linear(x, weights, "score_head.0")
        inner = inner / (1 + torch.exp(-inner))  # SiLU
        logit = _linear(inner, weights, "score_head.2")[0]
        scores.append(1 / (1 + torch.exp(-logit)))
    return scores


def slow_compress(
    embeds: Tensor,
    ids: Sequence[int],
    times: Sequence[int],
    *,
    weights: dict[str, Tensor],
    num_heads: int,
    video_drop: float,
    audio_drop: float,
    video_token_id: int,
    audio_token_id: int,
) -> SlowCompressed:
    """Compress one sequence; in training (gradients on) with the straight-through factor."""
    tokens = list(embeds.float())
    rows = list(tokens)
    keep = [True] * len(tokens)
    margins = [math.inf]
    chunks = slow_chunks(ids, times, video_token_id=video_token_id, audio_token_id=audio_token_id)
    for chunk in chunks:
        k = int(len(chunk.first) * video_drop)
        with torch.no_grad():
            mean = torch.stack([tokens[i] for i in chunk.first]).mean(0)
            spatial = [_cosine(tokens[i], mean) for i in chunk.first]
            dropped, margin = _highest(spatial, k)
            margins.append(margin)
            for place in dropped:
                keep[chunk.first[place]] = False
            if len(chunk.second) == len(chunk.first):
                temporal = [
                    _cosine(tokens[i], tokens[j])
                    for i, j in zip(chunk.second, chunk.first, strict=True)
                ]
                dropped, margin = _highest(temporal, k)
                margins.append(margin)
                for place in dropped:
                    keep[chunk.second[place]] = False
        context = [tokens[i] for i in chunk.first + chunk.second if keep[i]]
        num_audio = len(chunk.audio)
        if not context or num_audio <= 1:
            continue
        scores = slow_scores(context, [tokens[i] for i in chunk.audio], weights, num_heads)
        num_kept = num_audio - int(num_audio * audio_drop)
        kept, margin = _highest([float(score.detach()) for score in scores], num_kept)
        margins.append(margin)
        for place, index in enumerate(chunk.audio):
            keep[index] = place in kept
            if scores[place].requires_grad:
                factor = float(place in kept) + scores[place] - scores[place].detach()
                rows[index] = tokens[index] * factor
    kept_rows = [row for row, kept_here in zip(rows, keep, strict=True) if kept_here]
    stacked = torch.stack(kept_rows) if kept_rows else embeds[:0].float()
    return SlowCompressed(keep, stacked, min(margins))
