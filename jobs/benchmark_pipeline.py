"""Measure files to cached tokens: `python jobs/benchmark_pipeline.py [--quick]`.

Each stage alone, then all of them at work in one run of `compress_corpus` on Ray: what the flow
reaches of its slowest stage. Decoding would use the half minute in which the towers are compiled,
and be ahead for all of a short run: all decoding actors but one start when the first tokens are in
the cache. The whole needs a GPU; the model has the published sizes of Qwen2.5-Omni-7B and random
weights, on which time does not depend. `--quick` runs the same code on any machine with a tiny
model: it shows that the benchmark works, not how fast anything is.
"""

import argparse
import gc
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from omnisift.checkpoint import read_selector
from omnisift.measure.random_model import published_config, write_random_checkpoint
from omnisift.mini.tiny import write_tiny_model
from pipeline import rows, token_cache
from pipeline.answers import find_run_files
from pipeline.config import (
    CacheConfig,
    CaptionConfig,
    CompressionConfig,
    DecodeConfig,
    MediaConfig,
)
from pipeline.parquet import read_columns
from pipeline.pools import Pool, Pools, size_pools
from pipeline.report import Report, render
from pipeline.run import compress_corpus, configure_ray_data, start_ray
from pipeline.settings import Settings, make_settings
from pipeline.stages.cache import WriteCache
from pipeline.stages.compress import Compress
from pipeline.stages.decode import Decode
from pipeline.storage import Storage, join
from pipeline.testing.clips import encode, repeat
from pipeline.testing.held_cpus import held_cpus
from pipeline.testing.thread_beside import thread_beside


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    write_model: Callable[[Path], Path]
    media: MediaConfig
    clip_s: int
    clip_size: tuple[int, int]  # width, height
    videos: int
    batch: int
    videos_per_file: int
    calls: int  # of the compressing stage, when it is measured alone


def write_corpus(folder: Path, sizes: Sizes) -> list[Path]:
    """Render one clip with sound, and give it many names."""
    folder.mkdir()
    # 5.12 s: 25 of them are 128 s
    short = folder / "short.mp4"
    encode(short, size=sizes.clip_size, num_frames=128, key_every=128, sound="aac")
    long = repeat(short, folder / "long.mp4", sizes.clip_s)
    videos = folder / "videos"
    videos.mkdir()
    names = [videos / f"{number:03}.mp4" for number in range(sizes.videos)]
    for name in names:
        os.link(long, name)
    print(f"clip: {sizes.clip_s} s, {long.stat().st_size / 1e6:.0f} MB")
    return names


def row_of(video: Path) -> dict[str, Any]:
    """Return the row that the source would make of a file."""
    return {
        "video_key": video.stem,
        "uri": str(video),
        "size_bytes": video.stat().st_size,
        "etag": "",
        "prompts": [],
        "attempts": 1,
    }


@dataclass
class Table:
    """The lines of the table, each printed when it is known and all of them at the end."""

    lines: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds a video takes in the slowest stage alone

    def add(self, part: str, seconds: float, note: str = "", *, slowest: bool = False) -> None:
        """Note what a video takes in a part; `slowest`: it may be what bounds the whole."""
        if slowest:
            self.slowest = max(self.slowest, seconds)
        self._add(f"| {part} | {seconds:.3f} | {1 / seconds:.2f} | {note} |")

    def say(self, what: str, value: str) -> None:
        """Note what is no time of a video."""
        self._add(f"| {what} | | | {value} |")

    def _add(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)

    def __str__(self) -> str:
        return "\n".join(["| part | s a video | videos a s | |", "|---|---|---|---|", *self.lines])


def stamp(block: pa.Table) -> pa.Table:
    """Replace decoded videos by the times at which they were done."""
    ends = pa.array([time.time()] * block.num_rows)
    return block.select(["decode_s", "nvdec"]).append_column("end", ends)


def decode_alone(
    videos: Sequence[Path], run: Settings, pool: Pool, table: Table, *, slowest: bool = True
) -> None:
    """Measure the seconds a video takes with all actors at work, behind each one's first."""
    tables = [rows.build([row_of(video)], rows.IDENTITY) for video in videos]
    decoded = ray.data.from_arrow(tables).map_batches(
        Decode, fn_constructor_kwargs=run.decode, **pool.of(1)
    )
    stamped = decoded.map_batches(
        stamp, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=0.05
    )
    times = pa.concat_tables(stamped.iter_batches(batch_size=None, batch_format="pyarrow"))
    ends = sorted(times.column("end").to_pylist())
    seconds = (ends[-1] - ends[pool.actors - 1]) / (len(ends) - pool.actors)
    each_s = sum(times.column("decode_s").to_pylist()) / len(ends)
    with_nvdec = run.decode["decode"].nvdec
    how = f", NVDEC, {sum(times.column('nvdec').to_pylist())} of them" if with_nvdec else ""
    table.add(
        f"decode, {pool.actors} actors{how}",
        seconds,
        f"{each_s:.1f} s a video in its actor",
        slowest=slowest,
    )


