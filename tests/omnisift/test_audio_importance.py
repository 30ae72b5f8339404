"""The attention received against transformers' own eager attention, which returns its weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni

from omnisift.audio_importance import encode_audio_with_importance
from omnisift.backbone import Backbone
from omnisift.checkpoint import load_backbone
from omnisift.layout import num_audio_tokens
from omnisift.media import num_mel_frames
from omnisift.mini.tiny import write_tiny_model

SECOND = 16_000


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def _waveform(samples: int) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(samples)) * 0.1


def _by_transformers(
    backbone: Backbone, waveform: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, int]:
    """Run one sound with eager attention; sum the weights of the last layer position by position.

    transformers drops the weights of this tower (`output_attentions` has nothing to show), so
    they are taken where its eager attention makes them.
    """
    eager = modeling_qwen2_5_omni.eager_attention_forward
    weights: dict[Any, list[Tensor]] = {}

    def record(module: Any, *arguments: Any, **keywords: Any) -> Any:
        output, made = eager(module, *arguments, **keywords)
        weights.setdefault(module, []).append(made)
        return output, made

    config = backbone.model.config.audio_config
    before = config._attn_implementation
    monkeypatch.setattr(modeling_qwen2_5_omni, "eager_attention_forward", record)
    config._attn_implementation = "eager"
    try:
        Backbone(backbone.model, towers="stock").encode_audio([waveform])
    finally:
        config._attn_implementation = before
        monkeypatch.undo()
    last = list(weights.values())[-1]
    positions: list[float] = []
    for window in last:  # [1, h, S, S]: how much each query (row) gives each key (column)
        _, num_heads, size, _ = window.shape
        for key in range(size):
            given = [
                window[0, head, query, key] for head in range(num_heads) for query in range(size)
            ]
            positions.append(float(torch.stack(given).sum()) / num_heads)
    pairs = [
        (positions[2 * i] + positions[2 * i + 1]) / 2
        for i in range(num_audio_tokens(num_mel_frames(len(waveform))))
    ]
    return torch.tensor(pairs), len(last)


@pytest.mark.parametrize(
    ("samples", "windows"),
    [
        (2 * SECOND, 1),  # one whole window of the published tower
        (3 * SECOND, 2),
        (4 * SECOND + 170, 3),  # an odd number of positions: the last makes no token
        (700, 1),
    ],
)
def test_equals_the_weights_of_transformers_eager_attention(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, samples: int, windows: int
) -> None:
    waveform = _waveform(samples)
    expected, num_windows = _by_transformers(backbone, waveform, monkeypatch)
    assert num_windows == windows
    [tokens], [importance] = encode_audio_with_importance(backbone, [waveform])
    assert len(importance) == len(tokens)
    assert importance.dtype == torch.float32
    torch.testing.assert_close(importance, expected, rtol=0, atol=1e-5)


def test_clips_together_equal_clips_alone(backbone: Backbone) -> None:
    waveforms = [_waveform(samples) for samples in (3 * SECOND, 0, 100, 50_000, 2 * SECOND)]
    tokens, importance = encode_audio_with_importance(backbone, waveforms)
    plain = Backbone(backbone.model, towers="stock").encode_audio(waveforms)
    for waveform, token, weight, as_ever in zip(waveforms, tokens, importance, plain, strict=True):
        assert torch.equal(token, as_ever)
        [_], [alone] = encode_audio_with_importance(backbone, [waveform])
        torch.testing.assert_close(weight, alone, rtol=0, atol=1e-5)
        assert len(weight) == num_audio_tokens(num_mel_frames(len(waveform)))


def test_the_tower_is_left_as_it_was(backbone: Backbone) -> None:
    encode_audio_with_importance(backbone, [_waveform(SECOND)])
    assert not any(module._forward_pre_hooks for module in backbone.model.modules())
