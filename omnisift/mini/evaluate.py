"""What a small model still answers from shortened prompts, on scenes it never saw.

Shapes: V videos, Q questions about each, L tokens of a block.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from omnisift.answer import Answerer
from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.codec import Codec, decode, encode
from omnisift.compressor import Clip, KeptTokens, VideoCompressor
from omnisift.layout import Modality
from omnisift.mini.layouts import shares_for
from omnisift.mini.observe import observe
from omnisift.mini.pictures import plan_pictures
from omnisift.mini.questions import KINDS, Question, draw_questions
from omnisift.mini.sounds import plan_sounds
from omnisift.mini.world import ACTIONS, Scene, draw_scene

# What a token carries, by its number in `Held.carries`.
CARRIED = ("background", "object", "object at work", "silence", "sound", "mark")
_BATCH = 10  # videos; what is padded grows with it
_RESAMPLES = 2000


@dataclass(frozen=True)
class Held:
    """A scene as it was decoded, and what is asked about it."""

    name: str
    clip: Clip
    questions: list[Question]
    carries: NDArray[np.int8]  # [L], index in CARRIED of each token of its block


@dataclass(frozen=True)
class Outcome:
    """What a method left of videos, and what was answered then; all by the videos' names."""

    said: dict[str, list[str]]
    tokens: dict[str, tuple[int, int]]  # kept, of how many
    kept: Counter[str]  # tokens by what they carry
    all: Counter[str]
    alike: int = 0  # answers from tokens through a codec that are those of tokens as they were

    def __add__(self, other: "Outcome") -> "Outcome":
        """Return both together; they are of different videos."""
        return Outcome(
            self.said | other.said,
            self.tokens | other.tokens,
            self.kept + other.kept,
            self.all + other.all,
            self.alike + other.alike,
        )


def what_tokens_carry(scene: Scene, compressor: VideoCompressor, clip: Clip) -> NDArray[np.int8]:
    """Return what each token of the block shows or sounds, as the world drew it."""
    block = compressor.block_of(clip)
    seen = observe(plan_pictures([scene]), plan_sounds([scene]), scene.duration_s, rough=False)
    owner, action, sound = seen.owner[0], seen.action[0], seen.sound[0]  # [G, N], [G, K], [A]
    at_work = action.gather(1, owner.clamp(min=0)) < len(ACTIONS)
    shown = torch.where(owner < 0, 0, torch.where(at_work, 2, 1)).flatten()
    carries = np.full(len(block.ids), CARRIED.index("mark"), np.int8)
    carries[block.modality == Modality.VIDEO] = shown.numpy()
    heard = np.flatnonzero(block.modality == Modality.AUDIO)
    carries[heard] = CARRIED.index("silence")  # a codec pads the sound at its end
    both = min(len(heard), len(sound))
    carries[heard[:both]] += (sound[:both] >= 0).numpy().astype(np.int8)
    return carries


def run_setting(
    backbone: Backbone,
    selector: AudioSelector,
    answerer: Answerer,
    held: Sequence[Held],
    *,
    method: str,
    retain: float,
    codec: Codec | None = None,
) -> Outcome:
    """Compress the videos to `retain` of their tokens, ask, and return what came of it.

    With a `codec` the kept tokens are written with it and read again, and asked both ways.
    """
    compressor = VideoCompressor(backbone, selector, shares_for(retain), method=method)
    outcome = Outcome({}, {}, Counter(), Counter())
    remaining = iter(held)
    while videos := list(islice(remaining, _BATCH)):
        names = [video.name for video in videos]
        left = compressor([video.clip for video in videos], video_keys=names)
        for video, kept in zip(videos, left, strict=True):
            outcome.all.update(_count(video.carries))
            outcome.kept.update(_count(video.carries[kept.kept_index]))
            outcome.tokens[video.name] = (
                kept.kept_video_tokens + kept.kept_audio_tokens,
                kept.num_video_tokens + kept.num_audio_tokens,
            )
        said = _ask(answerer, videos, left)
        alike = 0
        if codec is not None:
            before, said = said, _ask(answerer, videos, [_through(kept, codec) for kept in left])
            alike = sum(
                a == b for name in names for a, b in zip(before[name], said[name], strict=True)
            )
        outcome += Outcome(said, {}, Counter(), Counter(), alike)
    return outcome


