"""Turn decoded frames and sound into what the towers read, exactly as the published processor does.

Shapes: T frames, H height, W width (pixels), N samples, F mel frames.
"""

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PATCH = 14  # pixels; a token is 2x2 patches
MERGE = 2
TEMPORAL_PATCH = 2  # frames of a grid
FACTOR = PATCH * MERGE
SAMPLE_RATE = 16_000  # Hz
MAX_ASPECT = 200  # the published processor's limit

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as Qwen2-VL uses them
_STD = (0.26862954, 0.26130258, 0.27577711)
_NUM_MEL_BINS = 128
_FFT = 400  # samples, Whisper's 25 ms window
_HOP = 160  # samples, 10 ms
_MAX_SAMPLES = 300 * SAMPLE_RATE  # the published extractor pads and cuts at 300 s


def sample_times(
    duration_s: float, *, fps: float, max_frames: int
) -> tuple[NDArray[np.float64], float]:
    """Choose when frames are sampled: every 1/fps seconds, more sparsely beyond `max_frames`.

    Returns the times in seconds from the start (an even number, at least 2; times past the end
    mean the last frame) and the true rate in frames a second.
    """
    if not duration_s > 0:
        raise ValueError(f"duration_s must be positive, got {duration_s}")
    # The number of times i / fps before the end; a duration is known to about a millisecond.
    wanted = math.ceil(duration_s * fps - 1e-3 * fps)
    if wanted > max_frames:
        rate = max_frames / duration_s
        return np.arange(max_frames, dtype=np.float64) / rate, rate
    num_frames = max(2, wanted // TEMPORAL_PATCH * TEMPORAL_PATCH)
    return np.arange(num_frames, dtype=np.float64) / fps, fps


def frame_size(height: int, width: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the size a frame is resized to: multiples of 28, the area within the limits.

    The published rule ("smart resize", Qwen2-VL): round each side to a multiple of 28; where the
    area then leaves the limits, scale both sides alike and round inwards. Raises ValueError for
    frames more than 200 times as long as wide.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"frame of {width}x{height} pixels: aspect ratio must be at most {MAX_ASPECT}"
        )
    rows = round(height / FACTOR) * FACTOR
    columns = round(width / FACTOR) * FACTOR
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(FACTOR, math.floor(height / scale / FACTOR) * FACTOR)
        columns = max(FACTOR, math.floor(width / scale / FACTOR) * FACTOR)
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / FACTOR) * FACTOR
        columns = math.ceil(width * scale / FACTOR) * FACTOR
    return rows, columns


def resize_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [T, H, W, 3] to uint8 [T, h, w, 3]: bicubic with antialiasing.

    torch's integer kernel for uint8 on the CPU is the one the published processor reaches.
    """
    if frames.shape[1:3] == size:
        return frames
    planes = frames.permute(0, 3, 1, 2)  # channels last in memory: the kernel's fast path
    resized = torch.nn.functional.interpolate(planes, size=size, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous()


@cache
@torch.inference_mode(mode=False)  # whoever asks first, training may use them too
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    # Once for a device: to bring constants there the host would wait each time.
    mean, std = (torch.tensor(values, device=device) * 255 for values in (_MEAN, _STD))
    return mean, std


def normalise(frames: Tensor) -> Tensor:
    """Return frames in [0, 1], [..., 3, H, W], centred and scaled as `patchify` does."""
    mean, std = (torch.tensor(value, device=frames.device) for value in (_MEAN, _STD))
    return (frames - mean[:, None, None]) / std[:, None, None]


def patchify(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalise uint8 [T, H, W, 3] and cut it into the vision tower's patches.

    Returns float32 [T/2 * H/14 * W/14, 3*2*14*14], patches of a token side by side, and the
    shape (T/2, H/14, W/14). An odd T is completed with its last frame, as published.
    """
    if frames.shape[0] % TEMPORAL_PATCH:
        frames = torch.cat((frames, frames[-1:]))
    num_frames, height, width, _ = frames.shape
    mean, std = _normalisation(frames.device)
    pixels = (frames.float() - mean) / std
    grids, rows, columns = num_frames // TEMPORAL_PATCH, height // PATCH, width // PATCH
    pixels = pixels.view(
        grids, TEMPORAL_PATCH, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3
    )
    # -> grid, token row, token column, patch row, patch column, channel, frame, y, x
    patches = pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return patches.reshape(grids * rows * columns, -1), (grids, rows, columns)


@cache
@torch.inference_mode(mode=False)
def _mel_filters(device: torch.device) -> Tensor:
    from transformers.audio_utils import mel_filter_bank  # seconds, and decoding needs none of it

    filters = mel_filter_bank(
        num_frequency_bins=1 + _FFT // 2,
        num_mel_filters=_NUM_MEL_BINS,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float().to(device)


def num_mel_frames(num_samples: int) -> int:
    """Return how many mel frames the published extractor keeps of a waveform."""
    return math.ceil(min(num_samples, _MAX_SAMPLES) / _HOP)


def log_mel(waveform: Tensor) -> Tensor:
    """Return the log-mel spectrogram, float32 [..., 128, F], of float32 [..., N] at 16 kHz.

    Equal to Whisper's extractor with 128 bins padded to 300 s and trimmed to the sound, without
    computing the padding: behind the sound only the window's reach of zeros is transformed.
    """
    waveform = waveform.float()[..., :_MAX_SAMPLES]
    frames = num_mel_frames(waveform.shape[-1])
    padded = min((frames + 1) * _HOP + _FFT, _MAX_SAMPLES)
    waveform = torch.nn.functional.pad(waveform, (0, padded - waveform.shape[-1]))
    window = torch.hann_window(_FFT, device=waveform.device)
    spectrum = torch.stft(waveform, _FFT, _HOP, window=window, return_complex=True)
    power = (spectrum[..., :-1].abs() ** 2).contiguous()
    log_power = torch.clamp(_mel_filters(waveform.device).T @ power, min=1e-10).log10()
    log_power = torch.maximum(log_power, log_power.amax((-2, -1), keepdim=True) - 8.0)
    return ((log_power + 4.0) / 4.0)[..., :frames]
