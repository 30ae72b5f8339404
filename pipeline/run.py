"""One run: check, find the work, stream it through the plan, commit, report."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset

from omnisift.checkpoint import CheckpointError, SelectorWeights, commit_of, read_selector, resolve
from omnisift.methods import METHODS
from pipeline import token_cache
from pipeline.answer_index import AnswerIndex
from pipeline.answers import commit
from pipeline.compression_index import CompressionIndex
from pipeline.config import CaptionConfig
from pipeline.errors import StartupError
from pipeline.gone_videos import (
    RollCall,
    bury_tokens,
    hide_answers,
    known_videos,
    settle,
)
from pipeline.lease import Lease, hold
from pipeline.manifest import is_manifest
from pipeline.plan import plan, plan_compression
from pipeline.pools import Pools, nodes_up, size_pools
from pipeline.report import Report, make_report, write_report
from pipeline.settings import Settings, make_settings
from pipeline.stages.source import WorkCounts, WorkList, list_work

log = logging.getLogger(__name__)

_NEWS_S = 5.0  # seconds between two lines of progress


Say = Callable[[str], None]


def caption_corpus(config: CaptionConfig, say: Say = print) -> Report:
    """Answer what is unanswered of a corpus; return the report that also lies beside the answers.

    Raises StartupError, before anything is decoded, for what the user has to mend.
    """
    return _run(config, say, plan)


def answer_questions(config: CaptionConfig, say: Say = print) -> Report:
    """Answer what is unanswered of a table of questions; as caption_corpus otherwise."""
    if not is_manifest(config.source):
        raise StartupError(
            f"source={config.source}: questions are a .parquet, .csv or .jsonl table with uri or "
            "video_key, prompt_id and prompt"
        )
    return _run(config, say, plan, own_prompts=True)


def compress_corpus(config: CaptionConfig, say: Say = print) -> Report:
    """Fill the token cache with what it lacks of a corpus; nothing is asked, no LLM is loaded.

    A failed video is an answers row of the prompt it would be asked, so that later runs know.
    """
    return _run(config, say, plan_compression, answers=False)


def _run(
    config: CaptionConfig,
    say: Say,
    order: Callable[[WorkList, Settings, Pools], Dataset],
    *,
    answers: bool = True,
    own_prompts: bool = False,
) -> Report:
    start = time.monotonic()
    try:
        folder = resolve(config.model, config.revision, weights=False)
        selector = read_selector(folder, config.compression.selector)
        warnings = _warn_of_selector(config, selector)
        start_ray()
        pools = size_pools(config.pools, answers=answers)
        if len(nodes_up()) == 1:
            # The actors' machine is this one: fetched before they start, and once.
            resolve(config.model, commit_of(folder) or config.revision)
    except CheckpointError as error:
        raise StartupError(str(error)) from error
    run = make_settings(
        config,
        folder,
        selector,
        uses_gpu=pools.uses_gpu,
        answer_gpus=pools.answer.gpus,
        answers=answers,
    )
    who = f"run {run.run_id}"
    with hold(run.storage, run.output, who, expiry_s=config.lease.expiry_s, say=say) as lease:
        token_cache.write_fingerprint(run.storage, run.cache_folder, run.ingredients)
        done = AnswerIndex(
            run.storage,
            run.output,
            fingerprint=run.answer_fingerprint,
            max_attempts=0 if config.retry.failed else config.retry.max_attempts,
        )
        cached = token_cache.CacheIndex(run.storage, run.cache_folder)
        roll_call = None
        lost: list[str] = []
        if not is_manifest(config.source):
            known = known_videos(run.storage, run.output, done.videos, cached, lost)
            roll_call = RollCall(known, config.source)
        work = list_work(
            config,
            run.storage,
            done=done if answers else CompressionIndex(done, cached),
            cached=cached,
            folder=run.run_folder,
            own_prompts=own_prompts,
            roll_call=roll_call,
        )
        gone = settle(run.storage, roll_call, **vars(config.sync))
        counts = work.counts
        warnings += [f"unreadable, its videos are done again: {file}" for file in cached.unreadable]
        warnings += [f"unreadable, its prompts are asked again: {file}" for file in done.unreadable]
        warnings += [
            f"unreadable, whether its videos are gone is not known: {file}; "
            "jobs/compact.py drop_unreadable=true gives it up"
            for file in lost
        ]
        warnings += [gone.warning] if gone.warning else []
        say(_describe(run.run_id, counts))
        held_s = 0.0
        if not work.fresh:
            pools = replace(pools, answer=pools.answer_alone)
        if work.fresh or work.cached or work.failed:
            configure_ray_data()
            run = replace(run, sink={**run.sink, "not_before": done.not_before})
            rows_known = not config.media.window_s
            held_s = _stream(order(work, run, pools), work, lease, say, rows_known=rows_known)
        hide_answers(run.storage, run.run_folder, gone, not_before=done.not_before)
        lease.check()
        commit(run.storage, run.output, run.run_id, done.orphans)
        # Behind the answers: what is left when the run is killed in between, the next one finds.
        bury_tokens(run.storage, run.output, config.cache_root, gone)
        report = make_report(
            run.storage,
            run.output,
            run.run_id,
            counts=counts,
            actors=pools.actors(fresh=bool(work.fresh), cached=bool(work.cached or work.failed)),
            wall_s=time.monotonic() - start,
            held_s=held_s,
            warnings=warnings,
            gone=gone,
            answered=answers,
        )
        write_report(run.storage, report)
    return report


def _describe(run_id: str, counts: WorkCounts) -> str:
    return (
        f"run {run_id}: {counts.videos} videos: {counts.fresh} to decode and compress, "
        f"{counts.cached} in the cache, {counts.answered} done already, "
        f"{counts.failed} cannot be read, {counts.given_up} given up by earlier runs"
    )


def _warn_of_selector(config: CaptionConfig, selector: SelectorWeights) -> list[str]:
    needed = METHODS[config.compression.method].selector and config.compression.shares.audio > 0
    if selector.trained or not needed:
        return []
    text = (
        f"selector untrained: {config.model} carries no OmniSIFT selector, so the audio tokens "
        "that are kept are chosen at random; use an OmniSIFT checkpoint or compression.selector"
    )
    if config.compression.require_selector:
        raise StartupError(f"compression.require_selector=true, but {text}")
    log.warning(text)
    return [text]


def start_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine."""
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True)
    else:
        # Without "local" Ray would look for a cluster that was once started here, and wait for a
        # dead one for minutes.
        ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)


