"""Measure files to cached tokens: `python jobs/benchmark_pipeline.py [--quick]`.

Each stage alone, then all of them at work in one run of `compress_corpus` on Ray: what the flow
reaches of its slowest stage. The whole needs a GPU; the model has the published sizes of
Qwen2.5-Omni-7B and random weights, on which time does not depend. `--quick` runs the same code on
any machine with a tiny model: it shows that the benchmark works, not how fast anything is.
"""

import argparse
import gc
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from omnisift.checkpoint import read_selector
from omnisift.measure.random_model import published_config, write_random_checkpoint
from omnisift.mini.tiny import write_tiny_model
from pipeline import rows, token_cache
from pipeline.config import CacheConfig, CaptionConfig, CompressionConfig, MediaConfig
from pipeline.parquet import read_columns
from pipeline.pools import Pool, size_pools
from pipeline.report import render
from pipeline.run import compress_corpus, configure_ray_data, start_ray
from pipeline.settings import Settings, make_settings
from pipeline.stages.cache import WriteCache
from pipeline.stages.compress import Compress
from pipeline.stages.decode import Decode
from pipeline.storage import Storage
from pipeline.testing.clips import encode, repeat


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    write_model: Callable[[Path], Path]
    media: MediaConfig
    clip_s: int
    clip_size: tuple[int, int]  # width, height
    videos: int
    edge: int  # videos at either end of the run that the steady state leaves out
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


def stamp(block: pa.Table) -> pa.Table:
    """Replace decoded videos by the times at which they began and ended."""
    end = time.time()
    begin = [end - decode_s for decode_s in block.column("decode_s").to_pylist()]
    return pa.table({"begin": begin, "end": [end] * block.num_rows})


def decode_alone(videos: Sequence[Path], run: Settings, pool: Pool) -> float:
    """Return the seconds a video takes with all actors at work."""
    tables = [rows.build([row_of(video)], rows.IDENTITY) for video in videos]
    decoded = ray.data.from_arrow(tables).map_batches(
        Decode, fn_constructor_kwargs=run.decode, **pool.of(1)
    )
    stamped = decoded.map_batches(
        stamp, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=0.05
    )
    times = pa.concat_tables(stamped.iter_batches(batch_size=None, batch_format="pyarrow"))
    begin, end = (times.column(name).to_pylist() for name in ("begin", "end"))
    return float(max(end) - min(begin)) / len(videos)


def compress_alone(block: pa.Table, run: Settings, sizes: Sizes) -> pa.Table:
    """Measure the stage with one call at a time and with two; return a block of kept tokens."""
    stage = Compress(**run.compress)
    start = time.perf_counter()
    kept = stage(block)
    assert kept.column("error_type").null_count == block.num_rows, kept.column("error_message")
    print(f"first call, compiling: {time.perf_counter() - start:.0f} s")
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            done = list(pool.map(stage, [block] * sizes.calls))
            seconds = time.perf_counter() - start
        busy_s = sum(sum(each.column("compress_s").to_pylist()) for each in done)
        videos = sizes.calls * block.num_rows
        at_once = f"{threads} call{'s' * (threads > 1)} at once"
        report(f"compress, {at_once}", seconds / videos, f"device busy {busy_s / seconds:.0%}")
    if run.compress["settings"].device == "cuda":
        gibibytes = torch.cuda.max_memory_allocated() / 2**30
        print(f"memory at its most, weights included: {gibibytes:.2f} GiB")
    return kept


def cache_alone(kept: pa.Table, run: Settings, actors: int) -> None:
    """Measure how long the kept tokens of a video take to become durable."""
    stage = WriteCache(run.storage, f"{run.run_folder}-alone", run.run_id)
    runs = []
    for _ in range(3):
        start = time.perf_counter()
        stage(kept)
        runs.append((time.perf_counter() - start) / kept.num_rows / actors)
    report(f"cache, {actors} actors", sorted(runs)[1])


def steady_state(config: CaptionConfig, edge: int) -> tuple[int, float]:
    """Return how many videos became durable in the middle of the run, and in how many seconds.

    A file of the cache counts with the time it was written.
    """
    storage = Storage(config.storage)
    [folder] = token_cache.find_folders(storage, config.cache_root)
    files = token_cache.list_folder(storage, folder).files
    times = sorted(
        (max(created).timestamp(), len(created))
        for created in (
            read_columns(storage, file, ["created_at"]).column(0).to_pylist() for file in files
        )
    )
    total, seen = sum(count for _, count in times), 0
    middle: list[tuple[float, int]] = []
    for moment, count in times:
        seen += count
        if seen >= edge and (not middle or seen <= total - edge):
            middle.append((moment, count))
    videos = sum(count for _, count in middle[1:])  # those of the first file came before it
    return videos, middle[-1][0] - middle[0][0]


def report(part: str, seconds: float, note: str = "") -> None:
    """Print one line of the table."""
    print(f"| {part} | {seconds:.3f} | {1 / seconds:.2f} | {note} |", flush=True)


def measure(folder: Path, sizes: Sizes) -> None:
    """Print the table, then the report of the run."""
    videos = write_corpus(folder / "corpus", sizes)
    config = CaptionConfig(
        source=str(folder / "corpus" / "videos"),
        output=str(folder / "output"),
        model=str(sizes.write_model(folder / "model")),
        media=sizes.media,
        compression=CompressionConfig(batch_videos=sizes.batch),
        cache=CacheConfig(videos_per_file=sizes.videos_per_file),
    )
    start_ray()
    configure_ray_data()
    pools = size_pools(config.pools, answers=False)
    model = Path(config.model)
    run = make_settings(
        config, model, read_selector(model, ""), uses_gpu=pools.uses_gpu, answers=False
    )
    print("\n| alone | s a video | videos a s | |\n|---|---|---|---|")
    decoder = Decode(**run.decode)
    [row] = rows.iterate(decoder(rows.build([row_of(videos[0])], rows.IDENTITY)))
    decoder.close()
    block = rows.build([row] * sizes.batch, rows.DECODED)
    kept = compress_alone(block, run, sizes)
    cache_alone(kept, run, pools.write_cache.actors)
    del block, kept
    gc.collect()
    some = videos[: 2 * pools.decode.actors]
    report(f"decode, {pools.decode.actors} actors", decode_alone(some, run, pools.decode))
    result = compress_corpus(config)
    count, seconds = steady_state(config, sizes.edge)
    report(f"**all together**, {count} videos in the middle of {len(videos)}", seconds / count)
    print(render(result))


def main(arguments: list[str] | None = None) -> None:
    """Choose the sizes and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model on any machine")
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
            edge=1,
            batch=2,
            videos_per_file=1,
            calls=2,
        )
    else:
        sizes = Sizes(
            lambda model: write_random_checkpoint(model, published_config()),
            MediaConfig(),
            *(128, (1280, 720), options.videos),
            edge=options.videos // 18,
            batch=4,
            videos_per_file=4,
            calls=6,
        )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), sizes)


if __name__ == "__main__":
    main()
