"""OmniZip as slow loops over groups, grids and tokens: the oracle of the fast one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from tests.omnisift.baselines.layouts import AUDIO, VIDEO, Prompt, cosine


@dataclass(frozen=True)
class SlowZipped:
    """What survives, and how far the closest decision was from going the other way."""

    keep: list[bool]  # [L]
    rows: list[Tensor]  # [L] of [D], anchors merged
    margin: float


def exact(share: float) -> Fraction:
    """Return the decimal number that is written in the configuration."""
    return Fraction(str(share))


def highest(scores: Sequence[float], count: int) -> tuple[list[int], float]:
    """Return the places of the `count` highest, lower place first of equal ones, and the gap."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    if not 0 < count < len(scores):
        return order[:count], math.inf
    return order[:count], scores[order[count - 1]] - scores[order[count]]


def slow_group_shares(
    video_drop: Fraction, groups: Sequence[tuple[int, int, int]]
) -> list[Fraction]:
    """Return each group's share, from (video tokens, audio tokens, audio tokens kept) of each."""
    low, high = Fraction("0.35"), Fraction("0.75")

    def clamp(share: Fraction) -> Fraction:
        return max(low, min(high, share))

    shares = [video_drop] * len(groups)
    guided = [j for j, (video, audio, _) in enumerate(groups) if video and audio]
    for j in guided:
        _, audio, kept = groups[j]
        shares[j] = clamp(high - Fraction("0.40") * Fraction(kept, audio))
    if len(guided) > 2:
        values = [shares[j] for j in guided]
        fixed = {guided[values.index(min(values))], guided[values.index(max(values))]}
        wanted = video_drop * sum(groups[j][0] for j in guided)
        wanted -= sum(shares[j] * groups[j][0] for j in fixed)
        others = [j for j in guided if j not in fixed]
        scale = wanted / sum(shares[j] * groups[j][0] for j in others)
        for j in others:
            shares[j] = clamp(shares[j] * scale)
    return shares


def slow_density_peaks(grid: Sequence[Tensor]) -> tuple[list[float], float]:
    """Return density * delta of each token, and the closest two densities' gap."""
    distances = [[1 - cosine(one, other) for other in grid] for one in grid]
    densities = []
    for i, row in enumerate(distances):
        nearest = sorted(distance for j, distance in enumerate(row) if j != i)[:5]
        densities.append(math.exp(-sum(nearest) / len(nearest)) if nearest else 1.0)
    scores = []
    for i, row in enumerate(distances):
        denser = [row[j] for j in range(len(grid)) if densities[j] > densities[i]]
        others = [distance for j, distance in enumerate(row) if j != i]
        delta = min(denser) if denser else max(others, default=0.0)
        scores.append(densities[i] * delta)
    ordered = sorted(densities)
    gaps = [above - below for below, above in pairwise(ordered)]
    return scores, min(gaps, default=math.inf)


def _slow_audio(
    tokens: list[Tensor],
    audio: list[int],
    video: list[int],
    importance: Sequence[float],
    audio_drop: float,
) -> tuple[set[int], dict[int, Tensor], list[float]]:
    """Return the audio kept, the anchors' merged rows, and the gaps of the decisions."""
    num = len(audio)
    margins = [math.inf]
    top, _ = highest(importance, round((1 - audio_drop) * num))  # compared exactly: no margin
    rest = [place for place in range(num) if place not in top]
    num_anchors = min(round(0.05 * num), len(rest))
    anchors = [rest[i * (len(rest) // num_anchors)] for i in range(num_anchors)]
    taken: dict[int, list[int]] = {anchor: [] for anchor in anchors}
    for place in rest:
        if anchors and place not in anchors:
            alike = [cosine(tokens[audio[place]], tokens[audio[anchor]]) for anchor in anchors]
            [best], margin = highest(alike, 1)
            margins.append(margin)
            taken[anchors[best]].append(place)
    rows = {}
    for anchor, members in taken.items():
        seen = [max(cosine(tokens[audio[m]], tokens[v]) for v in video) for m in members]
        chosen, margin = highest(seen, min(3, len(members)))
        margins.append(margin)
        if not chosen:
            continue
        weights = [math.exp(seen[c]) for c in chosen]
        mean = torch.stack(
            [
                tokens[audio[members[c]]] * (weight / sum(weights))
                for c, weight in zip(chosen, weights, strict=True)
            ]
        ).sum(0)
        rows[audio[anchor]] = (tokens[audio[anchor]] + mean) / 2
    return {audio[place] for place in top + anchors}, rows, margins


def slow_zip(
    prompt: Prompt,
    embeds: Tensor,
    importance: Sequence[float],
    *,
    video_drop: float,
    audio_drop: float,
) -> SlowZipped:
    """Compress one sequence, group by group."""
    tokens = list(embeds.float())
    video, audio = prompt.places(VIDEO), prompt.places(AUDIO)
    keep, rows, margins = [True] * len(tokens), list(tokens), [math.inf]
    if not video:
        return SlowZipped(keep, rows, math.inf)
    if audio and audio_drop > 0:
        kept, merged, margins = _slow_audio(tokens, audio, video, importance, audio_drop)
        for index in audio:
            keep[index] = index in kept
            rows[index] = merged.get(index, rows[index])
    if video_drop > 0:
        margins += _slow_video(prompt, tokens, keep, video_drop)
    return SlowZipped(keep, rows, min(margins))


def _slow_video(
    prompt: Prompt, tokens: list[Tensor], keep: list[bool], video_drop: float
) -> list[float]:
    """Prune group by group, given the audio that stays; return the gaps of the decisions."""
    times, video, audio = prompt.positions[0], prompt.places(VIDEO), prompt.places(AUDIO)
    start = min(times[index] for index in video + audio)
    num_groups = max(times[index] - start for index in video + audio) // 50 + 1

    def inside(index: int, group: int) -> bool:
        return 50 * group <= times[index] - start < 50 * (group + 1)

    groups = [
        ([i for i in video if inside(i, j)], [i for i in audio if inside(i, j)])
        for j in range(num_groups)
    ]
    shares = slow_group_shares(
        exact(video_drop),
        [(len(seen), len(heard), sum(keep[i] for i in heard)) for seen, heard in groups],
    )
    margins = []
    for (seen, _), share in zip(groups, shares, strict=True):
        grids = [[i for i in seen if times[i] == t] for t in sorted({times[i] for i in seen})]
        for number, grid in enumerate(grids):
            count = math.floor(len(grid) * share)
            if number % 2 == 0:
                scores, margin = slow_density_peaks([tokens[i] for i in grid])
                if count:
                    margins.append(margin)
                places, margin = highest(scores, len(grid) - count)
                stays = {grid[place] for place in places}
            elif len(grid) == len(grids[number - 1]):
                pairs = zip(grid, grids[number - 1], strict=True)
                places, margin = highest([cosine(tokens[i], tokens[j]) for i, j in pairs], count)
                stays = set(grid) - {grid[place] for place in places}
            else:
                continue
            margins.append(margin)
            for index in grid:
                keep[index] = index in stays
    return margins