def compress_alone(block: pa.Table, run: Settings, sizes: Sizes, table: Table) -> pa.Table:
    """Measure the stage with one call at a time and with two; return a block of kept tokens."""
    stage = Compress(**run.compress)
    start = time.perf_counter()
    kept = stage(block)
    assert kept.column("error_type").null_count == block.num_rows, kept.column("error_message")
    print(f"first call, compiling: {time.perf_counter() - start:.0f} s", flush=True)
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            done = list(pool.map(stage, [block] * sizes.calls))
            seconds = time.perf_counter() - start
        busy_s = sum(sum(each.column("compress_s").to_pylist()) for each in done)
        videos = sizes.calls * block.num_rows
        at_once = f"{threads} call{'s' * (threads > 1)} at once"
        note = f"device busy {busy_s / seconds:.0%}"
        table.add(f"compress, {at_once}", seconds / videos, note, slowest=threads == 2)
    if run.compress["settings"].device == "cuda":
        gibibytes = torch.cuda.max_memory_allocated() / 2**30
        table.say("memory of compressing, weights included", f"{gibibytes:.2f} GiB at its most")
    return kept


def cache_alone(kept: pa.Table, run: Settings, actors: int, table: Table) -> None:
    """Measure how long the kept tokens of a video take to become durable."""
    stage = WriteCache(run.storage, f"{run.run_folder}-alone", run.run_id)
    runs = []
    for _ in range(3):
        start = time.perf_counter()
        stage(kept)
        runs.append((time.perf_counter() - start) / kept.num_rows / actors)
    table.add(f"cache, {actors} actors", sorted(runs)[1], slowest=True)


@contextmanager
def watched_gpu() -> Iterator[list[tuple[float, int]]]:
    """Note how busy the GPU is, as (time, percent), a few times a second; nothing without one."""
    samples: list[tuple[float, int]] = []

    def watch(over: threading.Event) -> None:
        while not over.wait(0.2):
            samples.append((time.time(), torch.cuda.utilization(0)))

    known = torch.cuda.is_available() and find_spec("pynvml") is not None
    with thread_beside(watch) if known else nullcontext():
        yield samples