def _count(carries: NDArray[np.int8]) -> dict[str, int]:
    counts = np.bincount(carries, minlength=len(CARRIED))
    return dict(zip(CARRIED, map(int, counts), strict=True))


def _ask(
    answerer: Answerer, videos: Sequence[Held], left: Sequence[KeptTokens]
) -> dict[str, list[str]]:
    prompts = []
    for video, kept in zip(videos, left, strict=True):
        context = answerer.open(kept)
        prompts += [answerer.ask(context, asked.text) for asked in video.questions]
    answers = iter(answerer(prompts))
    return {video.name: [next(answers).text for _ in video.questions] for video in videos}


def _through(kept: KeptTokens, codec: Codec) -> KeptTokens:
    rows, width = kept.embeds.shape
    embeds = decode(encode(kept.embeds, codec), codec, (rows, width), device=kept.embeds.device)
    return replace(kept, embeds=embeds)


def background_cosine(backbone: Backbone, held: Sequence[Held]) -> float:
    """Return the mean cosine of background tokens to the same place one grid later."""
    total = torch.zeros(())
    count = 0
    for video in held:
        [tokens] = backbone.encode_video([video.clip.frames])
        size = video.clip.size
        shown = torch.from_numpy(video.carries[video.carries < CARRIED.index("silence")])
        still = (shown == 0).view(size.grids, -1)
        still = still[:-1] & still[1:]
        grids = tokens.float().cpu().view(size.grids, still.shape[1], -1)
        total += F.cosine_similarity(grids[:-1], grids[1:], dim=-1)[still].sum()
        count += int(still.sum())
    return float(total / count)


def blind_answers(
    questions: Sequence[Sequence[Question]], *, seed: int, scenes: int
) -> list[list[str]]:
    """Answer from the question alone: what most often was right in other scenes of a world."""
    known: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for number in range(scenes):
        for kind, text, answer in draw_questions(draw_scene(seed, number), 0, len(KINDS)):
            known[text][answer] += 1
            by_kind[kind][answer] += 1
    return [
        [(known.get(text) or by_kind[kind]).most_common(1)[0][0] for kind, text, _ in asked]
        for asked in questions
    ]


@dataclass(frozen=True)
class Score:
    """An accuracy in percent, the mean of the runs, with its 95 % interval over videos."""

    accuracy: float
    low: float
    high: float
    by_kind: dict[str, float]
    runs: list[float]
    # How far ahead of the first in the table: the same videos, drawn together.
    ahead: float
    ahead_low: float
    ahead_high: float


def score(
    right_RVQ: NDArray[np.float64], first_VQ: NDArray[np.float64], kinds_VQ: NDArray[np.str_]
) -> Score:
    """Score R runs of a setting against the first of a table; 1.0 is a right answer.

    Questions about one video go together, so the bootstrap draws whole videos.
    """
    right_VQ = right_RVQ.mean(0)
    chance = np.random.default_rng(0)
    drawn = chance.integers(len(right_VQ), size=(_RESAMPLES, len(right_VQ)))

    def interval(values_VQ: NDArray[np.float64]) -> tuple[float, float, float]:
        means = values_VQ.mean(1)[drawn].mean(1)
        low, high = np.quantile(means, (0.025, 0.975))
        return 100 * float(values_VQ.mean()), 100 * float(low), 100 * float(high)

    return Score(
        *interval(right_VQ),
        {
            kind: 100 * float(right_VQ[kinds_VQ == kind].mean())
            for kind in KINDS
            if (kinds_VQ == kind).any()
        },
        [100 * float(run_VQ.mean()) for run_VQ in right_RVQ],
        *interval(right_VQ - first_VQ),
    )
