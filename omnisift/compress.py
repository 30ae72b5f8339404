"""Shorten an audio-video prompt: scores + drop shares -> keep mask -> kept tokens.

Shapes: L tokens of a sequence, C chunks, N tokens of a grid, A audio tokens, R chunks whose audio
is selected, D width, n kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce

import numpy as np
import torch
from torch import Tensor

from omnisift.audio_selection import AudioSelector
from omnisift.compression_plan import (
    COMPLETE,
    AudioPlan,
    CompressionPlan,
    Deciders,
    DropShares,
    VideoPlan,
    plan_compression,
)
from omnisift.layout import ModelLayout
from omnisift.video_pruning import drop_highest, spatial_similarity, temporal_similarity

# embeddings [L, D] of a prompt, its ids [L], its positions [3, L]
Sequence3d = tuple[Tensor, Tensor, Tensor]

# Scores [R, A] and which are of audio, not padding -> the scores that select. Training puts noise
# on them; of several groups of chunks (`CompressionPlan.audio`) it is called for each in turn.
Explore = Callable[[Tensor, Tensor], Tensor]

# Retained share -> drop shares. The middle rows are the published settings (method.md); between
# the rows both shares run linearly.
_SETTINGS = ((0.0, 1.0, 1.0), (0.25, 0.77, 0.50), (0.35, 0.67, 0.40), (1.0, 0.0, 0.0))


def drop_shares(retain: float) -> DropShares:
    """Return the drop shares for a retained share of all audio and video tokens, in [0, 1].

    Exact at the published 35 % (.67 video, .40 audio) and 25 % (.77, .50); nominal elsewhere:
    the true share depends on how many video tokens a grid has.
    """
    retained, video, audio = zip(*_SETTINGS, strict=True)
    return DropShares(
        video=float(np.interp(retain, retained, video)),
        audio=float(np.interp(retain, retained, audio)),
    )


@dataclass(frozen=True)
class Compressed:
    """What survives of one sequence."""

    embeds: Tensor  # [n, D], in the original order
    keep_mask: Tensor  # [L] bool
    kept_index: Tensor  # [n], index in the sequence; its positions stay those it had


def _valid(counts: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=counts.device) < counts[:, None]


def prune_video(
    tokens_LD: Tensor, plan: VideoPlan, deciders: Deciders, chance_L: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """STVP. Return, for the chunks' video tokens [C, N1 + N2]: index, kept, dropped."""
    first_valid = _valid(plan.num_first, plan.first.shape[1])
    second_valid = _valid(plan.num_second, plan.second.shape[1])
    first_tokens = tokens_LD[plan.first]
    if deciders.spatial:
        score = spatial_similarity(first_tokens, first_valid)
    else:
        assert chance_L is not None
        score = chance_L[plan.first]
    keep_first = drop_highest(score, first_valid, plan.drop_first)
    # Columns beyond the shorter kind of grid belong to chunks whose grids differ: kept whole.
    compared = min(plan.first.shape[1], plan.second.shape[1])
    second = plan.second[:, :compared]
    if deciders.temporal:
        score = temporal_similarity(tokens_LD[second], first_tokens[:, :compared])
    else:
        assert chance_L is not None
        score = chance_L[second]
    keep_second = drop_highest(score, second_valid[:, :compared], plan.drop_second)
    kept = torch.cat((keep_first, keep_second, second_valid[:, compared:]), dim=1)
    valid = torch.cat((first_valid, second_valid), dim=1)
    return torch.cat((plan.first, plan.second), dim=1), kept, valid & ~kept


def select_audio(
    tokens_LD: Tensor,
    plan: AudioPlan,
    video_index: Tensor,
    video_kept: Tensor,
    selector: AudioSelector | None,
    deciders: Deciders,
    chance_L: Tensor | None,
    explore: Explore | None,
) -> tuple[Tensor, Tensor]:
    """VGAS. Return, for the planned chunks' audio [R, A]: score, dropped."""
    valid = _valid(plan.num_audio, plan.audio.shape[1])
    if deciders.audio == "chance":
        assert chance_L is not None
        score = chance_L[plan.audio].float()
    else:
        assert selector is not None
        context, context_valid = plan.audio, valid
        if deciders.audio == "video":
            # Surviving video tokens moved to the front of each row, in their order.
            order = (~video_kept[plan.chunk]).sort(dim=1, stable=True).indices
            context = video_index[plan.chunk].gather(1, order[:, : plan.longest_context])
            context_valid = _valid(plan.num_context, context.shape[1])
        score = selector(tokens_LD[context], context_valid, tokens_LD[plan.audio]).float()
        if explore is not None:
            score = explore(score, valid)
    # Keeping the highest is dropping all but them; a tie keeps the lower index.
    kept = ~drop_highest(score, valid, plan.keep_audio) & valid
    return score * valid, valid & ~kept


