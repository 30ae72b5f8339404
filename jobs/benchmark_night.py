"""Measure the driver's part of a night over an unchanged corpus: `python jobs/benchmark_night.py`.

A listing of so many videos, all answered and all in the cache (its part files are empty, as in
benchmark_index.py), is turned into a work list without rows, in a process of its own.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import key_index, keys, rows
from pipeline.answer_index import AnswerIndex
from pipeline.answers import commit
from pipeline.config import CaptionConfig, StorageConfig
from pipeline.gone_videos import RollCall, known_videos, settle
from pipeline.stages.source import list_work
from pipeline.storage import ObjectInfo, Storage
from pipeline.testing.empty_parts import write_empty_parts
from pipeline.testing.own_process import in_own_process, peak_memory_gib
from pipeline.token_cache import CacheIndex

SOURCE = "s3://bucket/videos"
RUN_ID = "20260101T000000Z-00000000"
BLOCK = 1 << 18  # videos of an answers file


class ListedStorage(Storage):
    """Files on this machine, and a bucket that only can be listed."""

    def __init__(self, count: int) -> None:
        super().__init__(StorageConfig())
        self.count = count

    def list(self, prefix: str, *, suffixes: Sequence[str] = ()) -> Iterator[ObjectInfo]:
        """Yield the videos, or files."""
        if prefix == SOURCE:
            return (video(number) for number in range(self.count))
        return super().list(prefix, suffixes=suffixes)


def video(number: int) -> ObjectInfo:
    """Return what a listing says of a video."""
    return ObjectInfo(f"{SOURCE}/{number:012d}.mp4", 10_000_000, f"{number:032x}", 0)


def make_night(output: Path, count: int) -> None:
    """Write answers, videos and key files of an earlier run over `count` videos."""
    prompt = CaptionConfig(source=SOURCE, output=str(output)).answer.prompt
    storage = Storage(StorageConfig())
    cache, run = output / "cache" / "f", output / RUN_ID
    cache.mkdir(parents=True)
    run.mkdir()
    for start in range(0, count, BLOCK):
        videos = [video(number) for number in range(start, min(start + BLOCK, count))]
        video_keys = [keys.video_key(info, root=SOURCE) for info in videos]
        same = {"prompt": prompt, "prompt_id": keys.prompt_id(prompt), "status": "ok"}
        same |= {"fingerprint": "f", "run_id": RUN_ID, "text": "A video."}
        names = {"video_key": video_keys, "uri": [info.uri for info in videos]}
        names["object_key"] = video_keys
        columns = {name: pa.array([value] * len(videos)) for name, value in same.items()}
        columns |= {name: pa.array(values) for name, values in names.items()}
        columns["attempts"] = pa.array([1] * len(videos), pa.int32())
        created = np.full(len(videos), np.datetime64(datetime.now(UTC).replace(tzinfo=None), "us"))
        columns["created_at"] = pa.array(created).cast(pa.timestamp("us", tz="UTC"))
        for kind, schema in (("answers", rows.ANSWERS), ("videos", rows.VIDEOS)):
            own = [
                columns.get(field.name, pa.nulls(len(videos), field.type)).cast(field.type)
                for field in schema
            ]
            pq.write_table(pa.table(own, schema), run / f"{kind}-{start:012d}.parquet")
        cached = key_index.from_hex(video_keys)
        write_empty_parts(storage, cache, RUN_ID, cached, first=start)
    commit(storage, str(output), RUN_ID)


def measure(output: Path, count: int) -> None:
    """Print a line of the table; to be called in a process of its own, for its memory."""
    storage = ListedStorage(count)
    config = CaptionConfig(source=SOURCE, output=str(output))
    cpu_start = time.process_time()
    moments = [time.perf_counter()]
    done = AnswerIndex(storage, config.output, fingerprint="f")
    moments.append(time.perf_counter())
    cached = CacheIndex(storage, f"{config.cache_root}/f")
    moments.append(time.perf_counter())
    roll_call = RollCall(known_videos(storage, config.output, done.videos, cached, []), SOURCE)
    moments.append(time.perf_counter())
    folder = f"{config.output}/run"
    work = list_work(config, storage, done=done, cached=cached, folder=folder, roll_call=roll_call)
    gone = settle(storage, roll_call, delete=False, max_share=0.0)
    moments.append(time.perf_counter())
    if work.counts.answered != count or gone.absent:
        raise RuntimeError(f"{work.counts} and {len(gone.absent)} gone, all {count} are answered")
    spent = " | ".join(
        f"{seconds:.1f} s" for seconds in [*np.diff(moments), moments[-1] - moments[0]]
    )
    cpu_s = time.process_time() - cpu_start
    print(f"| {count:,} | {spent} | {cpu_s:.1f} s | {peak_memory_gib():.2f} GiB |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, nargs="+", default=[10**5, 10**6])
    options = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}\n")
    print("| videos | answers | cache | who is known | listing | together | of CPU | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    for count in options.videos:
        with tempfile.TemporaryDirectory() as temporary:
            output = Path(temporary) / "output"
            make_night(output, count)
            in_own_process(measure, output, count)


if __name__ == "__main__":
    main()
