"""Scenes of the small model's world as the pipeline sees them: through an mp4 file."""

import tempfile
from pathlib import Path

import torch

from omnisift.compressor import Clip
from omnisift.mini.clips import write_clip
from omnisift.mini.shipped import FRAME_PIXELS
from omnisift.mini.world import Scene
from pipeline.config import DecodeConfig, MediaConfig
from pipeline.film import decode_file


def decode_scene(scene: Scene) -> Clip:
    """Render a scene as an mp4 file and decode it at the size that the model was made for."""
    media = MediaConfig(min_pixels=FRAME_PIXELS, max_pixels=FRAME_PIXELS)
    with tempfile.TemporaryDirectory() as folder:
        decoded = decode_file(write_clip(Path(folder, "scene.mp4"), scene), media, DecodeConfig())
    return Clip(torch.from_numpy(decoded.frames), torch.from_numpy(decoded.audio), decoded.fps)
