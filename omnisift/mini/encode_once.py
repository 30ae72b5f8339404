"""A backbone whose towers meet a clip once, also for other models that have the same towers.

The second stage of training leaves the towers as they are, so all models behind one backbone see
and hear alike, and methods and shares differ only in what they keep.

Shapes: T frames, N samples, n tokens, D width.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from omnisift.backbone import Backbone, inner
from omnisift.checkpoint import hash_tensors
from omnisift.vision_tower import MAX_PATCHES


class Encoded:
    """What towers made of media: by the towers' weights, then by the tensor that they read."""

    def __init__(self) -> None:
        """Begin with nothing."""
        # The tensor itself is held too: its id is its own as long as it lives.
        self._known: defaultdict[str, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)

    def get(
        self, tower: str, media: Sequence[Tensor], encode: Callable[[list[Tensor]], list[Tensor]]
    ) -> list[Tensor]:
        """Return the tokens of each; `encode` is called with those that are not known yet."""
        known = self._known[tower]
        new = [one for one in media if id(one) not in known]
        for one, tokens in zip(new, encode(new) if new else (), strict=True):
            known[id(one)] = one, tokens
        return [known[id(one)][1] for one in media]


class EncodeOnce(Backbone):
    """A backbone that asks what is encoded already; media are not changed while it is used."""

    def __init__(self, model: Any, encoded: Encoded) -> None:
        """Wrap a thinker; `encoded` is shared by all backbones of one device."""
        super().__init__(model)
        self._encoded = encoded
        towers = inner(model)
        self._vision = hash_tensors(towers.visual.state_dict())
        self._audio = hash_tensors(towers.audio_tower.state_dict())

    @torch.inference_mode()
    def encode_video(
        self, clips: Sequence[Tensor], *, max_patches: int = MAX_PATCHES
    ) -> list[Tensor]:
        """Return the tokens [n, D] of clips uint8 [T, H, W, 3]."""
        encode = partial(super().encode_video, max_patches=max_patches)
        return self._encoded.get(self._vision, clips, encode)

    @torch.inference_mode()
    def encode_audio(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Return the tokens [n, D] of waveforms float32 [N] at 16 kHz."""
        return self._encoded.get(self._audio, waveforms, super().encode_audio)
