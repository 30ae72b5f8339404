"""One run: check, find the work, stream it through the plan, commit, report."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset

from omnisift.checkpoint import CheckpointError, SelectorWeights, read_selector, resolve
from omnisift.methods import METHODS
from pipeline import answers, token_cache
from pipeline.config import CaptionConfig
from pipeline.errors import StartupError
from pipeline.plan import plan
from pipeline.pools import size_pools
from pipeline.report import Report, make_report, write_report
from pipeline.settings import make_settings
from pipeline.stages.source import WorkList, list_work

log = logging.getLogger(__name__)

_NEWS_S = 5.0  # seconds between two lines of progress


def caption_corpus(config: CaptionConfig, say: Callable[[str], None] = print) -> Report:
    """Answer what is unanswered of a corpus; return the report that also lies beside the answers.

    Raises StartupError, before anything is decoded, for what the user has to mend.
    """
    start = time.monotonic()
    try:
        folder = resolve(config.model, config.revision)
        selector = read_selector(folder, config.compression.selector)
    except CheckpointError as error:
        raise StartupError(str(error)) from error
    warnings = _warn_of_selector(config, selector)
    start_ray()
    pools = size_pools(config.pools)
    run = make_settings(config, folder, selector, uses_gpu=pools.uses_gpu)
    token_cache.write_fingerprint(run.storage, run.cache_folder, run.ingredients)
    done = answers.AnswerIndex(
        run.storage,
        run.output,
        fingerprint=run.answer_fingerprint,
        max_attempts=0 if config.retry.failed else config.retry.max_attempts,
    )
    cached = token_cache.CacheIndex(run.storage, run.cache_folder)
    work = list_work(config, run.storage, done=done, cached=cached, folder=run.run_folder)
    counts = work.counts
    warnings += [f"unreadable, its videos are done again: {file}" for file in cached.unreadable]
    warnings += [f"unreadable, its prompts are asked again: {file}" for file in done.unreadable]
    say(
        f"run {run.run_id}: {counts.videos} videos: {counts.fresh} to decode and compress, "
        f"{counts.cached} in the cache, {counts.answered} answered already, "
        f"{counts.failed} cannot be read, {counts.given_up} given up by earlier runs"
    )
    if work.fresh or work.cached or work.failed:
        _configure_ray_data()
        _stream(plan(work, run, pools), work, say)
    answers.commit(run.storage, run.output, run.run_id, done.orphans)
    report = make_report(
        run.storage,
        run.output,
        run.run_id,
        counts=counts,
        actors=pools.actors(fresh=bool(work.fresh), cached=bool(work.cached or work.failed)),
        wall_s=time.monotonic() - start,
        warnings=warnings,
    )
    write_report(run.storage, report)
    return report


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
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=True)
    else:
        ray.init(include_dashboard=False, logging_level=logging.ERROR)


def _configure_ray_data() -> None:
    context = DataContext.get_current()
    context.max_errored_blocks = 0  # it would drop whole blocks; stages turn bad data into rows
    context.max_consecutive_actor_init_deaths = 3  # a node that dies while a model loads
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # would advise on every operator's memory
    # Bars for a person; a log gets the plain lines of _stream.
    context.enable_progress_bars = sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _stream(dataset: Dataset, work: WorkList, say: Callable[[str], None]) -> None:
    """Consume the dataset: every block that arrives is on disk."""
    total = work.counts.fresh + work.counts.cached + work.counts.failed
    done = failed = 0
    start = news = time.monotonic()
    blocks: Iterable[pa.Table] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    for block in blocks:
        done += sum(block.column("num_videos").to_pylist())
        failed += sum(block.column("num_failed_videos").to_pylist())
        now = time.monotonic()
        if now - news >= _NEWS_S or done == total:
            news = now
            say(f"{done} of {total} videos done, {failed} failed, {now - start:.0f} s")
