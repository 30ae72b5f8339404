"""DyCoke's token temporal merging (arXiv 2411.15024): drop what an earlier grid shows as well.

Shapes: L tokens of a sequence, R rows of N tokens (grids, or pieces of audio), D width.
"""

import numpy as np
import torch
from torch import Tensor

from omnisift.compress import Compressed, Sequence3d, check_inputs, gather_kept
from omnisift.compression_plan import DropShares
from omnisift.layout import Integers, ModelLayout, find_grids, pad_rows, rows_alike
from omnisift.video_pruning import drop_highest, temporal_similarity

GROUP = 4
# In a group of four rows, how far back stands the row each is compared with; 0: kept whole.
_LOOK_BACK = np.array([0, 1, 2, 1])


def merge_temporally(
    sequence: Sequence3d,
    shares: DropShares,
    layout: ModelLayout,
) -> Compressed:
    """Shorten one sequence (inputs_embeds [L, D], input_ids [L], position_ids [3, L]).

    Groups are four grids f0..f3: f0 stays whole, f1 and f2 lose the tokens most similar to f0's,
    f3 those most similar to the unpruned f2's, compared index by index; a grid of another size
    than its partner stays whole. The audio of a group (from its first time to the next group's)
    is cut into four equal pieces, which are treated alike; up to three tokens behind the last
    piece stay. A last group of fewer grids has no f3, f2, f1.

    Three rows of four lose 4/3 of the drop share, at most all: shares above .75 are not reached.
    Raises ValueError for shares outside [0, 1] and shapes that do not belong together.
    """
    check_inputs([sequence], shares)
    embeds_LD, ids, position_ids = sequence
    host_ids, positions = ids.cpu().numpy(), position_ids.cpu().numpy()
    grids = find_grids(host_ids, positions, video_token_id=layout.video_token_id)
    audio = np.flatnonzero(host_ids == layout.audio_token_id)
    group = np.searchsorted(grids.time[::GROUP], positions[0, audio], side="right") - 1
    pieces, num = _pieces(audio[group >= 0], group[group >= 0], -(-len(grids.time) // GROUP))
    keep_L = torch.ones(len(host_ids), dtype=torch.bool, device=embeds_LD.device)
    num_dropped = 0
    for rows, counts, share in (
        (grids.index, grids.num, shares.video),
        (pieces, num, shares.audio),
    ):
        num_dropped += _drop_repeated(embeds_LD, keep_L, rows, counts, share)
    [result] = gather_kept([len(host_ids)], embeds_LD, keep_L, [len(host_ids) - num_dropped])
    return result


def _pieces(audio: Integers, group: Integers, num_groups: int) -> tuple[Integers, Integers]:
    """Cut each group's audio into four rows of equal length; return rows, counts."""
    rows, counts = pad_rows(group, audio, num_groups)
    size = counts // GROUP
    column = np.arange(rows.shape[1])
    owner, place = np.nonzero(column < GROUP * size[:, None])
    return pad_rows(owner * GROUP + place // size[owner], rows[owner, place], GROUP * num_groups)


def _drop_repeated(
    embeds_LD: Tensor, keep_L: Tensor, rows: Integers, counts: Integers, share: float
) -> int:
    """Take the tokens that repeat an earlier row out of `keep_L`; return how many they are."""
    row = np.arange(len(rows))
    partner = row - _LOOK_BACK[row % GROUP]
    num_dropped = np.where(
        (partner != row) & (counts == counts[partner]),
        (counts * min(1.0, share * 4 / 3)).astype(np.int64),
        0,
    )

    def on_device(array: Integers) -> Tensor:
        return torch.from_numpy(array).to(embeds_LD.device)

    later = np.flatnonzero(num_dropped)
    for alike in rows_alike(counts[later]):
        chosen = later[alike]
        width = counts[chosen].max()
        index_RN = on_device(rows[chosen, :width])
        valid = torch.arange(width, device=embeds_LD.device) < on_device(counts[chosen])[:, None]
        similarity = temporal_similarity(
            embeds_LD[index_RN], embeds_LD[on_device(rows[partner[chosen], :width])]
        )
        kept = drop_highest(similarity, valid, on_device(num_dropped[chosen]))
        # Each token stands in one row; the padding (index 0) is pointed at its row's first token.
        index_RN = torch.where(valid, index_RN, index_RN[:, :1])
        keep_L[index_RN] = torch.where(valid, kept, kept[:, :1])
    return int(num_dropped.sum())
