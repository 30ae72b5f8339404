"""Shorten an audio-video prompt: scores + drop shares -> keep mask -> kept tokens.

Shapes: L tokens of a sequence, C chunks, N tokens of a grid, A audio tokens, R chunks whose audio
is selected, D width, n kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from omnisift.audio_selection import AudioSelector
from omnisift.compression_plan import AudioPlan, CompressionPlan, VideoPlan, plan_compression
from omnisift.compression_plan import DropShares as DropShares  # noqa: PLC0414 (exported)
from omnisift.video_pruning import drop_highest, spatial_similarity, temporal_similarity

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
    kept_index: Tensor  # [n], index in the sequence
    all_positions: Tensor  # [3, L], as given

    @property
    def position_ids(self) -> Tensor:
        """Return the original positions [3, n], gaps included, where they were given.

        On another device than the tokens' this waits for the compression.
        """
        return self.all_positions[:, self.kept_index.to(self.all_positions.device)]


def _valid(counts: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=counts.device) < counts[:, None]


def prune_video(tokens_LD: Tensor, plan: VideoPlan) -> tuple[Tensor, Tensor, Tensor]:
    """STVP. Return, for the chunks' video tokens [C, N1 + N2]: index, kept, dropped."""
    first_valid = _valid(plan.num_first, plan.first.shape[1])
    second_valid = _valid(plan.num_second, plan.second.shape[1])
    first_tokens = tokens_LD[plan.first]
    keep_first = drop_highest(
        spatial_similarity(first_tokens, first_valid), first_valid, plan.drop_first
    )
    # Columns beyond the shorter kind of grid belong to chunks whose grids differ: kept whole.
    compared = min(plan.first.shape[1], plan.second.shape[1])
    keep_second = drop_highest(
        temporal_similarity(tokens_LD[plan.second[:, :compared]], first_tokens[:, :compared]),
        second_valid[:, :compared],
        plan.drop_second,
    )
    kept = torch.cat((keep_first, keep_second, second_valid[:, compared:]), dim=1)
    valid = torch.cat((first_valid, second_valid), dim=1)
    return torch.cat((plan.first, plan.second), dim=1), kept, valid & ~kept


def select_audio(
    tokens_LD: Tensor,
    plan: AudioPlan,
    video_index: Tensor,
    video_kept: Tensor,
    selector: AudioSelector,
) -> tuple[Tensor, Tensor]:
    """VGAS. Return, for the planned chunks' audio [R, A]: score, dropped."""
    # Surviving video tokens moved to the front of each row, in their order: the context.
    order = (~video_kept[plan.chunk]).sort(dim=1, stable=True).indices
    context = video_index[plan.chunk].gather(1, order[:, : plan.longest_context])
    score = selector(
        tokens_LD[context], _valid(plan.num_context, context.shape[1]), tokens_LD[plan.audio]
    ).float()
    valid = _valid(plan.num_audio, plan.audio.shape[1])
    # Keeping the highest is dropping all but them; a tie keeps the lower index.
    kept = ~drop_highest(score, valid, plan.keep_audio) & valid
    return score * valid, valid & ~kept


def _decide(
    tokens_LD: Tensor, video: VideoPlan, audio: AudioPlan | None, selector: AudioSelector | None
) -> tuple[Tensor, Tensor | None]:
    """Return which tokens stay [L], and the audio's scores [R, A] where it is selected."""
    index, kept, dropped = prune_video(tokens_LD, video)
    # Summed, so that the padding of a row (index 0, nothing dropped) cannot overwrite a token.
    drops = torch.zeros(tokens_LD.shape[0], dtype=torch.int32, device=tokens_LD.device)
    drops = drops.scatter_add(0, index.flatten(), dropped.flatten().int())
    score = None
    if audio is not None and selector is not None:
        score, dropped = select_audio(tokens_LD, audio, index, kept, selector)
        drops = drops.scatter_add(0, audio.audio.flatten(), dropped.flatten().int())
    return drops == 0, score


@cache
def _compiled_decide() -> Callable[..., tuple[Tensor, Tensor | None]]:
    # A third of the passes over the embeddings, and a fifth of the launches.
    return torch.compile(_decide, dynamic=True)


def compress_planned(
    embeds: Sequence[Tensor], plan: CompressionPlan, selector: AudioSelector | None
) -> list[Compressed]:
    """Shorten sequences inputs_embeds [L, D] as planned, without waiting for their device.

    Scores are decided in float32. Under autograd, kept audio tokens carry the straight-through
    factor 1 + s - s.detach(), so that the loss reaches the selector.

    Raises ValueError for a missing selector where audio would have to be selected.
    """
    audio = plan.audio
    if audio and selector is None and plan.shares.audio > 0:
        raise ValueError(
            f"audio_drop={plan.shares.audio} needs a selector; pass one or drop no audio"
        )
    # Where nothing is dropped only training needs the scores.
    if plan.shares.audio == 0 and not torch.is_grad_enabled():
        audio = None
    tokens_LD = embeds[0] if len(embeds) == 1 else torch.cat(list(embeds))
    compiled = tokens_LD.is_cuda and not torch.is_grad_enabled()
    decide = _compiled_decide() if compiled else _decide
    keep_L, score = decide(tokens_LD, plan.video, audio, selector)
    if audio and score is not None and score.requires_grad:
        through = torch.zeros(tokens_LD.shape[0], device=tokens_LD.device)
        through = through.scatter_add(0, audio.audio.flatten(), (score - score.detach()).flatten())
        tokens_LD = tokens_LD * (1 + through)[:, None].to(tokens_LD.dtype)
    results, start = [], 0
    for length, size, positions in zip(plan.lengths, plan.kept, plan.positions, strict=True):
        mask = keep_L[start : start + length]
        # The number of survivors is known: asking the device for it would wait for it.
        kept_index = torch.nonzero_static(mask, size=size).squeeze(1)
        results.append(Compressed(tokens_LD[start + kept_index], mask, kept_index, positions))
        start += length
    return results


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
    positions on the CPU cost no synchronisation with the embeddings' device. See
    `compress_planned`.

    Raises ValueError for shares outside [0, 1], shapes that do not belong together, and for a
    missing selector where audio would have to be selected.
    """
    for embeds, ids, positions in sequences:
        length = embeds.shape[0]
        if embeds.ndim != 2 or ids.shape != (length,) or positions.shape != (3, length):
            raise ValueError(
                "expected inputs_embeds [L, D], input_ids [L], position_ids [3, L], got "
                f"{list(embeds.shape)}, {list(ids.shape)}, {list(positions.shape)}"
            )
    plan = plan_compression(
        [(ids, positions) for _, ids, positions in sequences],
        DropShares(video_drop, audio_drop),
        video_token_id=video_token_id,
        audio_token_id=audio_token_id,
        device=sequences[0][0].device,
    )
    return compress_planned([embeds for embeds, _, _ in sequences], plan, selector)


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
