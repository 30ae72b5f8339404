"""The one place where stages are put in order."""

from functools import reduce
from typing import Any

from ray.data import Dataset

from pipeline.pools import Pools
from pipeline.quarantine import Guarded, guard, new_ledger
from pipeline.settings import Settings
from pipeline.stages.answer import Answer
from pipeline.stages.cache import ReadCache, WriteCache
from pipeline.stages.compress import Compress
from pipeline.stages.decode import Decode
from pipeline.stages.sink import Sink
from pipeline.stages.source import WorkList
from pipeline.work_reader import read_work


def plan(work: WorkList, run: Settings, pools: Pools) -> Dataset:
    """Put a work list through the flow: source -> decode -> compress -> cache -> answer -> sink.

    Cached rows skip decode and compress, failed rows pass every stage untouched; a video that kills
    its worker becomes one. Consuming the dataset runs it, in one streaming execution; its rows are
    the sink's counts.
    """
    ledger = new_ledger()
    kept = _kept(work, run, pools, ledger)
    return _written(_answered(kept, run, pools, ledger), run, pools)


def plan_compression(work: WorkList, run: Settings, pools: Pools) -> Dataset:
    """Put a work list through the flow without answer: the tokens end in the cache."""
    return _written(_kept(work, run, pools, new_ledger()), run, pools)


def _kept(work: WorkList, run: Settings, pools: Pools, ledger: Any) -> Dataset:
    branches = []
    if work.fresh:
        branches.append(
            read_work(
                run.storage,
                work.fresh,
                num_rows=work.counts.fresh,
                num_actors=pools.decode.actors,
            )
            .map_batches(Guarded, **guard(Decode, run.decode, ledger, pools.decode, 1))
            .map_batches(
                Guarded,
                **guard(Compress, run.compress, ledger, pools.compress, run.videos_per_compression),
            )
            .map_batches(
                WriteCache,
                fn_constructor_kwargs=run.write_cache,
                **pools.write_cache.of(run.videos_per_cache_file),
            )
        )
    if work.cached or work.failed:
        branches.append(
            read_work(
                run.storage,
                work.cached + work.failed,
                num_rows=work.counts.cached + work.counts.failed,
                num_actors=pools.read_cache.actors,
            ).map_batches(
                ReadCache,
                fn_constructor_kwargs=run.read_cache,
                **pools.read_cache.of(run.videos_per_batch),
            )
        )
    return reduce(Dataset.union, branches)


def _answered(kept: Dataset, run: Settings, pools: Pools, ledger: Any) -> Dataset:
    return kept.map_batches(
        Guarded,
        **guard(
            Answer,
            run.answer,
            ledger,
            pools.answer.overlapping(run.answer_calls),
            run.videos_per_batch,
        ),
    )


def _written(done: Dataset, run: Settings, pools: Pools) -> Dataset:
    return done.map_batches(
        Sink, fn_constructor_kwargs=run.sink, **pools.sink.of(run.videos_per_answer_file)
    )
