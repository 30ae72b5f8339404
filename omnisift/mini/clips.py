"""Scenes as real files: H.264 video and AAC sound in an mp4."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from omnisift.media import SAMPLE_RATE
from omnisift.mini.pictures import draw, plan_pictures
from omnisift.mini.sounds import AAC_FRAME, plan_sounds, render
from omnisift.mini.world import Scene

_FPS = 12  # of which the pipeline samples every sixth
_SIDE = 280  # larger than what the model reads: the decode stage has something to scale


def write_clip(path: Path, scene: Scene) -> Path:
    """Encode a scene to `path` (.mp4); return it."""
    times = torch.arange(scene.duration_s * _FPS) / _FPS
    plan = plan_pictures([scene])
    wave = render(plan_sounds([scene]), scene.duration_s)[0].numpy()
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=_FPS, options={"crf": "20", "preset": "fast"})
        video.width = video.height = _SIDE
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        audio.bit_rate = 64_000
        # A few frames at a time: those of 20 s at once are a gigabyte of intermediate results.
        for some in times.split(24):
            frames, _ = draw(plan, some, side=_SIDE)
            for frame in (frames[0] * 255).round().byte().permute(0, 2, 3, 1).numpy():
                container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        for start in range(0, len(wave), AAC_FRAME):
            piece = np.ascontiguousarray(wave[None, start : start + AAC_FRAME])
            sound = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
            sound.sample_rate, sound.pts = SAMPLE_RATE, start
            sound.time_base = Fraction(1, SAMPLE_RATE)
            container.mux(audio.encode(sound))
        container.mux(audio.encode())
    return path
