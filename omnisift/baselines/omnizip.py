"""OmniZip (arXiv 2511.14582), training-free: the audio that is kept says how much video stays.

Shapes: L tokens of a sequence, A audio tokens, G grids of N tokens, K groups, D width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from omnisift.baselines.density_peaks import density_peaks
from omnisift.compress import Compressed, Sequence3d, check_inputs, gather_kept
from omnisift.compression_plan import DropShares
from omnisift.layout import Grids, Integers, ModelLayout, find_grids
from omnisift.video_pruning import drop_highest, temporal_similarity

ANCHORS = 0.05  # of the clip's audio tokens
_MERGED = 3  # tokens an anchor takes in
LOWEST, _HIGHEST = 0.35, 0.75  # share of video a group may lose
_POOL_ROWS = 1024  # audio tokens compared with the whole video at a time


def zip_tokens(
    sequence: Sequence3d,
    shares: DropShares,
    layout: ModelLayout,
    *,
    importance: Tensor,
) -> Compressed:
    """Shorten one sequence (inputs_embeds [L, D], input_ids [L], position_ids [3, L]).

    `importance` [A] is the attention each audio token receives in the audio tower's last layer
    (`audio_importance`). Groups are the chunks of the interleaving.
    Anchors leave merged with others, so `embeds` are not the input's rows there. Waits for the
    device: how many tokens of a group stay depends on which audio does.

    More audio stays than asked for (the anchors), and of the video of a group with sound never
    less than .25 or more than .65. Raises ValueError for shares outside [0, 1] and shapes that
    do not belong together.
    """
    check_inputs([sequence], shares)
    embeds_LD, ids, position_ids = sequence
    host_ids, positions = ids.cpu().numpy(), position_ids.cpu().numpy()
    grids = find_grids(host_ids, positions, video_token_id=layout.video_token_id)
    audio = np.flatnonzero(host_ids == layout.audio_token_id)
    if importance.shape != (len(audio),):
        raise ValueError(
            f"expected the importance of {len(audio)} audio tokens, got {list(importance.shape)}"
        )
    keep_L = torch.ones(len(host_ids), dtype=torch.bool, device=embeds_LD.device)
    unzipped_LD = embeds_LD
    if shares.audio > 0 and len(audio) and len(grids.time):
        video_L = torch.from_numpy(host_ids == layout.video_token_id).to(embeds_LD.device)
        index = torch.from_numpy(audio).to(embeds_LD.device)
        num_video = int(grids.num.sum())
        video = embeds_LD[torch.nonzero_static(video_L, size=num_video).squeeze(1)]
        kept, merged = _zip_audio(embeds_LD[index], video, importance, shares.audio)
        embeds_LD = embeds_LD.index_copy(0, index, merged)
        keep_L[index] = kept
    if shares.video > 0 and len(grids.time):
        audio_kept = keep_L.cpu().numpy()[audio]
        start = positions[0, np.append(audio, grids.index[:, 0])].min()
        drops, place = _grid_drops(
            grids,
            grid_group=(grids.time - start) // layout.positions_per_chunk,
            audio_group=(positions[0, audio] - start) // layout.positions_per_chunk,
            audio_kept=audio_kept,
            video_drop=shares.video,
        )
        _prune_video(unzipped_LD, keep_L, grids, place, drops)
    [result] = gather_kept([len(host_ids)], embeds_LD, keep_L, [int(keep_L.sum())])
    return result


def _zip_audio(
    audio_AD: Tensor, video_VD: Tensor, importance_A: Tensor, audio_drop: float
) -> tuple[Tensor, Tensor]:
    """Return which audio tokens stay [A], and all of them with the anchors merged [A, D]."""
    num = audio_AD.shape[0]
    num_top = round((1 - audio_drop) * num)
    order = importance_A.to(audio_AD.device).float().sort(descending=True, stable=True).indices
    rest = order[num_top:].sort().values
    num_anchors = min(round(ANCHORS * num), len(rest))
    kept = torch.zeros(num, dtype=torch.bool, device=audio_AD.device)
    kept[order[:num_top]] = True
    if num_anchors == 0:
        return kept, audio_AD
    stride = len(rest) // num_anchors
    is_anchor = torch.arange(len(rest), device=rest.device) % stride == 0
    is_anchor[num_anchors * stride :] = False
    anchors = rest[: num_anchors * stride : stride]
    kept[anchors] = True
    pool = rest[torch.nonzero_static(~is_anchor, size=len(rest) - num_anchors).squeeze(1)]
    if len(pool) == 0:
        return kept, audio_AD
    return kept, _merge(audio_AD, video_VD, anchors, pool)


def _merge(audio_AD: Tensor, video_VD: Tensor, anchors: Tensor, pool: Tensor) -> Tensor:
    """Merge into each anchor the pool's tokens that are most like it, and of these most visual."""
    direction = F.normalize(audio_AD.detach().float(), dim=-1)
    nearest = (direction[pool] @ direction[anchors].T).argmax(1)
    video = F.normalize(video_VD.detach().float(), dim=-1)
    seen = torch.cat([(part @ video.T).amax(1) for part in direction[pool].split(_POOL_ROWS)])
    # By anchor, of one anchor the highest first: a token's rank is its place behind the first.
    order = seen.sort(descending=True, stable=True).indices
    order = order[nearest[order].sort(stable=True).indices]
    owner = nearest[order]
    start = torch.searchsorted(owner, torch.arange(len(anchors), device=owner.device))
    place = start[:, None] + torch.arange(_MERGED, device=owner.device)
    inside = place < len(order)
    place = place.clamp(max=len(order) - 1)
    inside &= owner[place] == torch.arange(len(anchors), device=owner.device)[:, None]
    member = order[place]
    weight = seen[member].masked_fill(~inside, -torch.inf).softmax(1).nan_to_num(0)
    taken_in = (weight[..., None] * audio_AD[pool[member]].float()).sum(1)
    anchor = audio_AD[anchors].float()
    merged = torch.where(inside[:, :1], (anchor + taken_in) / 2, anchor)
    return audio_AD.index_copy(0, anchors, merged.to(audio_AD.dtype))


