"""Media files as they come from a broken disk, a broken tool, or someone who means harm."""

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.testing import clips

Random = np.random.Generator

# Every container and codec that is common, small enough for thousands of decodes.
_SEEDS: dict[str, dict[str, object]] = {
    "h264.mp4": {"sound": "aac"},
    "hevc.mp4": {"codec": "libx265"},
    "av1.mp4": {"codec": "libsvtav1"},
    "h264.mov": {"rotation": 90},
    "h264.mkv": {"sound": "libopus"},
    "ffv1.mkv": {"codec": "ffv1"},
    "vp9.webm": {"codec": "libvpx-vp9", "sound": "libopus"},
    "mpeg4.avi": {"codec": "mpeg4", "sound": "libmp3lame"},
    "mjpeg.avi": {"codec": "mjpeg"},
    "h264.ts": {"sound": "aac"},
    "mpeg2.mpg": {"codec": "mpeg2video", "sound": "mp2"},
    "h264.flv": {"sound": "aac"},
    "wmv2.wmv": {"codec": "wmv2"},
}
_TAGS = re.compile(
    rb"ftyp|moov|mvhd|trak|tkhd|edts|elst|mdia|mdhd|hdlr|minf|vmhd|dinf|dref|stbl|stsd|stts|stss|"
    rb"ctts|stsc|stsz|stco|mdat|avcC|hvcC|av1C|esds|udta|meta|"  # MP4: the size stands before
    rb"RIFF|LIST|hdrl|avih|strh|strf|movi|idx1|"  # AVI: the size stands behind
    rb"\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\x11\x4d\x9b\x74|\x15\x49\xa9\x66|\x16\x54\xae\x6b|"
    rb"\x1f\x43\xb6\x75|\x1c\x53\xbb\x6b|\xae|\xe0|\xa3"  # Matroska: likewise, of any length
)
_LIES = (0, 1, 7, 8, 9, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def seeds(folder: Path) -> dict[str, bytes]:
    """Encode one good file for each container and codec."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, how in _SEEDS.items():
        path = folder / name
        clips.encode(path, size=(160, 96), num_frames=25, key_every=10, **how)  # type: ignore[arg-type]
        found[name] = path.read_bytes()
    return found


def mutations(files: dict[str, bytes], count: int, *, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield `count` mutants: a name that tells how each was made, and its bytes."""
    random = np.random.default_rng(seed)
    names, kinds = list(files), list(_KINDS)
    for number in range(count):
        name, kind = names[number % len(names)], kinds[random.integers(len(kinds))]
        others = [files[other] for other in names if other != name]
        mutant = _KINDS[kind](files[name], others, random)
        if random.random() < 0.2:  # two at once reach further
            mutant = _bits(mutant, others, random)
        stem, _, ending = name.partition(".")
        yield f"{number:05d}-{kind}-{stem}.{ending}", mutant


def _place(data: bytes, random: Random) -> int:
    """Return a position: half of them lie in the first 4 KB, where the headers are."""
    limit = len(data) if random.random() < 0.5 else min(len(data), 4096)
    return int(random.integers(max(1, limit)))


def _bits(data: bytes, others: Sequence[bytes], random: Random) -> bytes:  # noqa: ARG001
    changed = bytearray(data)
    for _ in range(int(2 ** random.uniform(0, 9))):
        if changed:
            changed[_place(data, random)] ^= 1 << int(random.integers(8))
    return bytes(changed)


def _cut(data: bytes, others: Sequence[bytes], random: Random) -> bytes:  # noqa: ARG001
    start, stop = sorted(int(place) for place in random.integers(len(data) + 1, size=2))
    return (data[:stop], data[start:], data[:start] + data[stop:])[int(random.integers(3))]


def _sizes(data: bytes, others: Sequence[bytes], random: Random) -> bytes:  # noqa: ARG001
    changed = bytearray(data)
    tags = [found.span() for found in _TAGS.finditer(data)]
    for _ in range(int(random.integers(1, 4))):
        if tags:
            start, end = tags[int(random.integers(len(tags)))]
            place = start - 4 if random.random() < 0.5 else end
        else:
            place = _place(data, random)
        if 0 <= place <= len(data) - 4:
            (old,) = struct.unpack_from(">I", data, place)
            lie = int(random.choice([*_LIES, old + 1, old * 2, old // 2])) & 0xFFFFFFFF
            struct.pack_into(">I" if random.random() < 0.7 else "<I", changed, place, lie)
    return bytes(changed)


def _head_of_another(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    other = others[int(random.integers(len(others)))]
    length = int(2 ** random.uniform(2, 13))
    return other[:length] + data[length if random.random() < 0.5 else 0 :]


def _double(data: bytes, others: Sequence[bytes], random: Random) -> bytes:  # noqa: ARG001
    start = _place(data, random)
    chunk = data[start : start + int(2 ** random.uniform(2, 14))]
    target = _place(data, random)
    return data[:target] + chunk * int(random.integers(1, 9)) + data[target:]


def _runs(data: bytes, others: Sequence[bytes], random: Random) -> bytes:  # noqa: ARG001
    start, length = _place(data, random), int(2 ** random.uniform(0, 11))
    filler = (b"\0", b"\xff", b"\x80")[int(random.integers(3))]
    return data[:start] + filler * length + data[start + length :]


def _noise(data: bytes, others: Sequence[bytes], random: Random) -> bytes:  # noqa: ARG001
    start, length = _place(data, random), int(2 ** random.uniform(0, 11))
    kept = start + length if random.random() < 0.5 else start
    return data[:start] + random.bytes(length) + data[kept:]


_KINDS: dict[str, Callable[[bytes, Sequence[bytes], Random], bytes]] = {
    "bits": _bits,
    "cut": _cut,
    "sizes": _sizes,
    "head": _head_of_another,
    "double": _double,
    "runs": _runs,
    "noise": _noise,
}
