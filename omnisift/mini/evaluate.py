"""What a small model still answers from shortened prompts, on scenes it never saw."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from omnisift.answer import Answerer
from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.compressor import Clip, VideoCompressor
from omnisift.mini.questions import KINDS, Question
from omnisift.mini.train import shares_for

_RESAMPLES = 2000


@dataclass(frozen=True)
class Setting:
    """A method, and the share of all tokens it is to keep."""

    method: str
    retain: float


@dataclass(frozen=True)
class Score:
    """The accuracy of a setting, in percent."""

    setting: Setting
    retained: float  # share of the tokens that was kept in truth
    accuracy: float
    low: float  # 95 % interval, by a bootstrap over videos
    high: float
    by_kind: dict[str, float]


@dataclass(frozen=True)
class Held:
    """A scene as it was decoded, and what is asked about it."""

    name: str
    clip: Clip
    questions: list[Question]


def evaluate(
    backbone: Backbone,
    selector: AudioSelector,
    answerer: Answerer,
    held: Sequence[Held],
    settings: Sequence[Setting],
) -> Iterator[Score]:
    """Yield the score of each setting on the held-out scenes, an answer right if it is equal."""
    for setting in settings:
        compressor = VideoCompressor(
            backbone, selector, shares_for(setting.retain), method=setting.method
        )
        before = after = 0
        right = []  # of each video, of each question
        for video in held:
            [kept] = compressor([video.clip], video_keys=[video.name])
            before += kept.num_video_tokens + kept.num_audio_tokens
            after += kept.kept_video_tokens + kept.kept_audio_tokens
            context = answerer.open(kept)
            said = answerer([answerer.ask(context, asked.text) for asked in video.questions])
            right.append([a.text == q.answer for a, q in zip(said, video.questions, strict=True)])
        yield _score(setting, after / before, np.array(right, float), held)


def _score(setting: Setting, retained: float, right_VQ: np.ndarray, held: Sequence[Held]) -> Score:
    chance = np.random.default_rng(0)
    # Questions about one video go together, so whole videos are drawn.
    drawn = chance.integers(len(right_VQ), size=(_RESAMPLES, len(right_VQ)))
    means = right_VQ.mean(1)[drawn].mean(1)
    kinds = np.array([[question.kind for question in video.questions] for video in held])
    return Score(
        setting=setting,
        retained=retained,
        accuracy=100 * float(right_VQ.mean()),
        low=100 * float(np.quantile(means, 0.025)),
        high=100 * float(np.quantile(means, 0.975)),
        by_kind={
            kind: 100 * float(right_VQ[kinds == kind].mean())
            for kind in KINDS
            if (kinds == kind).any()
        },
    )
