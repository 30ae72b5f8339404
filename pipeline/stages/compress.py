"""Compress: vision tower, audio tower and the method of compression in one actor."""

import time
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
from omnisift.compress import DropShares
from omnisift.compressor import Clip, KeptTokens, TooLongError, VideoCompressor
from pipeline import rows


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
    codec: Codec
    device: str  # "cuda" or "cpu"


class Compress:
    """Keep the tokens that carry information.

    Reads: video_key, frames, audio, fps. Writes: tokens, positions, modality, kept_index and the
    counts. Full embeddings (7 KB a token) never leave the actor.
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
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turn a block of rows.DECODED into one of rows.KEPT."""
        return rows.build([self._compress(row) for row in rows.iterate(block)], rows.KEPT)

    def _compress(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error_type"] is not None:
            return row
        start = time.perf_counter()
        try:
            [kept] = self.compressor([_clip(row)], video_keys=[row["video_key"]])
        except TooLongError as error:
            return rows.failed(
                row,
                "compress",
                "too_long",
                f"{row['uri']}: {error}; cut the video, or set media.timestamps=nominal to stamp "
                "the sampled grids a second apart as the reference does",
            )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            shape = "x".join(map(str, row["frames_shape"]))
            return rows.failed(
                row,
                "compress",
                "out_of_memory",
                f"{row['uri']}: frames {shape} do not fit the GPU; lower media.max_pixels or "
                "media.max_frames, or give the actor more of the GPU (pools.compress_gpus)",
            )
        return {
            **row,
            **_columns(kept, self.codec),
            "compress_s": time.perf_counter() - start,
        }


def _clip(row: dict[str, Any]) -> Clip:
    # Arrow's buffers are read-only; the towers never write to their input.
    frames = torch.from_numpy(np.frombuffer(row["frames"], np.uint8).copy())
    audio = np.frombuffer(row["audio"], np.float32).copy() if row["has_audio"] else np.empty(0)
    return Clip(
        frames=frames.view(row["frames_shape"]),
        audio=torch.from_numpy(audio).float(),
        fps=row["fps"],
    )


def _columns(kept: KeptTokens, codec: Codec) -> dict[str, Any]:
    return {
        "tokens": encode(kept.embeds, codec),
        "token_dtype": codec,
        "token_shape": list(kept.embeds.shape),
        "positions": kept.positions.tolist(),
        "modality": kept.modality,
        "next_position": kept.next_position,
        "kept_index": kept.kept_index,
        "num_video_tokens": kept.num_video_tokens,
        "num_audio_tokens": kept.num_audio_tokens,
        "kept_video_tokens": kept.kept_video_tokens,
        "kept_audio_tokens": kept.kept_audio_tokens,
    }
