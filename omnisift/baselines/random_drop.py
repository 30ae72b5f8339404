"""Random: each chunk loses its shares of video and of audio, uniformly.

Shapes: L tokens of all sequences, C chunks.
"""

from collections.abc import Sequence

import numpy as np
import torch

from omnisift.chance import draw
from omnisift.compress import Compressed, Sequence3d, check_inputs, gather_kept, lay_end_to_end
from omnisift.compression_plan import DropShares
from omnisift.layout import ModelLayout, find_chunks
from omnisift.video_pruning import drop_highest


def drop_at_random(
    sequences: Sequence[Sequence3d],
    shares: DropShares,
    layout: ModelLayout,
    *,
    video_keys: Sequence[str],
) -> list[Compressed]:
    """Shorten sequences (inputs_embeds [L, D], input_ids [L], position_ids [3, L]) at random.

    Uniform per modality and chunk, seeded by video key and chunk index (see `chance.draw`). Both
    grids of a chunk are one pool, which loses int(n * share) for each grid of n tokens: as many
    as OmniSIFT takes from equal grids. Raises ValueError for shares outside [0, 1], shapes that do
    not belong together, and for missing keys.
    """
    check_inputs(sequences, shares)
    chunks = find_chunks(
        [(ids.cpu().numpy(), positions.cpu().numpy()) for _, ids, positions in sequences],
        video_token_id=layout.video_token_id,
        audio_token_id=layout.audio_token_id,
    )
    lengths = [embeds.shape[0] for embeds, _, _ in sequences]
    drawn = draw(chunks, lengths, video_keys)
    drops = np.zeros(sum(lengths), dtype=np.int64)
    for parts, share in (
        (((chunks.first, chunks.num_first), (chunks.second, chunks.num_second)), shares.video),
        (((chunks.audio, chunks.num_audio),), shares.audio),
    ):
        index = np.concatenate([rows for rows, _ in parts], axis=1)
        valid = np.concatenate(
            [np.arange(rows.shape[1]) < counts[:, None] for rows, counts in parts], axis=1
        )
        num_dropped = sum((counts * share).astype(np.int64) for _, counts in parts)
        kept_rows = drop_highest(*map(torch.from_numpy, (drawn[index], valid, num_dropped)))
        dropped = valid & ~kept_rows.numpy()
        # Summed: the padding of a row (index 0, nothing dropped) must not overwrite a token.
        np.add.at(drops, index, dropped)
    kept = drops == 0
    num_kept = [int(part.sum()) for part in np.split(kept, np.cumsum(lengths)[:-1])]
    tokens_LD = lay_end_to_end([embeds for embeds, _, _ in sequences])
    keep_L = torch.from_numpy(kept).to(tokens_LD.device)
    return gather_kept(lengths, tokens_LD, keep_L, num_kept)
