"""Measure decoding: speed beside decord alone, memory on 4K, seeking in a long video.

    python jobs/benchmark_decode.py [--only speed memory seeking] [--folder FOLDER]

It takes about five minutes and 1.2 GB of disk in FOLDER, a temporary one by default.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import decord
import torch

from omnisift.media import sample_times
from pipeline.config import DecodeConfig, MediaConfig
from pipeline.decoder_process import DecoderProcess
from pipeline.film import decode_file
from pipeline.media_index import index_video, open_media, video_stream
from pipeline.testing.clips import encode, repeat

MEDIA = MediaConfig()
LIMITS = DecodeConfig(deadline_s=3600)


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def decord_alone(path: Path, numbers: list[int]) -> None:
    """Read the same frames at full size, without resizing, as decord's documentation shows."""
    decord.VideoReader(str(path), num_threads=1).get_batch(numbers).asnumpy()


def speed(folder: Path, repeats: int = 7) -> None:
    """Compare with decord on a minute of 720p, turn and turn about, on one core."""
    encode(folder / "720p.mp4", size=(1280, 720), key_every=125)
    path = repeat(folder / "720p.mp4", folder / "minute.mp4", 60)
    with open_media(path) as container:
        index = index_video(container, video_stream(container))
    times_s, _ = sample_times(index.duration_s, fps=MEDIA.fps, max_frames=MEDIA.max_frames)
    numbers = index.frames_at(times_s).tolist()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: decode_file(path, MEDIA, LIMITS)))
        theirs.append(seconds(lambda: decord_alone(path, numbers)))
    for name, taken in (("ours, resized", ours), ("decord alone, full size", theirs)):
        print(f"{name:28}{statistics.median(taken):8.2f} s   {min(taken):.2f}..{max(taken):.2f}")
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"{'ours / decord':28}{ratio:8.2f}     aim: at most 1.10 ({len(numbers)} frames)")


def in_child(title: str, path: Path, aim: str) -> None:
    """Decode in a guarded child; print the time and the most memory that it held."""
    process = DecoderProcess(MEDIA, LIMITS)
    process.start()
    taken_s = seconds(lambda: process.decode(path))
    status = Path(f"/proc/{process.pid}/status").read_text()
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    cpu_s = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    process.close()
    taken = f"{taken_s:8.2f} s ({cpu_s:.0f} s CPU)"
    print(f"{title:28}{taken}   peak {int(peak) / 1e6:.2f} GB   aim: {aim}")


def memory(folder: Path) -> None:
    """Decode ten minutes of 4K."""
    encode(folder / "4k.mp4", size=(3840, 2160), key_every=125)
    in_child("10 min of 4K", repeat(folder / "4k.mp4", folder / "l.mp4", 600), "under 1.5 GB")


def seeking(folder: Path) -> None:
    """Decode 256 frames of two hours, with a key frame every 10 seconds."""
    encode(folder / "gop.mp4", size=(1280, 720), num_frames=250, key_every=250)
    in_child("2 h of 720p, 256 frames", repeat(folder / "gop.mp4", folder / "h.mp4", 7200), "60 s")


def main() -> None:
    """Run the measurements that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--folder", help="where the videos are written")
    arguments = parser.parse_args()
    parts = ", ".join(f"{name} {version(name)}" for name in ("av", "decord2", "torch"))
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {parts}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.only:
            PARTS[name](Path(folder))


PARTS = {"memory": memory, "seeking": seeking, "speed": speed}  # speed last: it pins the process

if __name__ == "__main__":
    main()