def group_shares(
    video_drop: float, num_video: Integers, num_audio: Integers, num_kept: Integers
) -> NDArray[np.float64]:
    """Return the share of video each group [K] loses, from its tokens and the audio it keeps.

    Groups with audio: .75 - .40 * kept share, then all but the (first) lowest and highest
    rescaled by one factor so that the mean over tokens is `video_drop`, and clamped to
    [.35, .75]. Groups without: `video_drop`. With fewer than three groups nothing lies between
    the lowest and the highest.
    """
    shares = np.full(len(num_video), video_drop)
    guided = np.flatnonzero((num_video > 0) & (num_audio > 0))
    if len(guided) == 0:
        return shares
    # the division first: equal shares are equal floats then, and the first of equals is fixed
    base = _HIGHEST - (_HIGHEST - LOWEST) * (num_kept[guided] / num_audio[guided])
    if len(guided) > 2:
        tokens = num_video[guided]
        between = np.ones(len(guided), dtype=bool)
        between[[base.argmin(), base.argmax()]] = False
        fixed = (base * tokens)[~between].sum()
        wanted = video_drop * tokens.sum() - fixed
        base[between] *= wanted / (base * tokens)[between].sum()
    shares[guided] = base.clip(LOWEST, _HIGHEST)
    return shares


def _grid_drops(
    grids: Grids,
    *,
    grid_group: Integers,
    audio_group: Integers,
    audio_kept: NDArray[np.bool_],
    video_drop: float,
) -> tuple[Integers, Integers]:
    """Return how many tokens each grid loses [G], and its place within its group [G]."""
    num_groups = int(max(grid_group.max(), audio_group.max(initial=0))) + 1
    shares = group_shares(
        video_drop,
        np.bincount(grid_group, weights=grids.num, minlength=num_groups).astype(np.int64),
        np.bincount(audio_group, minlength=num_groups),
        np.bincount(audio_group[audio_kept], minlength=num_groups),
    )
    # a product that is whole but for rounding is whole: .55 * 20 is 11
    drops = (grids.num * shares[grid_group] + 1e-9).astype(np.int64)
    place = np.arange(len(grid_group)) - np.searchsorted(grid_group, grid_group)
    return drops, place


def _prune_video(
    tokens_LD: Tensor, keep_L: Tensor, grids: Grids, place: Integers, drops: Integers
) -> None:
    """Take the tokens the grids lose out of `keep_L`: even grids in space, odd ones in time."""
    device = tokens_LD.device
    index = torch.from_numpy(grids.index).to(device)
    valid = torch.arange(index.shape[1], device=device) < torch.from_numpy(grids.num[:, None]).to(
        device
    )
    num_dropped = torch.from_numpy(drops).to(device)
    even = np.flatnonzero(place % 2 == 0)
    # Only equal grids can be compared token by token; an odd grid of another size stays whole.
    odd = np.flatnonzero(place % 2 == 1)
    odd = odd[grids.num[odd] == grids.num[odd - 1]]
    kept = valid.clone()
    kept[even] = ~drop_highest(
        density_peaks(tokens_LD[index[even]], valid[even]),
        valid[even],
        (valid.sum(1) - num_dropped)[even],
    )
    kept[odd] = drop_highest(
        temporal_similarity(tokens_LD[index[odd]], tokens_LD[index[odd - 1]]),
        valid[odd],
        num_dropped[odd],
    )
    # The padding (index 0) is pointed at its grid's first token.
    index = torch.where(valid, index, index[:, :1])
    keep_L[index] = torch.where(valid, kept, kept[:, :1])
