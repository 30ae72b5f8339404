from collections.abc import Callable

import pytest
import torch

from omnisift.backbone import Backbone, inner
from omnisift.checkpoint import load_backbone
from omnisift.mini.encode_once import Encoded, EncodeOnce
from omnisift.mini.shipped import FOLDER


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gains the number of media at each look of a tower."""
    counted: list[int] = []

    def counting(encode: Callable[..., object]) -> Callable[..., object]:
        def count(self: Backbone, media: list[torch.Tensor], **more: int) -> object:
            counted.append(len(media))
            return encode(self, media, **more)

        return count

    for name in ("encode_video", "encode_audio"):
        monkeypatch.setattr(Backbone, name, counting(getattr(Backbone, name)))
    return counted


def test_a_clip_is_encoded_once_for_all_models_of_the_same_towers(looks: list[int]) -> None:
    frames = [torch.randint(256, (4, 56, 56, 3), dtype=torch.uint8) for _ in range(3)]
    sounds = [torch.randn(16_000), torch.randn(24_000), torch.zeros(0)]
    models = [load_backbone(FOLDER, device="cpu").model.float() for _ in range(3)]
    for parameter in inner(models[2]).visual.parameters():
        parameter.data *= 1.5
    plain = [(Backbone(m).encode_video(frames), Backbone(m).encode_audio(sounds)) for m in models]
    looks.clear()
    encoded = Encoded()
    first, same, other = (EncodeOnce(model, encoded) for model in models)
    first.encode_video(frames[:2])
    for backbone, (video, audio) in zip((first, same, other), plain, strict=True):
        for _ in range(2):
            for mine, theirs in (
                (backbone.encode_video(frames), video),
                (backbone.encode_audio(sounds), audio),
            ):
                for one, expected in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)
    # Two clips, the third, all sounds, and all clips of the towers that are others.
    assert looks == [2, 1, 3, 3]
    assert (plain[0][0][0] - plain[2][0][0]).abs().max() > 0.1
