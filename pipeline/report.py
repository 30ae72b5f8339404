"""The closing report of a run: a recount of the files it wrote, as text and as report.json."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import rows
from pipeline.answers import find_run_files
from pipeline.gone_videos import Gone
from pipeline.keys import plain
from pipeline.parquet import read_columns
from pipeline.readers_view import DELETED
from pipeline.retry import next_try
from pipeline.stages.source import WorkCounts
from pipeline.storage import Storage, join

STAGES = ("decode", "compress", "cache", "answer")

_SPEED_HEADER = (
    "stage     videos   actors   busy s   busy s an actor   busy   videos/s   seconds of video/s"
)
_MAX_EXAMPLES = 10
_MAX_SEARCHED = 100_000  # failures among which the examples are picked
_ANSWERS = pa.schema(
    rows.ANSWERS.field(name)
    for name in ("video_key", "uri", "prompt_id", "status", "error_type", "error_message")
)


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
    videos = _distinct(storage, files, "videos-", rows.VIDEOS, ["video_key"])
    answers = _distinct(storage, files, "answers-", _ANSWERS, ["video_key", "prompt_id"])
    answers = answers.filter(pc.not_equal(answers.column("status"), DELETED))
    cut = _in_windows(videos)
    named = counts.fresh + counts.cached + counts.failed + counts.windows
    _require_all("videos, or windows of them,", named + cut.rows, videos.num_rows, run_id)
    if answered:
        _require_all("prompts", counts.prompts + cut.prompts, answers.num_rows, run_id)
    good = videos.filter(pc.is_null(videos.column("error_type")))
    bad = answers.filter(pc.equal(answers.column("status"), "failed"))
    by_type = _by_type(videos, bad)
    before = _total(good, "num_video_tokens", "num_audio_tokens")
    after = _total(good, "kept_video_tokens", "kept_audio_tokens")
    return Report(
        run_id=run_id,
        output=output,
        wall_s=wall_s,
        held_s=held_s,
        source=counts,
        videos=videos.num_rows,
        windows=videos.num_rows - videos.column("start_s").null_count,
        videos_ok=good.num_rows,
        videos_failed=videos.num_rows - good.num_rows,
        failed_by_type=by_type,
        next_try={name: next_try(name) for name in by_type},
        answers_ok=answers.num_rows - bad.num_rows,
        answers_failed=bad.num_rows,
        cache_hits=int(_total(good, "cache_hit")),
        tokens_before=int(before),
        tokens_after=int(after),
        retained=after / before if before else 0.0,
        video_s=_total(good, "duration_s"),
        stages=[_stage(stage, videos, actors.get(stage, 1), held_s) for stage in STAGES],
        gone=len(gone.absent),
        removed=len(gone.removed),
        gone_examples=list((gone.removed or gone.absent)[:_MAX_EXAMPLES]),
        warnings=list(warnings),
        examples=_examples(bad),
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


def _distinct(
    storage: Storage, files: Sequence[str], kind: str, schema: pa.Schema, identity: list[str]
) -> pa.Table:
    """Return the rows of a kind of file, one for each identity: a repeated task wrote it again."""
    own = [uri for uri in files if uri.rpartition("/")[2].startswith(kind)]
    tables = [read_columns(storage, uri, schema.names).cast(schema) for uri in own]
    table = pa.concat_tables([schema.empty_table(), *tables])
    place = pa.array(np.arange(table.num_rows))
    placed = table.select(identity).append_column("place", place)
    last = placed.group_by(identity).aggregate([("place", "max")]).column("place_max")
    return table.take(pa.array(np.sort(np.asarray(last))))


def _require_all(what: str, expected: int, found: int, run_id: str) -> None:
    if found != expected:
        raise RuntimeError(
            f"run {run_id}: {expected} {what} went in, {found} came out; this is a bug, not bad "
            "data. The answers that were written are kept; run the same command again for the rest"
        )


@dataclass(frozen=True)
class _Cut:
    """What decode added to the work list by cutting videos into windows."""

    rows: int
    prompts: int


def _in_windows(videos: pa.Table) -> _Cut:
    """Count the rows, and their prompts, beyond the one that each cut video was.

    A video whose worker died for good, after some of its windows had gone on, has a row of its own.
    """
    table = videos.select(["object_key", "windows", "num_prompts"])
    cut = table.filter(pc.is_valid(table.column("windows"))).to_pylist()
    whole = videos.filter(pc.is_null(videos.column("windows")))
    failed = set(whole.filter(pc.is_null(whole.column("start_s"))).column("object_key").to_pylist())
    rows_, prompts = 0, 0
    of_object: dict[str, list[dict[str, Any]]] = {}
    for row in cut:
        of_object.setdefault(row["object_key"], []).append(row)
    for key, own in of_object.items():
        prompts += sum(row["num_prompts"] for row in own)
        if key in failed:
            rows_ += len(own)
        else:
            rows_ += own[0]["windows"] - 1
            prompts -= own[0]["num_prompts"]
    return _Cut(rows_, prompts)


def _total(videos: pa.Table, *columns: str) -> float:
    return sum(pc.sum(videos.column(column)).as_py() or 0 for column in columns)


def _by_type(videos: pa.Table, bad: pa.Table) -> dict[str, int]:
    """Count failed videos, and failed prompts of videos that were otherwise good, by error_type."""
    failed = videos.filter(pc.is_valid(videos.column("error_type")))
    alone = bad.filter(pc.invert(pc.is_in(bad.column("video_key"), failed.column("video_key"))))
    counts: Counter[str] = Counter()
    for table in (failed, alone):
        for group in pc.value_counts(table.column("error_type")):
            counts[group["values"].as_py()] += group["counts"].as_py()
    return dict(counts.most_common())


def _stage(stage: str, videos: pa.Table, actors: int, held_s: float) -> StageReport:
    own = videos.filter(pc.is_valid(videos.column(f"{stage}_s")))
    busy_s = _total(own, f"{stage}_s")
    video_s = _total(own, "duration_s")
    side_by_side_s = busy_s / max(1, actors)  # a stage that did not run had none
    return StageReport(
        stage=stage,
        videos=own.num_rows,
        video_s=video_s,
        busy_s=busy_s,
        actors=actors,
        busy_s_per_actor=side_by_side_s,
        busy_share=side_by_side_s / held_s if held_s else 0.0,
        videos_per_s=own.num_rows / side_by_side_s if side_by_side_s else 0.0,
        video_s_per_s=video_s / side_by_side_s if side_by_side_s else 0.0,
    )


def _examples(bad: pa.Table) -> list[Example]:
    # One a video, and different kinds first: ten of the same would hide the others.
    first: dict[str, Mapping[str, Any]] = {}
    for answer in bad.slice(0, _MAX_SEARCHED).to_pylist():
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
