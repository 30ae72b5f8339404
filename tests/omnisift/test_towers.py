"""The packed towers against transformers' own forward."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omnisift.backbone import Backbone
from omnisift.media import FACTOR
from omnisift.mini.tiny import tiny_config
from omnisift.segments import has_varlen
from omnisift.vision_tower import VisionTower


def _model() -> Any:
    """Return a tiny model of which no parameter is zero or one: none can be left out unseen."""
    config: Any = tiny_config()
    config.vision_config.depth = 3
    config.vision_config.intermediate_size = 90  # padded to 128
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Qwen2_5OmniThinkerForConditionalGeneration(config)
        model.eval()
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.2)
    return model


def _frames(num_frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames + height * width)
    size = (num_frames, height * FACTOR, width * FACTOR, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


CLIPS = [(4, 4, 4), (6, 5, 9), (2, 1, 1), (3, 8, 3)]  # frames, and tokens down and across


def test_vision_equals_stock() -> None:
    model = _model()
    stock = Backbone(model, towers="stock")
    clips = [_frames(*shape) for shape in CLIPS]
    expected = stock.encode_video(clips)
    packed = Backbone(model).encode_video(clips)
    for actual, wanted in zip(packed, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    # Packing made the stock modules views: they must compute what they did.
    for actual, wanted in zip(stock.encode_video(clips), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_patches", [1, 64, 200, 10_000])
def test_slices_of_any_size_give_the_same_tokens(max_patches: int) -> None:
    model = _model()
    clips = [_frames(*shape) for shape in CLIPS]
    expected = Backbone(model, towers="stock").encode_video(clips)
    inner = model if hasattr(model, "visual") else model.model
    with torch.inference_mode():
        actual = VisionTower(inner.visual)(clips, max_patches=max_patches)
    for sliced, whole in zip(actual, expected, strict=True):
        torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-4)


def test_audio_equals_stock() -> None:
    model = _model()
    stock = Backbone(model, towers="stock")
    generator = torch.Generator().manual_seed(1)
    # whole windows, a rest, less than a window, an odd number of rows, too short for a token
    samples = [16_000 * 4, 70_001, 9_000, 16_000 * 2 + 160 * 5, 100]
    waveforms = [torch.randn(num, generator=generator) * 0.1 for num in samples]
    expected = stock.encode_audio(waveforms)
    packed = Backbone(model).encode_audio(waveforms)
    for actual, wanted in zip(packed, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    for actual, wanted in zip(stock.encode_audio(waveforms), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_the_flash_kernel_is_for_heads_and_machines_that_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert has_varlen(cuda, torch.bfloat16, 80)
    assert not has_varlen(cuda, torch.bfloat16, 12)  # a tiny model's
    assert not has_varlen(cuda, torch.float32, 80)
    assert not has_varlen(torch.device("cpu"), torch.bfloat16, 80)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not has_varlen(cuda, torch.bfloat16, 80)