def configure_ray_data() -> None:
    """Make Ray Data lose nothing and say little."""
    context = DataContext.get_current()
    context.max_errored_blocks = 0  # it would drop whole blocks; stages turn bad data into rows
    context.max_consecutive_actor_init_deaths = 3  # a node that dies while a model loads
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # would advise on every operator's memory
    # Bars for a person; a log gets the plain lines of _stream.
    context.enable_progress_bars = sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _stream(dataset: Dataset, work: WorkList, lease: Lease, say: Say, *, rows_known: bool) -> float:
    """Consume the dataset: every block that arrives is on disk. Return the seconds it took.

    `rows_known=False`: decode cuts videos into windows, nobody knows yet into how many.
    """
    total = work.counts.fresh + work.counts.cached + work.counts.failed
    of_total = f" of {total} videos" if rows_known else " videos and windows"
    done = failed = 0
    start = news = time.monotonic()
    blocks: Iterable[pa.Table] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    for block in blocks:
        lease.check()
        done += sum(block.column("num_videos").to_pylist())
        failed += sum(block.column("num_failed_videos").to_pylist())
        now = time.monotonic()
        if now - news >= _NEWS_S or (rows_known and done == total):
            news = now
            say(f"{done}{of_total} done, {failed} failed, {now - start:.0f} s")
    if not rows_known:
        say(f"{done}{of_total} done, {failed} failed, {time.monotonic() - start:.0f} s")
    return time.monotonic() - start
