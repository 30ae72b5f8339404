"""The staged path against transformers' fused forward, on a tiny model in the published formats."""

import pytest
import torch
from torch import Tensor

from omnisift.backbone import Backbone
from omnisift.checkpoint import load_backbone
from omnisift.compress import compress_batch
from omnisift.compression_plan import DropShares
from omnisift.layout import Block, num_audio_tokens, place_block
from omnisift.media import log_mel, num_mel_frames, patchify
from omnisift.mini.tiny import write_tiny_model


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def _clip(num_frames: int, height: int, width: int, samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_frames * height + samples)
    size = (num_frames, height, width, 3)
    frames = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return frames, torch.randn(samples, generator=generator) * 0.1


def _block(backbone: Backbone, frames: Tensor, audio: Tensor, seconds_per_grid: float) -> Block:
    return place_block(
        backbone.layout,
        grids=frames.shape[0] // 2,
        height=frames.shape[1] // 28,
        width=frames.shape[2] // 28,
        seconds_per_grid=seconds_per_grid,
        audio_tokens=num_audio_tokens(num_mel_frames(len(audio))),
    )


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "samples", "seconds_per_grid"),
    [
        (8, 56, 84, 16_000 * 4, 1.0),
        (6, 84, 56, 16_000 * 7, 1.0),  # sound longer than the pictures
        (10, 56, 56, 16_000 * 2, 1.0),  # and shorter
        (6, 56, 56, 16_000 * 9, 3.0),  # sampled below 2 fps
        (4, 56, 84, 0, 1.0),  # silent
    ],
)
def test_staged_equals_fused(
    backbone: Backbone,
    num_frames: int,
    height: int,
    width: int,
    samples: int,
    seconds_per_grid: float,
) -> None:
    frames, audio = _clip(num_frames, height, width, samples)
    block = _block(backbone, frames, audio, seconds_per_grid)
    prefix, suffix = torch.arange(5, 12), torch.arange(40, 46)
    ids = torch.cat([prefix, torch.from_numpy(block.ids), suffix])

    patches, grid = patchify(frames)
    fused_input = {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values_videos": patches,
        "video_grid_thw": torch.tensor([grid]),
        "video_second_per_grid": torch.tensor([seconds_per_grid]),
        "use_audio_in_video": samples > 0,
    }
    if samples:
        mel = log_mel(audio)
        fused_input["input_features"] = mel[None]
        fused_input["feature_attention_mask"] = torch.ones(1, mel.shape[1], dtype=torch.long)
    with torch.no_grad():
        fused = backbone.model(**fused_input).logits

    [video] = backbone.encode_video([frames])
    [sound] = backbone.encode_audio([audio])
    start = len(prefix)
    embeds = torch.cat(
        [backbone.embed(prefix), backbone.place(block, video, sound), backbone.embed(suffix)]
    )
    resume = start + block.next_position
    positions = torch.cat(
        [
            torch.arange(start).expand(3, -1),
            torch.from_numpy(block.positions) + start,
            torch.arange(resume, resume + len(suffix)).expand(3, -1),
        ],
        dim=1,
    )
    with torch.no_grad():
        staged = backbone.model(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            position_ids=positions[:, None],
        ).logits
    torch.testing.assert_close(staged, fused, rtol=0, atol=1e-5)


def test_clips_encoded_together_equal_clips_encoded_alone(backbone: Backbone) -> None:
    clips = [_clip(4, 56, 84, 30_000), _clip(8, 84, 56, 100), _clip(2, 28, 28, 70_001)]
    together = zip(
        backbone.encode_video([frames for frames, _ in clips]),
        backbone.encode_audio([audio for _, audio in clips]),
        strict=True,
    )
    for (frames, audio), (video, sound) in zip(clips, together, strict=True):
        torch.testing.assert_close(video, backbone.encode_video([frames])[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(sound, backbone.encode_audio([audio])[0], rtol=0, atol=1e-5)
        assert sound.shape[0] == num_audio_tokens(num_mel_frames(len(audio)))


def test_keeping_everything_changes_nothing(backbone: Backbone) -> None:
    frames, audio = _clip(6, 56, 56, 40_000)
    block = _block(backbone, frames, audio, 1.0)
    [video], [sound] = backbone.encode_video([frames]), backbone.encode_audio([audio])
    embeds = backbone.place(block, video, sound)
    [result] = compress_batch(
        [(embeds, torch.from_numpy(block.ids), torch.from_numpy(block.positions))],
        DropShares(0.0, 0.0),
        backbone.layout,
        selector=None,
    )
    assert torch.equal(result.embeds, embeds)
    assert result.keep_mask.all()
