"""The methods of compression by name: OmniSIFT, its ablations, what it is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from omnisift.audio_selection import AudioSelector
from omnisift.baselines.dycoke import merge_temporally
from omnisift.baselines.omnizip import ANCHORS, LOWEST, zip_tokens
from omnisift.baselines.random_drop import drop_at_random
from omnisift.compress import Compressed, Explore, Sequence3d, compress_batch
from omnisift.compression_plan import COMPLETE, Deciders, DropShares
from omnisift.layout import ModelLayout


@dataclass(frozen=True)
class Method:
    """What a method needs beside the sequences."""

    selector: bool = False  # a trained selector
    video_keys: bool = False  # the videos' keys, which seed its chance
    audio_importance: bool = False  # the attention each audio token receives in the audio tower


METHODS = {
    "omnisift": Method(selector=True),
    "omnizip": Method(audio_importance=True),
    "dycoke": Method(),
    "random": Method(video_keys=True),
    "none": Method(),
    "omnisift_no_spatial": Method(selector=True, video_keys=True),
    "omnisift_no_temporal": Method(selector=True, video_keys=True),
    "omnisift_audio_only": Method(selector=True),
    "omnisift_random_audio": Method(video_keys=True),
}
# What training knows; the others are training-free and run on a backbone trained with "none".
TRAINED_METHODS = tuple(name for name in METHODS if name not in ("omnizip", "dycoke"))
DECIDERS = {
    "omnisift": COMPLETE,
    "omnisift_no_spatial": Deciders(spatial=False),
    "omnisift_no_temporal": Deciders(temporal=False),
    "omnisift_audio_only": Deciders(audio="audio"),
    "omnisift_random_audio": Deciders(audio="chance"),
}


def find_method(name: str) -> Method:
    """Return what a method needs. Raises ValueError that lists the methods there are."""
    if name not in METHODS:
        raise ValueError(f"the method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def most_kept(method: str, shares: DropShares) -> float:
    """Return the share of a video's tokens that survives at most, whatever its sound.

    But for rounding: below one token of each grid and of each piece of sound, and below one grid
    of the last group of "dycoke".
    """
    kept_video, kept_audio = 1 - shares.video, 1 - shares.audio
    match method:
        case "none":
            return 1.0
        case "dycoke":  # one of four rows stays whole
            kept_video, kept_audio = max(0.25, kept_video), max(0.25, kept_audio)
        case "omnizip":  # clamps the share of groups with sound, and keeps anchors
            kept_video = max(kept_video, 1 - LOWEST) if shares.video > 0 else 1.0
            kept_audio = min(1.0, kept_audio + ANCHORS)
        case "random" | "omnisift_audio_only":
            pass
        case _ if shares.video == 1:
            kept_audio = 1.0  # nothing seen is left that could select it
    return max(kept_video, kept_audio)


def compress_with(
    method: str,
    sequences: Sequence[Sequence3d],
    shares: DropShares,
    layout: ModelLayout,
    *,
    selector: AudioSelector | None = None,
    video_keys: Sequence[str] | None = None,
    audio_importance: Sequence[Tensor] | None = None,
    explore: Explore | None = None,
) -> list[Compressed]:
    """Shorten sequences (inputs_embeds [L, D], input_ids [L], position_ids [3, L]) by a method.

    `video_keys` are one a sequence, `audio_importance` [audio tokens] each: only `METHODS` that
    say so need them. "none" keeps everything, whatever the shares. `explore` changes
    a selector's scores (`compress_planned`).

    Raises ValueError for a method there is not, for what it needs and is not given, for shares
    outside [0, 1] and shapes that do not belong together.
    """
    needs = find_method(method)
    for name, wanted, given in (
        ("video_keys", needs.video_keys, video_keys),
        ("audio_importance", needs.audio_importance, audio_importance),
    ):
        if wanted and (given is None or len(given) != len(sequences)):
            raise ValueError(f"{method} needs {name}, one for each of {len(sequences)} sequences")
    match method:
        case "random":
            return drop_at_random(sequences, shares, layout, video_keys=video_keys or ())
        case "dycoke":
            return [merge_temporally(sequence, shares, layout) for sequence in sequences]
        case "omnizip":
            return [
                zip_tokens(sequence, shares, layout, importance=importance)
                for sequence, importance in zip(sequences, audio_importance or (), strict=True)
            ]
        case "none":
            return compress_batch(sequences, DropShares(0.0, 0.0), layout, selector=None)
        case _:
            return compress_batch(
                sequences,
                shares,
                layout,
                selector=selector,
                deciders=DECIDERS[method],
                video_keys=video_keys or (),
                explore=explore,
            )
