"""Compress: vision tower, audio tower and the method of compression in one actor."""

import logging
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.checkpoint import build_selector, load_backbone, read_selector, resolve
from omnisift.codec import Codec, encode
from omnisift.compression_plan import DropShares
from omnisift.compressor import Clip, KeptTokens, TooLongError, VideoCompressor
from pipeline import rows

log = logging.getLogger(__name__)

# Arrow's buffers are read-only; the towers never write to their input.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class CompressSettings:
    """What a compressing actor is started with."""

    model: str
    revision: str
    selector: str  # "" for the model's own
    seed: int
    method: str
    shares: DropShares
    nominal_timestamps: bool
    memory_limit_bytes: int
    codec: Codec
    device: str  # "cuda" or "cpu"


class Compress:
    """Keep the tokens that carry information.

    Reads: video_key, frames, audio, fps. Writes: tokens, positions, modality, kept_index and the
    counts; compress_s, the row's share of the seconds that the device spent. Full embeddings
    (7 KB a token) never leave the actor.

    Two threads may call at the same time: while the GPU computes the batch of one, the other
    brings frames to it or takes kept tokens from it.
    """

    def __init__(self, settings: CompressSettings) -> None:
        """Load the towers and the selector."""
        self.codec = settings.codec
        folder: Path = resolve(settings.model, settings.revision)
        backbone: Backbone = load_backbone(folder, part="towers", device=settings.device)
        selector: AudioSelector = build_selector(
            read_selector(folder, settings.selector), backbone.width, seed=settings.seed
        )
        self.compressor = VideoCompressor(
            backbone,
            selector,
            settings.shares,
            method=settings.method,
            nominal_timestamps=settings.nominal_timestamps,
            memory_limit_bytes=settings.memory_limit_bytes,
        )
        self._queueing = threading.Lock()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turn a block of rows.DECODED into one of rows.KEPT."""
        videos = list(rows.iterate(block))
        batch = [
            (video, clip)
            for video in videos
            if video["error_type"] is None and (clip := self._accept(video)) is not None
        ]
        for places in self.compressor.budget.split([clip.size for _, clip in batch]):
            self._compress([batch[place] for place in places])
        return rows.build(videos, rows.KEPT)

    def _accept(self, video: dict[str, Any]) -> Clip | None:
        """Return the clip of a row; one that cannot be compressed fails here."""
        clip = _clip(video)
        try:
            self.compressor.block_of(clip)
        except TooLongError as error:
            message = (
                f"{video['uri']}: {error}; set media.window_s to answer it window by window, or "
                "media.timestamps=nominal to stamp the sampled grids a second apart as the "
                "reference does"
            )
            video.update(rows.failed(video, "compress", "too_long", message))
            return None
        budget = self.compressor.budget
        needed = budget.needed([clip.size])
        if needed > budget.limit_bytes:
            self._fail_of_memory(
                video,
                f"take {needed / 2**30:.2f} GiB beyond the weights, compression."
                f"memory_limit_bytes allows {budget.limit_bytes / 2**30:.2f}; raise it,",
            )
            return None
        return clip

    def _compress(self, batch: Sequence[tuple[dict[str, Any], Clip]]) -> None:
        """Fill in the rows; a batch that does not fit the GPU is halved until it does."""
        keys = [video["video_key"] for video, _ in batch]
        kept = None
        try:
            with self._queueing:
                pending = self.compressor.start([clip for _, clip in batch], video_keys=keys)
            kept = pending.result()
        except torch.OutOfMemoryError:
            # Behind this block: as long as the error is handled, it holds what the towers had.
            log.warning("%d videos together do not fit the GPU's memory", len(batch))
        if kept is not None:
            spent_s = pending.busy_s() / len(batch)
            for (video, _), tokens in zip(batch, kept, strict=True):
                video.update(_columns(tokens, self.codec), compress_s=spent_s)
            return
        torch.cuda.empty_cache()
        if len(batch) == 1:
            give = "give the actor more of the GPU (pools.compress_gpus),"
            self._fail_of_memory(batch[0][0], f"do not fit the GPU; {give}")
            return
        half = len(batch) // 2
        self._compress(batch[:half])
        self._compress(batch[half:])

    def _fail_of_memory(self, video: dict[str, Any], why: str) -> None:
        shape = "x".join(map(str, video["frames_shape"]))
        message = (
            f"{video['uri']}: frames {shape} {why} or lower media.max_pixels or media.max_frames"
        )
        video.update(rows.failed(video, "compress", "out_of_memory", message))


def _clip(row: dict[str, Any]) -> Clip:
    """Return views of the row's bytes: 150 MB of frames are not copied to be read once."""
    audio = np.frombuffer(row["audio"], np.float32) if row["has_audio"] else np.empty(0, np.float32)
    return Clip(
        frames=torch.from_numpy(np.frombuffer(row["frames"], np.uint8)).view(row["frames_shape"]),
        audio=torch.from_numpy(audio),
        fps=row["fps"],
    )


def _columns(kept: KeptTokens, codec: Codec) -> dict[str, Any]:
    return {
        "tokens": encode(kept.embeds, codec),
        "token_dtype": codec,
        "token_shape": list(kept.embeds.shape),
        "positions": list(kept.positions),
        "modality": kept.modality,
        "next_position": kept.next_position,
        "kept_index": kept.kept_index,
        "num_video_tokens": kept.num_video_tokens,
        "num_audio_tokens": kept.num_audio_tokens,
        "kept_video_tokens": kept.kept_video_tokens,
        "kept_audio_tokens": kept.kept_audio_tokens,
    }
