"""Shorten an audio-video prompt: scores + drop shares -> keep mask -> kept tokens.

Shapes: L tokens of a sequence, C chunks, N tokens of a grid, A audio tokens, D width, n kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omnisift.audio_selection import AudioSelector
from omnisift.chance import draw
from omnisift.layout import Chunks, Integers, find_chunks
from omnisift.video_pruning import drop_highest, spatial_similarity, temporal_similarity

# embeddings [L, D] of a prompt, its ids [L], its positions [3, L]
Sequence3d = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class DropShares:
    """The share of tokens REMOVED, per modality, each in [0, 1]."""

    video: float
    audio: float


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
class Deciders:
    """What decides which tokens go. The default is the method, all else are its ablations.

    An ablation drops exactly as many tokens of each chunk as the method; those it has no score
    for go by chance. It needs a selector that was trained with it.
    """

    spatial: bool = True  # False: first grids by chance
    temporal: bool = True  # False: second grids by chance
    audio: Literal["video", "audio", "chance"] = "video"  # the context of the selector, or none

    @property
    def by_chance(self) -> bool:
        """Return whether anything is left to chance."""
        return not (self.spatial and self.temporal) or self.audio == "chance"


COMPLETE = Deciders()


@dataclass(frozen=True)
class Compressed:
    """What survives of one sequence."""

    embeds: Tensor  # [n, D], in the original order
    keep_mask: Tensor  # [L] bool
    position_ids: Tensor  # [3, n], the original ones, gaps included
    kept_index: Tensor  # [n], index in the sequence


@dataclass(frozen=True)
class _Budget:
    """How many tokens each chunk loses: known before any score is."""

    drop_first: Integers  # [C]
    drop_second: Integers  # [C]
    context: Integers  # [C] video tokens that survive
    drop_audio: Integers  # [C]
    selects: NDArray[np.bool_]  # [C] VGAS runs


def _budget(chunks: Chunks, shares: DropShares, deciders: Deciders) -> _Budget:
    drop_first = (chunks.num_first * shares.video).astype(np.int64)
    # Only equal grids can be compared token by token; an unequal second grid stays whole.
    drop_second = np.where(chunks.num_second == chunks.num_first, drop_first, 0)
    context = chunks.num_first + chunks.num_second - drop_first - drop_second
    has_context = (context > 0) | (deciders.audio == "audio")
    selects = has_context & (chunks.num_audio > 1)
    drop_audio = np.where(selects, (chunks.num_audio * shares.audio).astype(np.int64), 0)
    return _Budget(drop_first, drop_second, context, drop_audio, selects)


def _valid(counts: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=counts.device) < counts[:, None]


def _prune_video(
    tokens_LD: Tensor, chunks: Chunks, budget: _Budget, deciders: Deciders, chance_L: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """STVP. Return, for the chunks' video tokens [C, N1 + N2]: index, kept, dropped."""
    first, second = _on_device(chunks.first, tokens_LD), _on_device(chunks.second, tokens_LD)
    first_valid = _valid(_on_device(chunks.num_first, tokens_LD), first.shape[1])
    second_valid = _valid(_on_device(chunks.num_second, tokens_LD), second.shape[1])
    first_tokens = tokens_LD[first]
    keep_first = drop_highest(
        spatial_similarity(first_tokens, first_valid) if deciders.spatial else chance_L[first],
        first_valid,
        _on_device(budget.drop_first, tokens_LD),
    )
    # Columns beyond the shorter kind of grid belong to chunks whose grids differ: kept whole.
    compared = min(first.shape[1], second.shape[1])
    keep_second = second_valid.clone()
    keep_second[:, :compared] = drop_highest(
        temporal_similarity(tokens_LD[second[:, :compared]], first_tokens[:, :compared])
        if deciders.temporal
        else chance_L[second[:, :compared]],
        second_valid[:, :compared],
        _on_device(budget.drop_second, tokens_LD),
    )
    kept = torch.cat((keep_first, keep_second), dim=1)
    valid = torch.cat((first_valid, second_valid), dim=1)
    return torch.cat((first, second), dim=1), kept, valid & ~kept


