"""The media arithmetic against transformers' extractors and processors, Pillow and torch."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from omnisift.media import (
    frame_size,
    log_mel,
    num_mel_frames,
    patchify,
    resize_frames,
    sample_times,
)

RANDOM = settings(max_examples=200, deadline=None, derandomize=True, database=None)
SLOW = settings(RANDOM, max_examples=20)
RATE = 16_000
LONGEST = 300 * RATE  # samples the extractor keeps
LEVEL = 1 / 255 / 0.26130258  # of a colour, after normalising: the smallest deviation

SOUNDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "noise": lambda n, g: torch.randn(n, generator=g) * 0.1,
    "tone": lambda n, _: 0.5 * torch.sin(torch.arange(n) * (2 * math.pi * 440 / RATE)),
    "silence": lambda n, _: torch.zeros(n),
    "whisper": lambda n, g: torch.randn(n, generator=g) * 1e-6,
    "loud end": lambda n, g: torch.randn(n, generator=g) * torch.linspace(0, 1, n) ** 8,
    "steady": lambda n, _: torch.full((n,), 0.3),
}


def sound(kind: str, num_samples: int, seed: int = 0) -> Tensor:
    return SOUNDS[kind](num_samples, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def whisper() -> WhisperFeatureExtractor:
    """Make the extractor that Qwen2.5-Omni is published with."""
    untyped: Any = WhisperFeatureExtractor
    extractor: WhisperFeatureExtractor = untyped(
        feature_size=128, chunk_length=300, n_fft=400, hop_length=160, return_attention_mask=True
    )
    return extractor


def assert_mel_equals(whisper: Any, waveform: Tensor) -> None:
    published = whisper(
        waveform.numpy(),
        sampling_rate=RATE,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = published["attention_mask"][0].bool()
    before = waveform.clone()
    mel = log_mel(waveform)
    assert mel.dtype == torch.float32
    assert mel.shape == (128, num_mel_frames(len(waveform)))
    torch.testing.assert_close(mel, published["input_features"][0][:, mask], rtol=0, atol=1e-6)
    assert torch.equal(waveform, before)


@SLOW
@given(
    kind=st.sampled_from(sorted(SOUNDS)),
    num_samples=st.integers(1, 2000) | st.integers(1, 60 * RATE),
    seed=st.integers(0, 1000),
)
def test_log_mel_equals_whispers(whisper: Any, kind: str, num_samples: int, seed: int) -> None:
    assert_mel_equals(whisper, sound(kind, num_samples, seed))


@pytest.mark.parametrize("kind", ["noise", "silence"])
@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 200, 201, 400, 401])
def test_log_mel_of_a_moment_equals_whispers(whisper: Any, kind: str, num_samples: int) -> None:
    assert_mel_equals(whisper, sound(kind, num_samples))


@pytest.mark.parametrize(
    "num_samples",
    [
        LONGEST - 900,
        LONGEST - 560,
        LONGEST - 161,
        LONGEST - 1,
        LONGEST,
        LONGEST + 1,
        LONGEST + RATE,
    ],
)
def test_log_mel_near_and_beyond_300_s_equals_whispers(whisper: Any, num_samples: int) -> None:
    assert_mel_equals(whisper, sound("loud end", num_samples))


def test_the_end_of_a_long_sound_is_cut_before_it_counts(whisper: Any) -> None:
    """A bang behind 300 s would otherwise raise the floor of everything before it."""
    assert_mel_equals(whisper, torch.cat((sound("whisper", LONGEST), torch.ones(RATE))))


def test_no_sound_has_no_mel_frames() -> None:
    assert num_mel_frames(0) == 0
    assert log_mel(torch.zeros(0)).shape == (128, 0)


@RANDOM
@given(num_samples=st.integers(0, LONGEST + RATE))
def test_mel_frames_are_every_160th_sample(num_samples: int) -> None:
    assert num_mel_frames(num_samples) == len(range(0, min(num_samples, LONGEST), 160))


SIDES = st.integers(1, 300) | st.integers(1, 10_000)
PIXELS = st.sampled_from(
    [
        (28 * 28, 28 * 28),
        (56 * 56, 28 * 28 * 1280),
        (128 * 28 * 28, 256 * 28 * 28),
        (128 * 28 * 28, 320 * 28 * 28),
        (128 * 28 * 28, 768 * 28 * 28),
    ]
)


@settings(RANDOM, max_examples=1000)
@given(height=SIDES, width=SIDES, pixels=PIXELS)
@example(height=1, width=1, pixels=(128 * 784, 256 * 784))
@example(height=4500, width=8000, pixels=(128 * 784, 256 * 784))
@example(height=8000, width=4500, pixels=(128 * 784, 256 * 784))
@example(height=1, width=200, pixels=(128 * 784, 256 * 784))
@example(height=1, width=201, pixels=(128 * 784, 256 * 784))
@example(height=9999, width=49, pixels=(128 * 784, 256 * 784))
@example(height=42, width=70, pixels=(784, 256 * 784))  # halves are rounded to even
def test_frame_size_equals_smart_resize(height: int, width: int, pixels: tuple[int, int]) -> None:
    smallest, largest = pixels
    try:
        expected = smart_resize(height, width, factor=28, min_pixels=smallest, max_pixels=largest)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio"):
            frame_size(height, width, min_pixels=smallest, max_pixels=largest)
        return
    assert frame_size(height, width, min_pixels=smallest, max_pixels=largest) == expected


def frames_of(kind: str, num_frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return uint8 [T, H, W, 3]: noise, or what a camera sees (soft gradients)."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        shape = (num_frames, height, width, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    coarse = torch.rand(
        num_frames, 3, max(2, height // 16), max(2, width // 16), generator=generator
    )
    planes = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return (planes * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


SIZES = pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (100, 130, (56, 84)),
        (40, 30, (112, 84)),
        (1, 1, (56, 56)),
        (7, 300, (28, 280)),
        (90, 90, (84, 84)),
        (360, 641, (336, 588)),
    ],
)
KINDS = pytest.mark.parametrize("kind", ["noise", "soft"])


@KINDS
@SIZES
def test_resize_equals_the_integer_kernel_on_planes(
    kind: str, height: int, width: int, size: tuple[int, int]
) -> None:
    """The published processor hands torch planes, one behind another in memory."""
    frames = frames_of(kind, 3, height, width)
    before = frames.clone()
    planes = frames.permute(0, 3, 1, 2).contiguous()
    expected = F.interpolate(planes, size=size, mode="bicubic", align_corners=False, antialias=True)
    resized = resize_frames(frames, size)
    assert resized.dtype == torch.uint8
    assert torch.equal(resized, expected.permute(0, 2, 3, 1))
    assert torch.equal(frames, before)


def differences(one: Tensor, other: Tensor) -> Tensor:
    return (one.int() - other.int()).abs()


@KINDS
@SIZES
def test_resize_is_pillows_bicubic(
    kind: str, height: int, width: int, size: tuple[int, int]
) -> None:
    """Both round between the two directions; their weights differ in the last bits.

    Mean difference .000 to .006 levels; one value in ten thousand is off by 2, the rest by <= 1.
    """
    frames = frames_of(kind, 2, height, width)
    pictures = [Image.fromarray(frame.numpy()) for frame in frames]
    rows, columns = size
    pillow = np.stack(
        [np.array(p.resize((columns, rows), Image.Resampling.BICUBIC)) for p in pictures]
    )
    off = differences(resize_frames(frames, size), torch.from_numpy(pillow))
    assert off.max() <= 2
    assert (off > 1).float().mean() < 5e-4
    assert off.float().mean() < 0.02


def float_bicubic(planes: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(planes, size=size, mode="bicubic", antialias=True).clamp(0, 255)


@KINDS
@SIZES
def test_resize_is_the_float_kernel_clipped_between_the_directions(
    kind: str, height: int, width: int, size: tuple[int, int]
) -> None:
    """Rows first, then columns; bicubic overshoots at edges, and 8 bits hold no overshoot."""
    frames = frames_of(kind, 2, height, width)
    planes = frames.permute(0, 3, 1, 2).float()
    narrowed = float_bicubic(planes, (height, size[1]))
    expected = float_bicubic(narrowed, size).round().permute(0, 2, 3, 1)
    off = differences(resize_frames(frames, size), expected)
    assert off.max() <= 1
    assert off.float().mean() < 0.3


@SIZES
def test_resize_of_soft_frames_is_the_float_kernel(
    height: int, width: int, size: tuple[int, int]
) -> None:
    frames = frames_of("soft", 2, height, width)
    expected = float_bicubic(frames.permute(0, 3, 1, 2).float(), size).round()
    off = differences(resize_frames(frames, size), expected.permute(0, 2, 3, 1))
    assert off.max() <= 1
    assert off.float().mean() < 0.3


def test_frames_of_the_right_size_are_left_alone() -> None:
    frames = frames_of("noise", 2, 56, 84)
    assert torch.equal(resize_frames(frames, (56, 84)), frames)


def published_patches(
    frames: NDArray[np.uint8], **settings_: Any
) -> tuple[Tensor, tuple[int, int]]:
    """Run the published image processor on each frame; take slot 0 or 1 of its temporal pair.

    An image fills both slots of a pair with itself; a video's pair holds two frames.
    """
    processor = Qwen2VLImageProcessorPil(**settings_)
    patches, grid = [], torch.zeros(3)
    for frame in frames:
        output = processor([frame], return_tensors="pt", input_data_format="channels_last")
        grid = output["image_grid_thw"][0]
        patches.append(output["pixel_values"].view(-1, 3, 2, 14, 14))
    pairs = [
        torch.stack((even[:, :, 0], odd[:, :, 1]), dim=2)
        for even, odd in zip(patches[::2], patches[1::2], strict=True)
    ]
    return torch.cat(pairs).flatten(1), (int(grid[1]), int(grid[2]))


@settings(RANDOM, max_examples=50)
@given(
    num_frames=st.integers(1, 5),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_patches_equal_the_published_processors(
    num_frames: int, rows: int, columns: int, seed: int
) -> None:
    frames = frames_of("noise", num_frames, 28 * rows, 28 * columns, seed)
    even = frames if num_frames % 2 == 0 else torch.cat((frames, frames[-1:]))
    expected, (height, width) = published_patches(even.numpy(), do_resize=False)
    before = frames.clone()
    patches, grid = patchify(frames)
    assert grid == (len(even) // 2, height, width)
    assert patches.dtype == torch.float32
    torch.testing.assert_close(patches, expected, rtol=0, atol=1e-6)
    assert torch.equal(frames, before)


def test_patches_do_not_depend_on_the_memory_format() -> None:
    frames = frames_of("noise", 4, 56, 84)
    expected, _ = patchify(frames)
    planes_first = frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    columns_first = frames.transpose(1, 2).contiguous().transpose(1, 2)
    padded = F.pad(frames, (0, 0, 5, 3, 2, 2))[:, 2:-2, 5:-3]
    for same in (planes_first, columns_first, padded):
        assert torch.equal(patchify(same)[0], expected)


@pytest.mark.parametrize(("height", "width"), [(120, 90), (33, 250), (300, 400), (56, 84)])
def test_a_decoded_frame_becomes_the_published_processors_patches(height: int, width: int) -> None:
    """Size, resizing and patches in one; Pillow resizes there, hence up to 2 levels."""
    frames = frames_of("soft", 2, height, width)
    smallest, largest = 16 * 784, 64 * 784
    expected, _ = published_patches(
        frames.numpy(), size={"shortest_edge": smallest, "longest_edge": largest}
    )
    size = frame_size(height, width, min_pixels=smallest, max_pixels=largest)
    patches, _ = patchify(resize_frames(frames, size))
    off = (patches - expected).abs()
    assert off.max() < 2.01 * LEVEL
    assert off.mean() < 0.02 * LEVEL


@pytest.mark.parametrize(
    ("duration_s", "fps", "max_frames", "times", "rate"),
    [
        (0.01, 2.0, 256, [0.0, 0.5], 2.0),  # a still: the second is padding
        (1.0, 2.0, 256, [0.0, 0.5], 2.0),
        (1.4, 2.0, 256, [0.0, 0.5], 2.0),  # 3 frames fit, grids take 2
        (1.6, 2.0, 256, [0.0, 0.5, 1.0, 1.5], 2.0),
        (2.0, 2.0, 256, [0.0, 0.5, 1.0, 1.5], 2.0),
        (4.0, 1.0, 256, [0.0, 1.0, 2.0, 3.0], 1.0),
        (2.0, 2.0, 4, [0.0, 0.5, 1.0, 1.5], 2.0),  # exactly as many as allowed
        (8.0, 2.0, 4, [0.0, 2.0, 4.0, 6.0], 0.5),
        (3.0, 2.0, 2, [0.0, 1.5], 2 / 3),
    ],
)
def test_sample_times_in_closed_form(
    duration_s: float, fps: float, max_frames: int, times: list[float], rate: float
) -> None:
    actual_times, actual_rate = sample_times(duration_s, fps=fps, max_frames=max_frames)
    assert actual_times.tolist() == pytest.approx(times)
    assert actual_rate == pytest.approx(rate)


@settings(RANDOM, max_examples=1000)
@given(
    duration_s=st.floats(0.001, 20_000),
    fps=st.sampled_from([0.5, 1.0, 2.0, 3.0, 23.976]) | st.floats(0.1, 60),
    half_max=st.integers(1, 128),
)
def test_samples_are_uniform_even_and_inside_the_video(
    duration_s: float, fps: float, half_max: int
) -> None:
    times, rate = sample_times(duration_s, fps=fps, max_frames=2 * half_max)
    assert times.dtype == np.float64
    assert len(times) % 2 == 0
    assert 2 <= len(times) <= 2 * half_max
    assert times[0] == 0
    assert np.allclose(np.diff(times), 1 / rate, rtol=1e-9)
    assert rate <= fps
    if len(times) > 2:
        assert times[-1] < duration_s
    if rate < fps:  # sampled more sparsely: only ever to hold the limit, and spread over all
        assert len(times) == 2 * half_max
        assert len(times) / rate == pytest.approx(duration_s)
    else:  # one more grid would begin behind the end or hold a frame behind it
        assert (len(times) + 1) / fps >= duration_s - 0.0011


@pytest.mark.parametrize("duration_s", [0.0, -1.0, math.nan])
def test_a_video_without_duration_is_refused(duration_s: float) -> None:
    with pytest.raises(ValueError, match="duration_s"):
        sample_times(duration_s, fps=2.0, max_frames=256)
