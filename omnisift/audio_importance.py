"""How much attention each audio token receives in the audio tower's last layer.

Shapes: T positions of the tower (two an audio token), W windows of S positions, h heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omnisift.backbone import Backbone, inner
from omnisift.layout import num_audio_tokens
from omnisift.media import num_mel_frames


@torch.inference_mode()
def encode_audio_with_importance(
    backbone: Backbone, waveforms: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the audio tower on waveforms float32 [N] at 16 kHz; return [n, D] and float32 [n] each.

    The importance of a token is the attention it receives in the tower's last layer: mean over
    heads, summed over queries, mean of the two positions that make the token. The tower itself
    runs as ever; only this layer's weights are computed once more.
    """
    model = backbone.model
    attention = inner(model).audio_tower.layers[-1].self_attn
    seen: list[Tensor] = []

    def measure(module: Any, _arguments: object, keywords: dict[str, Any]) -> None:
        seen.append(received(module, keywords["hidden_states"], keywords["cu_seqlens"]))

    hook = attention.register_forward_pre_hook(measure, with_kwargs=True)
    try:
        # The packed tower does not call the stock modules, and so not their hooks.
        tokens = Backbone(model, towers="stock").encode_audio(waveforms)
    finally:
        hook.remove()
    mels = [num_mel_frames(len(waveform)) for waveform in waveforms]
    # Sounds too short for a token never reach the tower.
    positions = [(mel - 1) // 2 + 1 if num_audio_tokens(mel) else 0 for mel in mels]
    received_T = seen[0] if seen else torch.empty(0, device=backbone.device)
    importance = [
        part[: 2 * num_audio_tokens(mel)].view(-1, 2).mean(1)
        for part, mel in zip(received_T.split(positions), mels, strict=True)
    ]
    return tokens, importance


def received(attention: Any, hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the attention each position receives within its window, float32 [T].

    `attention` is transformers' `Qwen2_5OmniAudioAttention`, `cu_seqlens` [W + 1] the borders of
    the windows. Sums to the number of positions.
    """
    start, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    index_WS = start + torch.arange(int((end - start).max()), device=start.device)
    valid_WS = index_WS < end
    windows = hidden_TD[index_WS.clamp(max=hidden_TD.shape[0] - 1)]

    def heads(projection: Any) -> Tensor:
        projected: Tensor = projection(windows).float()
        return projected.reshape(*windows.shape[:2], attention.num_heads, -1).transpose(1, 2)

    logits = heads(attention.q_proj) @ heads(attention.k_proj).mT * float(attention.scaling)
    weights = logits.masked_fill(~valid_WS[:, None, None, :], -torch.inf).softmax(-1)
    received_WS = (weights.mean(1) * valid_WS[:, :, None]).sum(1)
    return received_WS[valid_WS]
