"""A corpus of three videos and runs over it as a job does them; towers and model are faked."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline import keys, rows, token_cache
from pipeline.answer_index import AnswerIndex
from pipeline.answers import commit, read_answers
from pipeline.config import AnswerConfig, CaptionConfig, StorageConfig
from pipeline.gone_videos import RollCall, bury_tokens, hide_answers, known_videos, settle
from pipeline.manifest import is_manifest
from pipeline.media_windows import cut
from pipeline.parquet import read_columns
from pipeline.report import Report, make_report
from pipeline.stages.cache import ReadCache, WriteCache
from pipeline.stages.sink import Sink
from pipeline.stages.source import list_work
from pipeline.storage import Storage, join
from pipeline.token_cache import CacheIndex

STORAGE = Storage(StorageConfig(attempts=1))
INGREDIENTS: dict[str, keys.Ingredient] = {"model": "m", "retain": 0.25}
NAMES = ["a b#1?%20ä.mp4", "b.mp4", "sub/broken.mp4"]


class Corpus:
    """Three videos, one of them broken, and a run that is done as a job does it."""

    def __init__(self, root: str, put: Callable[[str, bytes], None]) -> None:
        self.root = root
        self.put = put
        self.config = CaptionConfig(source=join(root, "videos"), output=join(root, "out"))
        self.broken = "decode_timeout"  # how the broken one fails
        self.lengths: dict[str, float] = {}  # seconds, of videos that are not 1 s long
        self.poison: dict[str, str] = {}  # how windows fail, by "name start"
        self.lost: set[str] = set()  # windows that are not durable when a run is killed
        self.compressed: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.unreadable: list[str] = []  # videos files, of the last run over a prefix
        for name in NAMES:
            self.put(join("videos", name), name.encode())

    def run(
        self,
        *,
        answer: AnswerConfig | None = None,
        killed: bool = False,
        killed_behind_commit: bool = False,
    ) -> Report | None:
        config = replace(self.config, answer=answer or AnswerConfig())
        ingredients = {**INGREDIENTS, "window_s": config.media.window_s}
        cache = join(config.cache_root, keys.fingerprint(ingredients))
        fingerprint = keys.answer_fingerprint(keys.fingerprint(ingredients), config.answer)
        run_id = keys.new_run_id()
        folder = join(config.output, run_id)

        token_cache.write_fingerprint(STORAGE, cache, ingredients)
        tries = 0 if config.retry.failed else config.retry.max_attempts
        done = AnswerIndex(STORAGE, config.output, fingerprint=fingerprint, max_attempts=tries)
        cached = CacheIndex(STORAGE, cache)
        roll_call = None
        self.unreadable = []
        if not is_manifest(config.source):
            known = known_videos(STORAGE, config.output, done.videos, cached, self.unreadable)
            roll_call = RollCall(known, config.source)
        work = list_work(
            config, STORAGE, done=done, cached=cached, folder=folder, roll_call=roll_call
        )
        gone = settle(STORAGE, roll_call, **vars(config.sync))

        kept = [WriteCache(STORAGE, cache, run_id)(self.compress(_read(p))) for p in work.fresh]
        kept += [ReadCache(STORAGE)(_read(part)) for part in (*work.cached, *work.failed)]
        sink = Sink(
            STORAGE,
            folder,
            run_id=run_id,
            model="m",
            fingerprint=fingerprint,
            not_before=done.not_before,
        )
        for block in kept:
            sink(self.answer(block))
        if killed:
            return None
        hide_answers(STORAGE, folder, gone, not_before=done.not_before)
        commit(STORAGE, config.output, run_id, done.orphans)
        if not killed_behind_commit:
            bury_tokens(STORAGE, config.output, config.cache_root, gone)
        return make_report(
            STORAGE,
            config.output,
            run_id,
            counts=work.counts,
            actors={},
            wall_s=1.0,
            held_s=1.0,
            warnings=[gone.warning] if gone.warning else [],
            gone=gone,
        )

    def compress(self, block: pa.Table) -> pa.Table:
        made = []
        parts = (part for row in rows.iterate(block) for part in self._cut(row))
        for row in parts:
            name = row["uri"].rpartition("/")[2]
            label = name if row["start_s"] is None else f"{name} {row['start_s']:g}"
            if label in self.lost:
                continue
            self.compressed.append(label)
            failure = self.broken if name == "broken.mp4" else self.poison.get(label)
            if failure:
                made.append(rows.failed(row, "decode", failure, f"{row['uri']}: cut"))
                continue
            tokens = {
                "tokens": name.encode(),
                "token_dtype": "float32",
                "token_shape": [1, len(name.encode()) // 4],
                "positions": [[0], [0], [0]],
                "modality": [0],
                "next_position": 1,
                "kept_index": [0],
                "num_video_tokens": 4,
                "num_audio_tokens": 0,
                "kept_video_tokens": 1,
                "kept_audio_tokens": 0,
                "duration_s": 1.0,
            }
            made.append({**tokens, **row})
        return rows.build(made, rows.KEPT)

    def _cut(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the rows that decode makes of a video."""
        length = self.lengths.get(row["uri"].rpartition("/")[2], 1.0)
        windows = cut(length, row["window_s"] or 0.0)
        left = [window for window in windows if window.number not in (row["skip_windows"] or [])]
        for window in left:
            if len(windows) == 1:
                yield {**row, "duration_s": length}
                continue
            key = keys.window_key(
                row["video_key"], row["window_s"], window.number, last=window.is_last
            )
            yield {
                **row,
                "video_key": key,
                "start_s": window.start_s,
                "duration_s": window.duration_s,
                "windows": len(left),
            }

    def answer(self, block: pa.Table) -> pa.Table:
        answered: list[dict[str, Any]] = []
        for row in rows.iterate(block):
            answers = None
            if row["error_type"] is None:
                name = bytes(row["tokens"]).decode()
                assert row["uri"].endswith(name)  # the tokens are those of this video
                part = name if row["start_s"] is None else f"{name} {row['start_s']:g}"
                self.asked += [(part, prompt["prompt"]) for prompt in row["prompts"]]
                answers = [{"prompt_id": p["prompt_id"], "text": name} for p in row["prompts"]]
            answered.append({**row, "answers": answers})
        return rows.build(answered, rows.ANSWERED)

    def spans(self) -> list[tuple[str, float | None, float | None, str]]:
        """Return name, start, end and status of all that readers see."""
        found = read_answers(self.config.output, STORAGE).to_pylist()
        spans = [
            (row["uri"].rpartition("/")[2], row["start_s"], row["end_s"], row["status"])
            for row in found
        ]
        return sorted(spans, key=lambda span: (span[0], span[1] or 0.0, span[2] or 0.0))

    def seen(self) -> list[tuple[str, str]]:
        found = read_answers(self.config.output, STORAGE).to_pylist()
        return sorted((row["uri"].rpartition("/")[2], row["status"]) for row in found)


def _read(part: str) -> pa.Table:
    return read_columns(STORAGE, part)
