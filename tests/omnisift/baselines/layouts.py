"""Random prompts for the tests of the baselines."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from omnisift.layout import ModelLayout, place_block

LAYOUT = ModelLayout()
VIDEO, AUDIO, TEXT = LAYOUT.video_token_id, LAYOUT.audio_token_id, 100
WIDTH = 8
# Fast and slow sum in another order: a decision closer than this may fall either way.
DECIDED = 1e-5

RANDOM = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# Of six digits: OmniZip takes a product that is whole but for rounding, 1e-9, for whole.
SHARES = st.sampled_from([0.0, 0.3, 0.4, 0.5, 0.67, 0.7, 0.77, 1.0]) | st.integers(0, 10**6).map(
    lambda millionths: millionths / 10**6
)


@dataclass(frozen=True)
class Prompt:
    """Ids and positions of one prompt."""

    ids: list[int]  # [L]
    positions: list[list[int]]  # [3, L]

    def places(self, token_id: int) -> list[int]:
        """Return where the tokens of that id stand."""
        return [index for index, id_ in enumerate(self.ids) if id_ == token_id]


@st.composite
def _invented(draw: st.DrawFn) -> Prompt:
    """Draw unequal grids, silence, sound without pictures, sound before and behind them."""
    num_grids = draw(st.integers(0, 11))
    if draw(st.booleans()):
        sizes = [draw(st.integers(1, 9))] * num_grids
    else:
        sizes = draw(st.lists(st.integers(1, 7), min_size=num_grids, max_size=num_grids))
    step = draw(st.sampled_from([5, 12.5, 25, 25, 33.25, 50, 120]))
    start = draw(st.integers(0, 20))
    media = [
        (VIDEO, start + int(grid * step), row, grid)
        for grid, size in enumerate(sizes)
        for row in range(size)
    ]
    first = start + draw(st.sampled_from([0, 0, 0, -7, 9]))
    num_audio = draw(st.sampled_from([0, 1, 2, 3, 25, 60, 120]) | st.integers(0, 160))
    media += [(AUDIO, time, time, time) for time in range(first, first + num_audio)]
    order = draw(st.sampled_from(["interleaved", "one after another", "shuffled"]))
    if order == "interleaved":
        media.sort(key=lambda token: token[1])
    elif order == "shuffled":
        media = draw(st.permutations(media))
    text = [(TEXT, 0, 0, 0)] * draw(st.integers(0, 3))
    tokens = [*text, *media, (TEXT, 2000, 2000, 2000)]
    ids, *positions = (list(row) for row in zip(*tokens, strict=True))
    return Prompt(ids, positions)


@st.composite
def placed(draw: st.DrawFn) -> Prompt:
    """Draw a block as the product lays it out, with text around it."""
    block = place_block(
        LAYOUT,
        grids=draw(st.integers(1, 11)),
        height=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 3)),
        seconds_per_grid=draw(st.sampled_from([0.2, 0.5, 1.0, 1.0, 1.3, 2.0])),
        audio_tokens=draw(st.sampled_from([0, 1, 25, 100]) | st.integers(0, 250)),
    )
    before = draw(st.integers(1, 4))
    after = np.full((3, 1), block.next_position + before)
    positions = np.concatenate(
        [np.broadcast_to(np.arange(before), (3, before)), block.positions + before, after], axis=1
    )
    return Prompt([TEXT] * before + block.ids.tolist() + [TEXT], positions.tolist())


PROMPTS = _invented() | placed()


def tensors_of(
    prompt: Prompt, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random embeddings [L, D], the ids [L] and the positions [3, L]."""
    generator = torch.Generator().manual_seed(seed)
    # a common part, as real features have: cosines then are not spread around zero
    embeds = torch.randn(len(prompt.ids), WIDTH, generator=generator) + 0.5
    return embeds.to(dtype), torch.tensor(prompt.ids), torch.tensor(prompt.positions)


def cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine of two tokens [D], 0 where one of them is 0."""
    norms = float(one.norm()) * float(other.norm())
    return float(one @ other) / norms if norms > 0 else 0.0
