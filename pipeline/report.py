"""The closing report of a run: a recount of the files it wrote, as text and as report.json."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.answers import find_run_files
from pipeline.gone_videos import Gone
from pipeline.keys import plain
from pipeline.recount import STAGES, count_answers, count_videos
from pipeline.retry import next_try
from pipeline.stages.source import WorkCounts
from pipeline.storage import Storage, join

_SPEED_HEADER = (
    "stage     videos   actors   busy s   busy s an actor   busy   videos/s   seconds of video/s"
)
_MAX_EXAMPLES = 10


@dataclass(frozen=True)
class StageReport:
    """What a stage did. Busy seconds are added up over its actors, so they may exceed the wall."""

    stage: str
    videos: int
    video_s: float  # duration of these videos
    busy_s: float
    actors: int
    busy_s_per_actor: float
    busy_share: float  # of the seconds its actors were held, their start-up included
    videos_per_s: float  # with all actors busy
    video_s_per_s: float


@dataclass(frozen=True)
class Example:
    """A failure as it is shown."""

    uri: str
    error_type: str
    message: str


@dataclass(frozen=True)
class Report:
    """The content of report.json."""

    run_id: str
    output: str
    wall_s: float
    held_s: float  # of them, those for which the actors were held
    source: WorkCounts
    videos: int  # rows of this run: a video that is cut has one for each window
    windows: int  # of them, windows
    videos_ok: int
    videos_failed: int
    failed_by_type: dict[str, int]  # videos, and prompts of videos that did not fail themselves
    next_try: dict[str, str]  # what pipeline.retry says of each of these types
    answers_ok: int
    answers_failed: int
    cache_hits: int
    tokens_before: int
    tokens_after: int
    retained: float  # share of the tokens kept; 0 when there were none
    nvdec: int  # of videos_ok, those that NVDEC decoded
    nvdec_not: int  # those that the CPU decoded in spite of decode.nvdec
    video_s: float
    stages: list[StageReport]
    gone: int  # videos that earlier runs know and the prefix has lost; all: gone.parquet
    removed: int  # of them, with sync.delete=true
    gone_examples: list[str]
    warnings: list[str]
    examples: list[Example]
    see_failures: str  # a command


def make_report(
    storage: Storage,
    output: str,
    run_id: str,
    *,
    counts: WorkCounts,
    actors: Mapping[str, int],
    wall_s: float,
    held_s: float,
    warnings: Sequence[str] = (),
    gone: Gone = Gone(),  # noqa: B008 (frozen)
    answered: bool = True,
) -> Report:
    """Recount what the run wrote; `actors` says how many each of STAGES had.

    With `answered=False` the run only compressed: there are answers rows for failures alone.

    Raises RuntimeError when a video or a prompt of the work list is in no file, or a window of a
    video that was cut: that is a bug.
    """
    output = plain(output)
    files = find_run_files(storage, join(output, run_id))
    videos = count_videos(storage, files)
    answers = count_answers(storage, files, videos.failed_keys)
    named = counts.fresh + counts.cached + counts.failed + counts.windows
    _require_all("videos, or windows of them,", named + videos.cut_rows, videos.rows, run_id)
    if answered:
        _require_all("prompts", counts.prompts + videos.cut_prompts, answers.rows, run_id)
    by_type = dict((videos.failed_by_type + answers.failed_by_type).most_common())
    sums = videos.sums
    before = sums["num_video_tokens"] + sums["num_audio_tokens"]
    after = sums["kept_video_tokens"] + sums["kept_audio_tokens"]
    return Report(
        run_id=run_id,
        output=output,
        wall_s=wall_s,
        held_s=held_s,
        source=counts,
        videos=videos.rows,
        windows=videos.windows,
        videos_ok=videos.ok,
        videos_failed=videos.rows - videos.ok,
        failed_by_type=by_type,
        next_try={name: next_try(name) for name in by_type},
        answers_ok=answers.rows - answers.failed,
        answers_failed=answers.failed,
        cache_hits=int(sums["cache_hit"]),
        tokens_before=int(before),
        tokens_after=int(after),
        retained=after / before if before else 0.0,
        nvdec=int(sums["nvdec"]),
        nvdec_not=int(sums["nvdec or not"] - sums["nvdec"]),
        video_s=sums["duration_s"],
        stages=[_stage(stage, sums, actors.get(stage, 1), held_s) for stage in STAGES],
        gone=len(gone.absent),
        removed=len(gone.removed),
        gone_examples=list((gone.removed or gone.absent)[:_MAX_EXAMPLES]),
        warnings=list(warnings),
        examples=_examples(answers.examples),
        see_failures=f"python jobs/show_answers.py output={output} status=failed run={run_id}",
    )


def write_report(storage: Storage, report: Report) -> str:
    """Write report.json beside the run's answers; return its uri."""
    uri = join(report.output, report.run_id, "report.json")
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"
    storage.write(uri, text.encode())
    return uri


