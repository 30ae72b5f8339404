"""The Qwen2.5-Omni thinker: encode media, embed text, place tokens.

Shapes: L tokens of a sequence, n tokens of one video or sound, D width.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from omnisift.audio_tower import AudioTower
from omnisift.grouped_attention import use_grouped_attention
from omnisift.layout import Block, Modality, ModelLayout, num_audio_tokens
from omnisift.media import log_mel, num_mel_frames, patchify
from omnisift.transfer import upload, upload_media
from omnisift.vision_tower import MAX_PATCHES, VisionTower

# "packed": all windows at once, compiled on a GPU; "stock": transformers' own forward.
Towers = Literal["packed", "stock"]
# Tokens from which on norms and MLPs of the LLM run compiled on a GPU: a prompt, not a step.
_COMPILED_FROM = 512


class Backbone:
    """A loaded thinker, or the part of one that is needed (see `checkpoint.load_backbone`)."""

    def __init__(self, model: Any, *, towers: Towers = "packed") -> None:
        """Wrap a transformers `Qwen2_5OmniThinkerForConditionalGeneration`."""
        self.model = model.eval()
        self.towers = towers
        self.layout = ModelLayout.of(model.config)
        self.width: int = model.config.text_config.hidden_size
        self.max_positions: int = model.config.text_config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Return where the weights lie."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Return the type the model computes in."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @cached_property
    def packed_vision(self) -> VisionTower:
        """Return the packed vision tower, made when first asked for."""
        return VisionTower(inner(self.model).visual)

    @cached_property
    def _packed_audio(self) -> AudioTower:
        return AudioTower(inner(self.model).audio_tower)

    @torch.inference_mode()
    def encode_video(
        self, clips: Sequence[Tensor], *, max_patches: int = MAX_PATCHES
    ) -> list[Tensor]:
        """Run the vision tower on clips uint8 [T, H, W, 3]; return [n, D] each, in one call.

        `max_patches` bounds the memory of the packed tower.
        """
        if self.towers == "packed":
            return self.packed_vision(clips, max_patches=max_patches)
        patches, grids = zip(*(patchify(clip.to(self.device)) for clip in clips), strict=True)
        grid_thw = torch.tensor(grids, device=self.device)
        features = self.model.get_video_features(
            torch.cat(patches).to(self.dtype), grid_thw
        ).pooler_output
        return list(features)

    @torch.inference_mode()
    def encode_audio(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Run the audio tower on waveforms float32 [N] at 16 kHz; return [n, D] each.

        Sound too short for a single token (under 21 ms) gives [0, D].
        """
        counts = [num_audio_tokens(num_mel_frames(len(waveform))) for waveform in waveforms]
        mels = [
            log_mel(upload_media(waveform, self.device))
            for waveform, count in zip(waveforms, counts, strict=True)
            if count
        ]
        if not mels:
            return [torch.empty(0, self.width, device=self.device, dtype=self.dtype)] * len(counts)
        if self.towers == "packed":
            return list(self._packed_audio(mels).split(counts))
        # Clips are laid end to end rather than padded: the tower's windows never cross clips.
        lengths = torch.tensor([mel.shape[1] for mel in mels], device=self.device)
        longest = int(lengths.max())
        features = torch.stack(
            [torch.nn.functional.pad(mel, (0, longest - mel.shape[1])) for mel in mels]
        )
        mask = torch.arange(longest, device=self.device) < lengths[:, None]
        encoded = self.model.get_audio_features(
            features.to(self.dtype), feature_attention_mask=mask.long()
        ).last_hidden_state
        return list(encoded.split(counts))

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        """Return the text embeddings [L, D] of ids [L]."""
        embedded: Tensor = self.model.get_input_embeddings()(ids.to(self.device))
        return embedded

    @torch.inference_mode()
    def place(self, block: Block, video: Tensor, audio: Tensor) -> Tensor:
        """Return the block's embeddings [L, D]: its marks with the media's tokens scattered in."""
        places = [np.flatnonzero(block.modality == k) for k in (Modality.VIDEO, Modality.AUDIO)]
        ids, *places_on_device = upload([block.ids, *places], self.device)
        embeds = self.embed(ids)
        for place, tokens in zip(places_on_device, (video, audio), strict=True):
            embeds[place] = tokens.to(embeds.dtype)
        return embeds

    @torch.inference_mode()
    def forward_text(
        self, embeds: Tensor, seen: Tensor | None, positions: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Run the LLM's layers and return the hidden states [B, L, D]; `cache` grows by L.

        `embeds` [B, L, D] and `positions` [3, B, L] of the new tokens; `seen` [B, 1, L, cached + L]
        is True where a token sees a key; without it each sees all before it.
        The vocabulary is left out: over a whole prompt its logits would be gigabytes.
        """
        text_model = self._text_model
        eager = self._compiles_text and embeds.shape[1] < _COMPILED_FROM
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            hidden: Tensor = text_model(
                inputs_embeds=embeds,
                attention_mask=seen,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return hidden

    @property
    def _compiles_text(self) -> bool:
        return self.device.type == "cuda" and self.dtype.itemsize == 2

    @cached_property
    def _text_model(self) -> Any:
        text_model = language_model(self.model)
        use_grouped_attention(text_model)
        if self._compiles_text:
            for layer in text_model.layers:  # one graph of each kind serves them all
                for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
                    part.compile(dynamic=True)
        return text_model


def inner(model: Any) -> Any:
    """Return the module that holds the towers of a thinker."""
    # transformers moved the towers one module down between 5.17 and 5.23.
    return model if hasattr(model, "visual") else model.model


def language_model(model: Any) -> Any:
    """Return the LLM of a thinker, its layers without the vocabulary's."""
    # transformers 5.17 has it at .model, 5.23 at .model.language_model
    return getattr(model.model, "language_model", model.model)