def _select_audio(
    tokens_LD: Tensor,
    chunks: Chunks,
    budget: _Budget,
    video_index: Tensor,
    video_kept: Tensor,
    selector: AudioSelector | None,
    deciders: Deciders,
    chance_L: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """VGAS. Return, for the audio of the chunks it runs on [C', A]: index, score, dropped."""
    rows = np.flatnonzero(budget.selects)
    audio = _on_device(chunks.audio[rows], tokens_LD)
    audio_valid = _valid(_on_device(chunks.num_audio[rows], tokens_LD), audio.shape[1])
    if deciders.audio == "chance":
        score = chance_L[audio]
    else:
        assert selector is not None
        context, context_valid = audio, audio_valid
        if deciders.audio == "video":
            context, context_valid = _surviving(video_index, video_kept, budget, rows)
        dtype = selector.v_proj.weight.dtype
        score = selector(tokens_LD[context].to(dtype), context_valid, tokens_LD[audio].to(dtype))
    keep = chunks.num_audio[rows] - budget.drop_audio[rows]
    # Keeping the highest is dropping all but them; a tie keeps the lower index.
    kept = ~drop_highest(score.float(), audio_valid, _on_device(keep, tokens_LD)) & audio_valid
    return audio, score.float() * audio_valid, audio_valid & ~kept


def _surviving(
    video_index: Tensor, video_kept: Tensor, budget: _Budget, rows: Integers
) -> tuple[Tensor, Tensor]:
    """Return the surviving video tokens of the chunks `rows`, [C', V], and which are real."""
    chosen = _on_device(rows, video_index)
    # Surviving video tokens moved to the front of each row, in their order: the context.
    order = (~video_kept[chosen]).sort(dim=1, stable=True).indices
    width = int(budget.context[rows].max())
    valid = _valid(_on_device(budget.context[rows], video_index), width)
    return video_index[chosen].gather(1, order[:, :width]), valid


def _on_device(array: NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)


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
    *,
    selector: AudioSelector | None,
    video_drop: float,
    audio_drop: float,
    video_token_id: int,
    audio_token_id: int,
    deciders: Deciders = COMPLETE,
    video_keys: Sequence[str] = (),
) -> list[Compressed]:
    """Shorten several sequences (inputs_embeds [L, D], input_ids [L], position_ids [3, L]) at once.

    The sequences may differ in length and in what they keep; none sees another's tokens. Ids and
    positions on the CPU cost no synchronisation with the embeddings' device. Scores are decided
    in float32 (in the selector's own type inside it). Under autograd, kept audio tokens carry the
    straight-through factor 1 + s - s.detach(), so that the loss reaches the selector.
    `video_keys`, one a sequence, seed what `deciders` leaves to chance.

    Raises ValueError for shares outside [0, 1], shapes that do not belong together, and for a
    missing selector where audio would have to be selected.
    """
    shares = DropShares(video_drop, audio_drop)
    check_inputs(sequences, shares)
    chunks = find_chunks(
        [(ids.cpu().numpy(), positions.cpu().numpy()) for _, ids, positions in sequences],
        video_token_id=video_token_id,
        audio_token_id=audio_token_id,
    )
    budget = _budget(chunks, shares, deciders)
    tokens_LD = lay_end_to_end(sequences)
    lengths = [embeds.shape[0] for embeds, _, _ in sequences]
    chance_L = torch.empty(0)
    if deciders.by_chance:
        chance_L = torch.from_numpy(draw(chunks, lengths, video_keys)).to(tokens_LD.device)
    index, kept, dropped = _prune_video(tokens_LD, chunks, budget, deciders, chance_L)
    # Summed, so that the padding of a row (index 0, nothing dropped) cannot overwrite a token.
    drops = torch.zeros(tokens_LD.shape[0], dtype=torch.int32, device=tokens_LD.device)
    drops.scatter_add_(0, index.flatten(), dropped.flatten().int())
    chooses = selector is not None or deciders.audio == "chance"
    if not chooses and audio_drop > 0 and budget.selects.any():
        raise ValueError(f"audio_drop={audio_drop} needs a selector; pass one or drop no audio")
    # Where nothing is dropped only training needs the scores.
    if chooses and budget.selects.any() and (audio_drop > 0 or torch.is_grad_enabled()):
        audio, score, dropped = _select_audio(
            tokens_LD, chunks, budget, index, kept, selector, deciders, chance_L
        )
        drops.scatter_add_(0, audio.flatten(), dropped.flatten().int())
        if score.requires_grad:
            through = torch.zeros(tokens_LD.shape[0], device=tokens_LD.device)
            through = through.scatter_add(0, audio.flatten(), (score - score.detach()).flatten())
            tokens_LD = tokens_LD * (1 + through)[:, None].to(tokens_LD.dtype)
    # The number of survivors is known beforehand: asking the device for it would wait for it.
    num_dropped = np.bincount(
        chunks.sequences(lengths),
        weights=budget.drop_first + budget.drop_second + budget.drop_audio,
        minlength=len(sequences),
    )
    num_kept = [length - int(num) for length, num in zip(lengths, num_dropped, strict=True)]
    return gather_kept(sequences, tokens_LD, drops == 0, num_kept)


def lay_end_to_end(sequences: Sequence[Sequence3d]) -> Tensor:
    """Return the embeddings of all sequences as one; a single one is not copied."""
    if len(sequences) == 1:
        return sequences[0][0]
    return torch.cat([embeds for embeds, _, _ in sequences])


def gather_kept(
    sequences: Sequence[Sequence3d], tokens_LD: Tensor, keep_L: Tensor, num_kept: Sequence[int]
) -> list[Compressed]:
    """Take the kept tokens out of sequences laid end to end; `num_kept` says how many of each."""
    results, start = [], 0
    for (embeds, _, positions), size in zip(sequences, num_kept, strict=True):
        mask = keep_L[start : start + embeds.shape[0]]
        kept_index = torch.nonzero_static(mask, size=size).squeeze(1)
        results.append(
            Compressed(
                embeds=tokens_LD[start + kept_index],
                keep_mask=mask,
                position_ids=positions[:, kept_index.to(positions.device)],
                kept_index=kept_index,
            )
        )
        start += embeds.shape[0]
    return results


def compress(
    inputs_embeds: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    *,
    selector: AudioSelector | None,
    video_drop: float,
    audio_drop: float,
    video_token_id: int,
    audio_token_id: int,
) -> Compressed:
    """Shorten one sequence: inputs_embeds [L, D], input_ids [L], position_ids [3, L].

    The method of OmniSIFT (arXiv 2602.04804); see `compress_batch`.
    """
    [result] = compress_batch(
        [(inputs_embeds, input_ids, position_ids)],
        selector=selector,
        video_drop=video_drop,
        audio_drop=audio_drop,
        video_token_id=video_token_id,
        audio_token_id=audio_token_id,
    )
    return result
