"""From a clip to its kept tokens: the towers, the layout and the compression in their order.

Shapes: T frames, N samples, n kept tokens, D width.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omnisift.audio_importance import encode_audio_with_importance
from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.batch_memory import ClipSize, MemoryBudget
from omnisift.compress import Compressed
from omnisift.compression_plan import DropShares
from omnisift.layout import Block, Modality, num_audio_tokens, place_block
from omnisift.media import FACTOR, TEMPORAL_PATCH, num_mel_frames
from omnisift.methods import compress_with, find_method, most_kept
from omnisift.transfer import Download, start_download


class TooLongError(ValueError):
    """A video, or a prompt with it, reaches beyond the positions the model was made for."""


@dataclass(frozen=True)
class Clip:
    """What the towers read of one video."""

    frames: Tensor  # uint8 [T, H, W, 3], T even, H and W multiples of 28
    audio: Tensor  # float32 [N] mono at 16 kHz, empty when silent
    fps: float  # sampled frames a second

    @property
    def size(self) -> ClipSize:
        """Return what the clip consists of, in tokens."""
        frames, height, width, _ = self.frames.shape
        audio = num_audio_tokens(num_mel_frames(self.audio.shape[0]))
        return ClipSize(frames // TEMPORAL_PATCH, height // FACTOR, width // FACTOR, audio)


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


@dataclass(frozen=True)
class _Moment:
    """A moment in the work of a device."""

    host_s: float
    event: torch.cuda.Event | None  # of a GPU, which the host runs ahead of

    @classmethod
    def now(cls, device: torch.device) -> "_Moment":
        event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if event is not None:
            event.record()
        return cls(time.perf_counter(), event)

    def until(self, end: "_Moment") -> float:
        """Return the seconds between two moments that are past."""
        if self.event is None or end.event is None:
            return end.host_s - self.host_s
        return float(self.event.elapsed_time(end.event)) / 1e3


@dataclass(frozen=True)
class Pending:
    """Clips that a device is still compressing."""

    _blocks: Sequence[Block]
    _download: Download
    _began: _Moment
    _ended: _Moment

    def result(self) -> list[KeptTokens]:
        """Return the kept tokens of each clip, on the CPU, once they are there."""
        on_host = self._download.wait()
        kept = []
        for block, embeds, index_n in zip(self._blocks, on_host[::2], on_host[1::2], strict=True):
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

    def busy_s(self) -> float:
        """Return the seconds the device spent on the clips; `result` must have returned."""
        return self._began.until(self._ended)


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
        memory_limit_bytes: int = 6 << 30,
    ) -> None:
        """Take the towers of `backbone`; its LLM layers are not needed.

        `method` is one of `methods.METHODS`; those without a selector leave it aside.
        `nominal_timestamps` stamps every grid one second apart, as the reference does, also
        where a long video was sampled more sparsely. `memory_limit_bytes` is what a batch may
        take beyond the weights: the vision tower's slices are made to fit, how many clips make
        a batch says `budget`.
        """
        self.backbone = backbone
        self.selector = selector.to(backbone.device).eval()
        self.shares = shares
        self.method = method
        self.needs = find_method(method)
        self.nominal_timestamps = nominal_timestamps
        self._memory_limit_bytes = memory_limit_bytes

    @cached_property
    def budget(self) -> MemoryBudget:
        """Return which clips fit together."""
        compiled = self.backbone.device.type == "cuda" and self.method in ("omnisift", "none")
        return MemoryBudget(
            limit_bytes=self._memory_limit_bytes,
            bytes_per_patch=self.backbone.packed_vision.bytes_per_patch,
            bytes_per_token=self.backbone.width * self.backbone.dtype.itemsize,
            # placed, laid end to end, and what the method works with: compiled or in float32
            copies=3 if compiled else 6,
            kept=most_kept(self.method, self.shares),
        )

    def block_of(self, clip: Clip) -> Block:
        """Lay out a clip. Raises TooLongError where it cannot fit the model's positions."""
        size = clip.size
        block = place_block(
            self.backbone.layout,
            grids=size.grids,
            height=size.height,
            width=size.width,
            seconds_per_grid=1.0 if self.nominal_timestamps else TEMPORAL_PATCH / clip.fps,
            audio_tokens=size.audio,
        )
        if block.next_position >= self.backbone.max_positions:
            raise TooLongError(
                f"the video ends at position {block.next_position}, the model was made for "
                f"{self.backbone.max_positions} (25 a second)"
            )
        return block

    def __call__(
        self, clips: Sequence[Clip], *, video_keys: Sequence[str] | None = None
    ) -> list[KeptTokens]:
        """Return the kept tokens of each clip, on the CPU; see `start`."""
        return self.start(clips, video_keys=video_keys).result()

    @torch.inference_mode()
    def start(self, clips: Sequence[Clip], *, video_keys: Sequence[str] | None = None) -> Pending:
        """Queue the compression of clips on the device, as one batch; a GPU is not waited for.

        `video_keys`, one a clip, seed the methods that leave something to chance.
        """
        began = _Moment.now(self.backbone.device)
        blocks = [self.block_of(clip) for clip in clips]
        compressed = self._compress(clips, blocks, video_keys)
        ended = _Moment.now(self.backbone.device)
        tensors = [tensor for result in compressed for tensor in (result.embeds, result.kept_index)]
        return Pending(blocks, start_download(tensors), began, ended)

    def _compress(
        self, clips: Sequence[Clip], blocks: Sequence[Block], video_keys: Sequence[str] | None
    ) -> list[Compressed]:
        embeds, importance = self._embed(clips, blocks)
        layout = self.backbone.layout
        return compress_with(
            self.method,
            [
                (placed, torch.from_numpy(block.ids), torch.from_numpy(block.positions))
                for placed, block in zip(embeds, blocks, strict=True)
            ],
            self.shares,
            layout,
            selector=self.selector,
            video_keys=video_keys,
            audio_importance=importance,
        )

    def _embed(
        self, clips: Sequence[Clip], blocks: Sequence[Block]
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the embeddings [L, D] of each block, and the importance of its audio if needed."""
        frames = [clip.frames for clip in clips]
        video = self.backbone.encode_video(frames, max_patches=self.budget.max_patches)
        waveforms = [clip.audio for clip in clips]
        importance: list[Tensor] | None = None
        if self.needs.audio_importance:
            audio, importance = encode_audio_with_importance(self.backbone, waveforms)
        else:
            audio = self.backbone.encode_audio(waveforms)
        # Here the towers' own tensors end: compression needs their memory.
        return [
            self.backbone.place(block, seen, heard)
            for block, seen, heard in zip(blocks, video, audio, strict=True)
        ], importance
