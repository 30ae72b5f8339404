"""Shorten an audio-video prompt: scores + drop shares -> keep mask -> kept tokens.

Shapes: L tokens of a sequence, C chunks, N tokens of a grid, A audio tokens, D width, n kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omnisift.audio_selection import AudioSelector
from omnisift.layout import Chunks, Integers, find_chunks
from omnisift.video_pruning import drop_highest, spatial_similarity, temporal_similarity


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


def _budget(chunks: Chunks, shares: DropShares) -> _Budget:
    drop_first = (chunks.num_first * shares.video).astype(np.int64)
    # Only equal grids can be compared token by token; an unequal second grid stays whole.
    drop_second = np.where(chunks.num_second == chunks.num_first, drop_first, 0)
    context = chunks.num_first + chunks.num_second - drop_first - drop_second
    selects = (context > 0) & (chunks.num_audio > 1)
    drop_audio = np.where(selects, (chunks.num_audio * shares.audio).astype(np.int64), 0)
    return _Budget(drop_first, drop_second, context, drop_audio, selects)


def _valid(counts: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=counts.device) < counts[:, None]


def _prune_video(
    tokens_LD: Tensor, chunks: Chunks, budget: _Budget
) -> tuple[Tensor, Tensor, Tensor]:
    """STVP. Return, for the chunks' video tokens [C, N1 + N2]: index, kept, dropped."""
    first, second = _on_device(chunks.first, tokens_LD), _on_device(chunks.second, tokens_LD)
    first_valid = _valid(_on_device(chunks.num_first, tokens_LD), first.shape[1])
    second_valid = _valid(_on_device(chunks.num_second, tokens_LD), second.shape[1])
    first_tokens = tokens_LD[first]
    keep_first = drop_highest(
        spatial_similarity(first_tokens, first_valid),
        first_valid,
        _on_device(budget.drop_first, tokens_LD),
    )
    # Columns beyond the shorter kind of grid belong to chunks whose grids differ: kept whole.
    compared = min(first.shape[1], second.shape[1])
    keep_second = second_valid.clone()
    keep_second[:, :compared] = drop_highest(
        temporal_similarity(tokens_LD[second[:, :compared]], first_tokens[:, :compared]),
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
    selector: AudioSelector,
) -> tuple[Tensor, Tensor, Tensor]:
    """VGAS. Return, for the audio of the chunks it runs on [C', A]: index, score, dropped."""
    rows = np.flatnonzero(budget.selects)
    chosen = _on_device(rows, tokens_LD)
    # Surviving video tokens moved to the front of each row, in their order: the context.
    order = (~video_kept[chosen]).sort(dim=1, stable=True).indices
    width = int(budget.context[rows].max())
    context = video_index[chosen].gather(1, order[:, :width])
    context_valid = _valid(_on_device(budget.context[rows], tokens_LD), width)
    audio = _on_device(chunks.audio[rows], tokens_LD)
    audio_valid = _valid(_on_device(chunks.num_audio[rows], tokens_LD), audio.shape[1])
    dtype = selector.v_proj.weight.dtype
    score = selector(tokens_LD[context].to(dtype), context_valid, tokens_LD[audio].to(dtype))
    keep = chunks.num_audio[rows] - budget.drop_audio[rows]
    # Keeping the highest is dropping all but them; a tie keeps the lower index.
    kept = ~drop_highest(score.float(), audio_valid, _on_device(keep, tokens_LD)) & audio_valid
    return audio, score.float() * audio_valid, audio_valid & ~kept


def _on_device(array: NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)


def compress_batch(
    sequences: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    selector: AudioSelector | None,
    video_drop: float,
    audio_drop: float,
    video_token_id: int,
    audio_token_id: int,
) -> list[Compressed]:
    """Shorten several sequences (inputs_embeds [L, D], input_ids [L], position_ids [3, L]) at once.

    The sequences may differ in length and in what they keep; none sees another's tokens. Ids and
    positions on the CPU cost no synchronisation with the embeddings' device. Scores are decided
    in float32 (in the selector's own type inside it). Under autograd, kept audio tokens carry the
    straight-through factor 1 + s - s.detach(), so that the loss reaches the selector.

    Raises ValueError for shares outside [0, 1], shapes that do not belong together, and for a
    missing selector where audio would have to be selected.
    """
    shares = DropShares(video_drop, audio_drop)
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
    chunks = find_chunks(
        [(ids.cpu().numpy(), positions.cpu().numpy()) for _, ids, positions in sequences],
        video_token_id=video_token_id,
        audio_token_id=audio_token_id,
    )
    budget = _budget(chunks, shares)
    if len(sequences) == 1:
        tokens_LD = sequences[0][0]
    else:
        tokens_LD = torch.cat([embeds for embeds, _, _ in sequences])
    index, kept, dropped = _prune_video(tokens_LD, chunks, budget)
    # Summed, so that the padding of a row (index 0, nothing dropped) cannot overwrite a token.
    drops = torch.zeros(tokens_LD.shape[0], dtype=torch.int32, device=tokens_LD.device)
    drops.scatter_add_(0, index.flatten(), dropped.flatten().int())
    if selector is None and audio_drop > 0 and budget.selects.any():
        raise ValueError(f"audio_drop={audio_drop} needs a selector; pass one or drop no audio")
    # Where nothing is dropped only training needs the scores.
    if selector and budget.selects.any() and (audio_drop > 0 or torch.is_grad_enabled()):
        audio, score, dropped = _select_audio(tokens_LD, chunks, budget, index, kept, selector)
        drops.scatter_add_(0, audio.flatten(), dropped.flatten().int())
        if score.requires_grad:
            through = torch.zeros(tokens_LD.shape[0], device=tokens_LD.device)
            through = through.scatter_add(0, audio.flatten(), (score - score.detach()).flatten())
            tokens_LD = tokens_LD * (1 + through)[:, None].to(tokens_LD.dtype)
    return _gather(sequences, tokens_LD, drops == 0, chunks, budget)


def _gather(
    sequences: Sequence[tuple[Tensor, Tensor, Tensor]],
    tokens_LD: Tensor,
    keep_L: Tensor,
    chunks: Chunks,
    budget: _Budget,
) -> list[Compressed]:
    # The number of survivors is known beforehand: asking the device for it would wait for it.
    num_dropped = budget.drop_first + budget.drop_second + budget.drop_audio
    lengths = [embeds.shape[0] for embeds, _, _ in sequences]
    sequence_of_chunk = np.searchsorted(
        np.cumsum(lengths), chunks.first[:, :1].ravel(), side="right"
    )
    results, start = [], 0
    for number, (length, (_, _, positions)) in enumerate(zip(lengths, sequences, strict=True)):
        mask = keep_L[start : start + length]
        size = length - int(num_dropped[sequence_of_chunk == number].sum())
        kept_index = torch.nonzero_static(mask, size=size).squeeze(1)
        results.append(
            Compressed(
                embeds=tokens_LD[start + kept_index],
                keep_mask=mask,
                position_ids=positions[:, kept_index.to(positions.device)],
                kept_index=kept_index,
            )
        )
        start += length
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
