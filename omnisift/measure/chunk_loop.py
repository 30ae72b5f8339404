"""Compression as the published code runs it: chunk by chunk, waiting for the GPU in each."""

import torch
from torch import Tensor

from omnisift.audio_selection import AudioSelector
from omnisift.compression_plan import DropShares
from omnisift.layout import ModelLayout


def chunk_loop(
    embeds: Tensor,
    ids: Tensor,
    positions: Tensor,
    shares: DropShares,
    layout: ModelLayout,
    *,
    selector: AudioSelector,
) -> Tensor:
    """Return the keep mask [L] of embeds [L, D], ids [L], positions [3, L], all on one device."""
    keep = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    is_video, is_audio = ids == layout.video_token_id, ids == layout.audio_token_id
    times = positions[0][is_video].unique().tolist()
    for start in range(0, len(times), 2):
        end = times[start + 2] if start + 2 < len(times) else positions[0].max().item() + 1
        grids = [
            torch.nonzero(is_video & (positions[0] == t)).squeeze(1)
            for t in times[start : start + 2]
        ]
        first = embeds[grids[0]].float()
        similar = [torch.cosine_similarity(first, first.mean(0, keepdim=True), dim=-1)]
        if len(grids) > 1:
            similar.append(torch.cosine_similarity(embeds[grids[1]].float(), first, dim=-1))
        for grid, similarity in zip(grids, similar, strict=True):
            dropped = similarity.topk(int(len(grids[0]) * shares.video)).indices
            keep[grid[dropped]] = False
        context = torch.cat([grid[keep[grid]] for grid in grids])
        window = (positions[0] >= times[start]) & (positions[0] < end)
        audio = torch.nonzero(is_audio & window).squeeze(1)
        if len(context) and len(audio) > 1:
            everyone = torch.ones(1, len(context), dtype=torch.bool, device=ids.device)
            score = selector(embeds[context].float()[None], everyone, embeds[audio].float()[None])
            kept = score[0].topk(len(audio) - int(len(audio) * shares.audio)).indices
            keep[audio] = False
            keep[audio[kept]] = True
    return keep