def cpus_to_hold(pools: Pools) -> float:
    """Return how many CPUs leave room for all other stages and one decoding actor, not for two.

    Raises RuntimeError where there is no such number: with several GPUs.
    """
    others = sum(p.actors * p.cpus for p in (pools.compress, pools.write_cache, pools.sink))
    # Decoding actors are started first: a second one would take the room of the other stages.
    if others >= 0.8 * pools.decode.cpus:
        raise RuntimeError(
            f"the actors of compressing, cache and sink take {others:g} CPUs, which must be below "
            f"0.8 of a decoding actor's {pools.decode.cpus:g} for decoding to be held back; "
            "let the benchmark see one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if pools.decode.actors == 1:
        return 0.0
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return cluster["CPU"] - 1.9 * pools.decode.cpus


def has_tokens(config: CaptionConfig) -> bool:
    """Return whether the cache, a local folder, has its first file."""
    return any(Path(config.cache_root).glob("*/part-*.parquet"))


@dataclass(frozen=True)
class Middle:
    """The middle of a run: no stage fills up any more, or drains."""

    begin: float
    end: float
    video_keys: frozenset[str]  # of the videos that became durable in it

    @property
    def seconds(self) -> float:
        """Return how long it was."""
        return self.end - self.begin


def middle_of(config: CaptionConfig, edge: int) -> Middle:
    """Return the run without its first and last `edge` videos.

    A file of the cache counts with the time it was written.
    """
    storage = Storage(config.storage)
    [folder] = token_cache.find_folders(storage, config.cache_root)
    files = []
    for name in token_cache.list_folder(storage, folder).files:
        part = read_columns(storage, name, ["video_key", "created_at"])
        written = max(part.column("created_at").to_pylist()).timestamp()
        files.append((written, part.column("video_key").to_pylist()))
    files.sort()
    after = ", ".join(f"{len(names)} at {written - files[0][0]:.1f}" for written, names in files)
    print(f"videos durable, seconds behind the first file: {after}")
    total, seen = sum(len(names) for _, names in files), 0
    inside: list[tuple[float, list[str]]] = []
    for written, names in files:
        seen += len(names)
        if seen >= edge and (not inside or seen <= total - edge):
            inside.append((written, names))
    own = [name for _, names in inside[1:] for name in names]  # the first file's came before it
    return Middle(inside[0][0], inside[-1][0], frozenset(own))


def report_middle(
    config: CaptionConfig,
    result: Report,
    middle: Middle,
    samples: Sequence[tuple[float, int]],
    table: Table,
) -> None:
    """Say how fast the whole was in its middle, and how busy each of its pools."""
    count, seconds = len(middle.video_keys), middle.seconds
    table.add(
        f"**all together**, {count} videos in the middle of {result.videos}",
        seconds / count,
        f"{table.slowest * count / seconds:.0%} of the slowest stage alone",
    )
    storage = Storage(config.storage)
    folder = join(result.output, result.run_id)
    videos = pa.concat_tables(
        read_columns(storage, name, ["video_key", "decode_s", "compress_s", "cache_s"])
        for name in find_run_files(storage, folder)
        if name.rpartition("/")[2].startswith("videos-")
    )
    own = [row for row in videos.to_pylist() if row["video_key"] in middle.video_keys]
    for stage in result.stages:
        name = f"{stage.stage}_s"
        if name in videos.column_names:
            busy = sum(row[name] for row in own) / stage.actors / seconds
            table.say(f"{stage.stage}: busy in the middle", f"{busy:.0%} of {stage.actors} actors")
    used = [percent for moment, percent in samples if middle.begin <= moment <= middle.end]
    if used:
        table.say("GPU: kernels running in the middle", f"{sum(used) / len(used):.0f}% of the time")


def measure(folder: Path, sizes: Sizes, *, nvdec: bool = False) -> None:
    """Print each figure when it is known, then the report of the run, then the table.

    With `nvdec` decoding alone is measured on the CPUs too.
    """
    start, table = time.perf_counter(), Table()

    def progress(what: str) -> None:
        print(f"[{time.perf_counter() - start:.0f} s] {what}", flush=True)

    videos = write_corpus(folder / "corpus", sizes)
    progress("corpus written")
    config = CaptionConfig(
        source=str(folder / "corpus" / "videos"),
        output=str(folder / "output"),
        model=str(sizes.write_model(folder / "model")),
        media=sizes.media,
        decode=DecodeConfig(nvdec=nvdec),
        compression=CompressionConfig(batch_videos=sizes.batch),
        cache=CacheConfig(videos_per_file=sizes.videos_per_file),
    )
    progress("model written")
    start_ray()
    configure_ray_data()
    pools = size_pools(config.pools, answers=False)
    held = cpus_to_hold(pools)
    model = Path(config.model)
    run = make_settings(
        config, model, read_selector(model, ""), uses_gpu=pools.uses_gpu, answers=False
    )
    progress("Ray started")
    decoder = Decode(**run.decode)
    [row] = decoder.decode(next(rows.iterate(rows.build([row_of(videos[0])], rows.IDENTITY))))
    decoder.close()
    progress(f"one video decoded in {row['decode_s']:.1f} s")
    block = rows.build([row] * sizes.batch, rows.DECODED)
    kept = compress_alone(block, run, sizes, table)
    cache_alone(kept, run, pools.write_cache.actors, table)
    del block, kept
    gc.collect()
    progress("decoding alone")
    some = [videos[number % len(videos)] for number in range(3 * pools.decode.actors)]
    if nvdec:
        on_cpu = replace(run, decode={**run.decode, "decode": DecodeConfig()})
        decode_alone(some, on_cpu, pools.decode, table, slowest=False)
    decode_alone(some, run, pools.decode, table)
    progress("all together")
    with (
        watched_gpu() as samples,
        held_cpus(held, lambda: has_tokens(config)) as held_s,
    ):
        result = compress_corpus(config)
    print(render(result))
    if held_s:
        print(
            f"decoding actors held back until the first tokens came: all but one, {held_s[0]:.0f} s"
        )
    # What the decoders deliver first comes all at once, and at the end nothing follows.
    edge = min(pools.decode.actors + sizes.batch, sizes.videos // 4)
    report_middle(config, result, middle_of(config, edge), samples, table)
    progress("done")
    print(f"\n{table}")


def main(arguments: list[str] | None = None) -> None:
    """Choose the sizes and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model on any machine")
    parser.add_argument("--nvdec", action="store_true", help="decode with the GPU's video engines")
    parser.add_argument("--videos", type=int, default=72, help="videos of 128 s in the run")
    parser.add_argument("--folder", help="where clips, model and cache are written; 10 GB")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    if options.quick:
        media = MediaConfig(min_pixels=56 * 56, max_pixels=112 * 112)
        sizes = Sizes(
            write_tiny_model,
            media,
            *(10, (320, 180), 4),
            batch=2,
            videos_per_file=1,
            calls=2,
        )
    else:
        sizes = Sizes(
            lambda model: write_random_checkpoint(model, published_config()),
            MediaConfig(),
            *(128, (1280, 720), options.videos),
            batch=4,
            videos_per_file=4,
            calls=4,
        )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), sizes, nvdec=options.nvdec)


if __name__ == "__main__":
    main()