def _decide(
    tokens_LD: Tensor,
    video: VideoPlan,
    audio: AudioPlan | None,
    selector: AudioSelector | None,
    deciders: Deciders = COMPLETE,
    chance_L: Tensor | None = None,
    explore: Explore | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return which tokens stay [L], and the audio's scores [R, A] where it is selected."""
    index, kept, dropped = prune_video(tokens_LD, video, deciders, chance_L)
    # Summed, so that the padding of a row (index 0, nothing dropped) cannot overwrite a token.
    drops = torch.zeros(tokens_LD.shape[0], dtype=torch.int32, device=tokens_LD.device)
    drops = drops.scatter_add(0, index.flatten(), dropped.flatten().int())
    score = None
    if audio is not None:
        score, dropped = select_audio(
            tokens_LD, audio, index, kept, selector, deciders, chance_L, explore
        )
        drops = drops.scatter_add(0, audio.audio.flatten(), dropped.flatten().int())
    return drops == 0, score


@cache
def _compiled_decide() -> Callable[..., tuple[Tensor, Tensor | None]]:
    # A third of the passes over the embeddings, and a fifth of the launches.
    return torch.compile(_decide, dynamic=True)


def compress_planned(
    embeds: Sequence[Tensor],
    plan: CompressionPlan,
    selector: AudioSelector | None,
    *,
    explore: Explore | None = None,
) -> list[Compressed]:
    """Shorten sequences inputs_embeds [L, D] as planned, without waiting for their device.

    Scores are decided in float32. Under autograd, kept audio tokens carry the straight-through
    factor 1 + s - s.detach(), so that the loss reaches the selector. `explore` changes the
    selector's scores.

    Raises ValueError for a missing selector where audio would have to be selected.
    """
    groups: tuple[AudioPlan | None, ...] = plan.audio or (None,)
    chooses = selector is not None or plan.deciders.audio == "chance"
    if plan.audio and not chooses and plan.shares.audio > 0:
        raise ValueError(
            f"audio_drop={plan.shares.audio} needs a selector; pass one or drop no audio"
        )
    # Where nothing is dropped only training needs the scores.
    if not chooses or (plan.shares.audio == 0 and not torch.is_grad_enabled()):
        groups = (None,)
    tokens_LD = lay_end_to_end(embeds)
    as_published = plan.deciders == COMPLETE and explore is None
    if tokens_LD.is_cuda and not torch.is_grad_enabled() and as_published:
        decide = _compiled_decide()
    else:
        decide = partial(_decide, deciders=plan.deciders, chance_L=plan.chance, explore=explore)
    keeps, scored = [], []
    for audio in groups:
        # Prunes the video each time, alike: one compiled graph serves any number of groups.
        keep_L, score = decide(tokens_LD, plan.video, audio, selector)
        keeps.append(keep_L)
        if audio is not None and score is not None and score.requires_grad:
            scored.append((audio.audio, score))
    if scored:
        through = torch.zeros(tokens_LD.shape[0], device=tokens_LD.device)
        for index_RA, score_RA in scored:
            change = score_RA - score_RA.detach()
            through = through.scatter_add(0, index_RA.flatten(), change.flatten())
        tokens_LD = tokens_LD * (1 + through)[:, None].to(tokens_LD.dtype)
    keep_L = reduce(torch.logical_and, keeps)
    return gather_kept(plan.lengths, tokens_LD, keep_L, plan.kept)


def lay_end_to_end(embeds: Sequence[Tensor]) -> Tensor:
    """Return the embeddings [L, D] of all sequences as one; a single one is not copied."""
    return embeds[0] if len(embeds) == 1 else torch.cat(list(embeds))


def gather_kept(
    lengths: Sequence[int], tokens_LD: Tensor, keep_L: Tensor, num_kept: Sequence[int]
) -> list[Compressed]:
    """Take the kept tokens out of sequences laid end to end; `num_kept` says how many of each."""
    results, start = [], 0
    for length, size in zip(lengths, num_kept, strict=True):
        mask = keep_L[start : start + length]
        # The number of survivors is known: asking the device for it would wait for it.
        kept_index = torch.nonzero_static(mask, size=size).squeeze(1)
        results.append(Compressed(tokens_LD[start + kept_index], mask, kept_index))
        start += length
    return results


def check_inputs(sequences: Sequence[Sequence3d], shares: DropShares) -> None:
    """Raise ValueError for shares outside [0, 1] and for shapes that do not belong together."""
    for name, share in (("video_drop", shares.video), ("audio_drop", shares.audio)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
    for embeds, ids, positions in sequences:
        length = embeds.shape[0]
        if embeds.ndim != 2 or ids.shape != (length,) or positions.shape != (3, length):
            raise ValueError(
                "expected inputs_embeds [L, D], input_ids [L], position_ids [3, L], got "
                f"{list(embeds.shape)}, {list(ids.shape)}, {list(positions.shape)}"
            )


def compress_batch(
    sequences: Sequence[Sequence3d],
    shares: DropShares,
    layout: ModelLayout,
    *,
    selector: AudioSelector | None,
    deciders: Deciders = COMPLETE,
    video_keys: Sequence[str] = (),
    explore: Explore | None = None,
) -> list[Compressed]:
    """Shorten sequences (inputs_embeds [L, D], input_ids [L], position_ids [3, L]) by OmniSIFT.

    The method of arXiv 2602.04804. The sequences may differ in length and in what they keep; none
    sees another's tokens. Ids and positions on the CPU cost no synchronisation with the
    embeddings' device. `video_keys`, one a sequence, seed what `deciders` leaves to chance. See
    `compress_planned`.

    Raises ValueError for shares outside [0, 1], shapes that do not belong together, and for a
    missing selector where audio would have to be selected.
    """
    check_inputs(sequences, shares)
    plan = plan_compression(
        [(ids, positions) for _, ids, positions in sequences],
        shares,
        layout,
        device=sequences[0][0].device,
        deciders=deciders,
        video_keys=video_keys,
    )
    return compress_planned([embeds for embeds, _, _ in sequences], plan, selector, explore=explore)
