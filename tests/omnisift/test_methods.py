"""Every method behind one call, from tensors and from clips."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.checkpoint import build_selector, load_backbone, read_selector
from omnisift.compress import Sequence3d, compress_batch, drop_shares
from omnisift.compression_plan import DropShares
from omnisift.compressor import Clip, VideoCompressor
from omnisift.layout import ModelLayout, place_block
from omnisift.methods import METHODS, compress_with, most_kept
from omnisift.mini.tiny import write_tiny_model

LAYOUT = ModelLayout()
WIDTH = 8
# DyCoke keeps a quarter at least, OmniZip a quarter of the video of groups with sound.
SHARES = DropShares(video=0.6, audio=0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), selector=True)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(folder, part="towers")


def _sequence(audio_tokens: int, grids: int = 8, height: int = 3) -> Sequence3d:
    block = place_block(
        LAYOUT, grids=grids, height=height, width=4, seconds_per_grid=1.0, audio_tokens=audio_tokens
    )
    generator = torch.Generator().manual_seed(audio_tokens)
    embeds = torch.randn(len(block.ids), WIDTH, generator=generator) + 0.5
    return embeds, torch.from_numpy(block.ids), torch.from_numpy(block.positions)


def _importance(sequences: list[Sequence3d]) -> list[Tensor]:
    return [torch.arange(int((ids == LAYOUT.audio_token_id).sum())) for _, ids, _ in sequences]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shares", [DropShares(0.0, 0.0), SHARES, DropShares(1.0, 1.0)])
def test_a_batch_of_sound_and_silence(method: str, shares: DropShares) -> None:
    sequences = [_sequence(200), _sequence(0), _sequence(90)]
    torch.manual_seed(0)
    results = compress_with(
        method,
        sequences,
        shares,
        LAYOUT,
        selector=AudioSelector(WIDTH, 16, 2),
        video_keys=["a", "b", "c"],
        audio_importance=_importance(sequences),
    )
    for (embeds, ids, _), result in zip(sequences, results, strict=True):
        media = (ids == LAYOUT.video_token_id) | (ids == LAYOUT.audio_token_id)
        assert result.keep_mask[~media].all()
        assert result.embeds.shape == (int(result.keep_mask.sum()), WIDTH)
        assert torch.equal(result.kept_index, result.keep_mask.nonzero().flatten())
        if method == "none" or shares == DropShares(0.0, 0.0):
            assert torch.equal(result.embeds.detach(), embeds)
        elif shares == SHARES and method != "omnizip":  # which clamps, and keeps anchors
            assert float(result.keep_mask[media].float().mean()) == pytest.approx(0.44, abs=0.12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("video_drop", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("audio_drop", [0.1, 0.9])
def test_no_clip_keeps_more_than_is_counted(
    method: str, video_drop: float, audio_drop: float
) -> None:
    """Video alone, with usual sound, and a picture under long sound."""
    shares = DropShares(video=video_drop, audio=audio_drop)
    torch.manual_seed(0)
    selector = AudioSelector(WIDTH, 16, 2)
    for grids, audio_tokens in ((16, 0), (16, 400), (5, 300)):
        sequence = _sequence(audio_tokens, grids, height=8)
        [result] = compress_with(
            method,
            [sequence],
            shares,
            LAYOUT,
            selector=selector,
            video_keys=["a"],
            audio_importance=_importance([sequence]),
        )
        kinds = torch.tensor([LAYOUT.video_token_id, LAYOUT.audio_token_id])
        media = torch.isin(sequence[1], kinds)
        rounding = 2 * grids + 32 * (method == "dycoke" and grids % 4 > 0)
        kept = int(result.keep_mask[media].sum())
        assert kept <= most_kept(method, shares) * int(media.sum()) + rounding
        assert most_kept(method, shares) <= 1


def test_omnisift_is_the_published_method() -> None:
    torch.manual_seed(0)
    selector = AudioSelector(WIDTH, 16, 2)
    with torch.no_grad():
        [one] = compress_with("omnisift", [_sequence(200)], SHARES, LAYOUT, selector=selector)
        [other] = compress_batch([_sequence(200)], SHARES, LAYOUT, selector=selector)
    assert torch.equal(one.keep_mask, other.keep_mask)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("nonsense", "one of omnisift, omnizip, dycoke, random, none, .*got 'nonsense'"),
        ("random", "random needs video_keys, one for each of 1 sequences"),
        ("omnisift_no_spatial", "omnisift_no_spatial needs video_keys"),
        ("omnizip", "omnizip needs audio_importance, one for each of 1 sequences"),
        ("omnisift_audio_only", "needs a selector"),
    ],
)
def test_what_is_missing_is_named(method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_with(
            method,
            [_sequence(200)],
            DropShares(0.5, 0.5),
            LAYOUT,
        )


def _clips() -> list[Clip]:
    generator = torch.Generator().manual_seed(3)
    return [
        Clip(
            frames=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            audio=torch.randn(samples, generator=generator) * 0.1,
            fps=2.0,
        )
        for shape, samples in [((16, 84, 84, 3), 128_000), ((4, 56, 84, 3), 0)]
    ]


@pytest.mark.parametrize("method", METHODS)
def test_from_clips(method: str, folder: Path, backbone: Backbone) -> None:
    selector = build_selector(read_selector(folder), backbone.width)
    compressor = VideoCompressor(backbone, selector, drop_shares(0.35), method=method)
    kept = compressor(_clips(), video_keys=["a", "b"])
    again = compressor(_clips(), video_keys=["a", "b"])
    for one, other in zip(kept, again, strict=True):
        assert np.array_equal(one.kept_index, other.kept_index)
        assert torch.equal(one.embeds, other.embeds)
        assert len(one.kept_index) == one.embeds.shape[0] == one.positions.shape[1]
        assert (one.kept_video_tokens == one.num_video_tokens) == (method == "none")
    assert kept[0].kept_audio_tokens == (
        200 if method == "none" else {"omnizip": 120 + 10, "dycoke": 200 - 6 * 13}.get(method, 120)
    )
