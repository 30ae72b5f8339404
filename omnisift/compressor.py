"""From a clip to its kept tokens: the towers, the layout and the compression in their order.

Shapes: T frames, N samples, n kept tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omnisift.audio_importance import encode_audio_with_importance
from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.compress import DropShares
from omnisift.layout import Block, Modality, num_audio_tokens, place_block
from omnisift.media import FACTOR, TEMPORAL_PATCH, num_mel_frames
from omnisift.methods import compress_with, find_method
from omnisift.transfer import download


class TooLongError(ValueError):
    """A video, or a prompt with it, reaches beyond the positions the model was made for."""


@dataclass(frozen=True)
class Clip:
    """What the towers read of one video."""

    frames: Tensor  # uint8 [T, H, W, 3], T even, H and W multiples of 28
    audio: Tensor  # float32 [N] mono at 16 kHz, empty when silent
    fps: float  # sampled frames a second


@dataclass(frozen=True)
class KeptTokens:
    """What answers need of a video: independent of the question, so it can be kept."""

    embeds: Tensor  # [n, D]
    positions: NDArray[np.int32]  # [3, n], relative to the block's start
    modality: NDArray[np.uint8]  # [n]
    next_position: int  # where the text behind the block continues, relative
    kept_index: NDArray[np.int32]  # [n], index in the uncompressed block
    num_video_tokens: int  # before compression
    num_audio_tokens: int

    @property
    def kept_video_tokens(self) -> int:
        """Return how many video tokens were kept."""
        return int((self.modality == Modality.VIDEO).sum())

    @property
    def kept_audio_tokens(self) -> int:
        """Return how many audio tokens were kept."""
        return int((self.modality == Modality.AUDIO).sum())


class VideoCompressor:
    """Shorten clips to their kept tokens."""

    def __init__(
        self,
        backbone: Backbone,
        selector: AudioSelector,
        shares: DropShares,
        *,
        method: str = "omnisift",
        nominal_timestamps: bool = False,
    ) -> None:
        """Take the towers of `backbone`; its LLM layers are not needed.

        `method` is one of `methods.METHODS`; those without a selector leave it aside.
        `nominal_timestamps` stamps every grid one second apart, as the reference does, also
        where a long video was sampled more sparsely.
        """
        self.backbone = backbone
        self.selector = selector.to(backbone.device).eval()
        self.shares = shares
        self.method = method
        self.needs = find_method(method)
        self.nominal_timestamps = nominal_timestamps

    def block_of(self, clip: Clip) -> Block:
        """Lay out a clip. Raises TooLongError where it cannot fit the model's positions."""
        num_frames, height, width, _ = clip.frames.shape
        seconds_per_grid = TEMPORAL_PATCH / clip.fps
        block = place_block(
            self.backbone.layout,
            grids=num_frames // TEMPORAL_PATCH,
            height=height // FACTOR,
            width=width // FACTOR,
            seconds_per_grid=1.0 if self.nominal_timestamps else seconds_per_grid,
            audio_tokens=num_audio_tokens(num_mel_frames(clip.audio.shape[0])),
        )
        if block.next_position >= self.backbone.max_positions:
            raise TooLongError(
                f"the video ends at position {block.next_position}, the model was made for "
                f"{self.backbone.max_positions} (25 a second)"
            )
        return block

    @torch.inference_mode()
    def __call__(
        self, clips: Sequence[Clip], *, video_keys: Sequence[str] | None = None
    ) -> list[KeptTokens]:
        """Return the kept tokens of each clip, on the CPU.

        `video_keys`, one a clip, seed the methods that leave something to chance.
        """
        blocks = [self.block_of(clip) for clip in clips]
        video = self.backbone.encode_video([clip.frames for clip in clips])
        waveforms = [clip.audio for clip in clips]
        importance: list[Tensor] | None = None
        if self.needs.audio_importance:
            audio, importance = encode_audio_with_importance(self.backbone, waveforms)
        else:
            audio = self.backbone.encode_audio(waveforms)
        layout = self.backbone.layout
        compressed = compress_with(
            self.method,
            [
                (
                    self.backbone.place(block, seen, heard),
                    torch.from_numpy(block.ids),
                    torch.from_numpy(block.positions),
                )
                for block, seen, heard in zip(blocks, video, audio, strict=True)
            ],
            video_drop=self.shares.video,
            audio_drop=self.shares.audio,
            video_token_id=layout.video_token_id,
            audio_token_id=layout.audio_token_id,
            selector=self.selector,
            video_keys=video_keys,
            audio_importance=importance,
            positions_per_chunk=layout.positions_per_chunk,
        )
        on_host = download(
            [tensor for result in compressed for tensor in (result.embeds, result.kept_index)]
        )
        kept = []
        for block, embeds, index_n in zip(blocks, on_host[::2], on_host[1::2], strict=True):
            index = index_n.numpy()
            kept.append(
                KeptTokens(
                    embeds=embeds,
                    positions=block.positions[:, index].astype(np.int32),
                    modality=block.modality[index],
                    next_position=block.next_position,
                    kept_index=index.astype(np.int32),
                    num_video_tokens=int((block.modality == Modality.VIDEO).sum()),
                    num_audio_tokens=int((block.modality == Modality.AUDIO).sum()),
                )
            )
        return kept