def render(report: Report) -> str:
    """Return the report as the text a person reads at the end of a job."""
    source = report.source
    lines = [
        f"run {report.run_id} took {report.wall_s:.1f} s",
        "",
        f"videos named by the source   {source.videos:>10,}",
        f"  done by earlier runs       {source.answered:>10,}",
        f"  done in this run           {report.videos_ok:>10,}",
        f"    of them from the cache   {report.cache_hits:>10,}  (not decoded, not compressed)",
        f"  failed in this run         {report.videos_failed:>10,}",
        f"  given up by earlier runs   {source.given_up:>10,}  (retry.failed=true tries again)",
        f"answers written              {report.answers_ok:>10,}",
        f"answers already there        {source.prompts_answered:>10,}",
    ]
    if report.windows:
        lines.append(
            f"windows of longer videos     {report.windows:>10,}  (a row each, of the above)"
        )
    if source.duplicates:
        lines.append(f"asked more than once         {source.duplicates:>10,}  (answered once)")
    if not report.videos:
        lines += ["", "Nothing was left to do: no video was decoded, compressed or answered."]
    if report.tokens_before:
        lines += ["", _tokens(report)]
    lines += [*_speed(report), *_failures(report)]
    lines += _gone(report)
    lines += ["", *(f"warning: {warning}" for warning in report.warnings)]
    lines.append(f"answers and report.json: {join(report.output, report.run_id)}")
    return "\n".join(lines)


def _gone(report: Report) -> list[str]:
    if not report.gone:
        return []
    done = f"{report.removed:,} of them removed"
    if not report.removed:
        done = "sync.delete=true removes their answers and tokens"
    lines = ["", f"{report.gone:,} known videos are gone from the source; {done}"]
    lines += [f"  {uri}" for uri in report.gone_examples]
    lines.append(f"all of them: {join(report.output, report.run_id, 'gone.parquet')}")
    return lines


def _tokens(report: Report) -> str:
    return (
        f"tokens {report.tokens_before:,} before, {report.tokens_after:,} after compression "
        f"({report.retained:.1%} retained)"
    )


def _speed(report: Report) -> list[str]:
    used = [stage for stage in report.stages if stage.videos]
    if not used:
        return []
    lines = [
        "",
        _SPEED_HEADER,
    ]
    lines += [
        f"{stage.stage:<8}{stage.videos:>8,}{stage.actors:>9}{stage.busy_s:>9.1f}"
        f"{stage.busy_s_per_actor:>18.1f}{stage.busy_share:>7.0%}{stage.videos_per_s:>11.2f}"
        f"{stage.video_s_per_s:>21.1f}"
        for stage in used
    ]
    lines.append(
        f"busy s is added up over a stage's actors, which were held side by side for "
        f"{report.held_s:.1f} s, start-up included; the speeds are those of all its actors while "
        "busy."
    )
    if report.nvdec or report.nvdec_not:
        lines.append(
            f"decode.nvdec: the GPU decoded {report.nvdec:,} of these videos, the CPU "
            f"{report.nvdec_not:,}"
        )
    if report.wall_s > 0:
        lines.append(
            f"all stages together: {report.videos_ok / report.wall_s:.2f} videos/s, "
            f"{report.video_s / report.wall_s:.1f} seconds of video/s, start-up included"
        )
    return lines


def _failures(report: Report) -> list[str]:
    if not report.failed_by_type:
        return []
    lines = ["", "failures by error_type"]
    lines += [
        f"  {count:>8,}  {name}: {report.next_try[name]}"
        for name, count in report.failed_by_type.items()
    ]
    shown = len(report.examples)
    lines.append(f"the first {shown}:" if shown > 1 else "it is:")
    for example in report.examples:
        lines += [f"  {example.error_type}: {example.uri}", f"    {example.message}"]
    lines.append(f"all of them: {report.see_failures}")
    return lines


def _require_all(what: str, expected: int, found: int, run_id: str) -> None:
    if found != expected:
        raise RuntimeError(
            f"run {run_id}: {expected} {what} went in, {found} came out; this is a bug, not bad "
            "data. The answers that were written are kept; run the same command again for the rest"
        )


def _stage(stage: str, sums: Mapping[str, float], actors: int, held_s: float) -> StageReport:
    num_videos = int(sums[f"{stage} videos"])
    busy_s, video_s = sums[f"{stage} {stage}_s"], sums[f"{stage} duration_s"]
    side_by_side_s = busy_s / max(1, actors)  # a stage that did not run had none
    return StageReport(
        stage=stage,
        videos=num_videos,
        video_s=video_s,
        busy_s=busy_s,
        actors=actors,
        busy_s_per_actor=side_by_side_s,
        busy_share=side_by_side_s / held_s if held_s else 0.0,
        videos_per_s=num_videos / side_by_side_s if side_by_side_s else 0.0,
        video_s_per_s=video_s / side_by_side_s if side_by_side_s else 0.0,
    )


def _examples(bad: Sequence[Mapping[str, Any]]) -> list[Example]:
    # One a video, and different kinds first: ten of the same would hide the others.
    first: dict[str, Mapping[str, Any]] = {}
    for answer in bad:
        first.setdefault(answer["video_key"], answer)
    rank: Counter[str] = Counter()
    ranked = []
    for answer in first.values():
        ranked.append((rank[answer["error_type"]], answer))
        rank[answer["error_type"]] += 1
    ranked.sort(key=lambda pair: pair[0])
    return [
        Example(answer["uri"], answer["error_type"], answer["error_message"] or "")
        for _, answer in ranked[:_MAX_EXAMPLES]
    ]
