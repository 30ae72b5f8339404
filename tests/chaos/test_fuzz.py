"""Thousands of broken media files through the whole plan: no worker falls, no row is lost."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray

from omnisift.mini.tiny import write_tiny_model
from pipeline.answers import read_answers
from pipeline.config import (
    AnswerConfig,
    CaptionConfig,
    DecodeConfig,
    MediaConfig,
    PoolsConfig,
    StorageConfig,
)
from pipeline.retry import COSTLY, FINAL
from pipeline.run import caption_corpus
from pipeline.storage import Storage
from pipeline.testing.thread_beside import thread_beside
from tests.chaos.mutations import mutations, seeds

pytestmark = pytest.mark.slow

MUTANTS = int(os.environ.get("FUZZ_MUTANTS", "2600"))
_MEBIBYTE = 1 << 20


@dataclass
class Processes:
    """What ran: the workers of the stages, and the decoders with the most memory each held."""

    workers: set[int] = field(default_factory=set)
    decoders: dict[int, int] = field(default_factory=dict)

    def look(self, marker: str) -> None:
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):  # it ended meanwhile
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                if marker in command and "pipeline.decoder" in command:
                    status = (entry / "status").read_text()
                    held = int(status.partition("VmHWM:")[2].split()[0]) << 10
                    self.decoders[int(entry.name)] = held
                elif "MapBatches(" in command and _grandparent(entry) == os.getpid():
                    self.workers.add(int(entry.name))


def _grandparent(entry: Path) -> int:
    parent = _parent(entry)
    return _parent(Path("/proc", str(parent)))


def _parent(entry: Path) -> int:
    return int((entry / "stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def watch(marker: str) -> Iterator[Processes]:
    """Look at the processes twice a second until the block ends."""
    seen = Processes()

    def look(over: threading.Event) -> None:
        while not over.wait(0.5):
            seen.look(marker)

    with thread_beside(look):
        yield seen


def test_broken_media_cost_no_worker_and_no_row(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    good = seeds(tmp_path / "seeds")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, content in mutations(good, MUTANTS, seed=0):
        (corpus / name).write_bytes(content)
    config = CaptionConfig(
        source=str(corpus),
        output=str(tmp_path / "output"),
        model=str(write_tiny_model(tmp_path / "model", selector=True)),
        media=MediaConfig(min_pixels=56 * 56, max_pixels=112 * 112, max_frames=16),
        answer=AnswerConfig(max_new_tokens=2, batch_videos=16, system_prompt="See and hear."),
        decode=DecodeConfig(
            probe_s=30,
            deadline_s=30,
            memory_limit_bytes=1 << 30,
            temp_dir=str(tmp_path / "downloads"),
        ),
        pools=PoolsConfig(decode_actors=1, decode_cpus=0.5),
    )
    start = time.monotonic()
    # "local": not the cluster of another test
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    try:
        with watch(config.decode.temp_dir) as seen:
            report = caption_corpus(config)
    finally:
        ray.shutdown()
    spent = time.monotonic() - start

    answers = read_answers(config.output, Storage(StorageConfig())).to_pylist()
    assert {Path(row["uri"]).name for row in answers} == {p.name for p in corpus.iterdir()}
    assert len(answers) == report.videos == MUTANTS
    assert report.videos_ok + report.videos_failed == MUTANTS
    assert set(report.failed_by_type) <= FINAL | COSTLY | {"too_large", "too_many_streams"}
    assert report.videos_ok > MUTANTS / 4  # else they are too broken to reach the later stages
    assert len(seen.workers) == 5  # one a stage, from decode to sink: none was replaced
    respawns = sum(report.failed_by_type.get(kind, 0) for kind in COSTLY)
    assert len(seen.decoders) <= 1 + respawns  # one that died within half a second was not seen
    memory = max(seen.decoders.values()) // _MEBIBYTE
    assert memory < 2048  # what libraries take, and the limit

    kinds = ", ".join(f"{kind} {count}" for kind, count in report.failed_by_type.items())
    name = "mutated media files"
    line = f"{name:<44}{1:>5}{MUTANTS:>10}{len(answers):>6}{len(answers):>10}{spent:>6.0f}"
    record_property("chaos", line)
    record_property("chaos", f"  good {report.videos_ok}, {kinds}")
    record_property("chaos", f"  children {len(seen.decoders)}, most memory {memory} MiB")
