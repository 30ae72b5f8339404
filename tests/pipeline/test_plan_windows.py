"""A long video through the whole plan on local Ray, beside files that are cut where it is cut."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import ray
from av.video.frame import VideoFrame

from omnisift.mini.tiny import write_tiny_model
from pipeline.answers import read_answers
from pipeline.config import AnswerConfig, CaptionConfig, MediaConfig, StorageConfig
from pipeline.parquet import read_columns
from pipeline.run import caption_corpus, compress_corpus
from pipeline.storage import Storage
from pipeline.testing.clips import encode, repeat
from pipeline.token_cache import find_folders, list_folder
from pipeline.verify import verify_cache, verify_output

STORAGE = Storage(StorageConfig())
RATE = 25
SPANS = [(0.0, 4.0), (4.0, 8.0), (8.0, 12.0), (12.0, 15.36)]
TOKENS = ["tokens", "token_shape", "positions", "modality", "next_position", "kept_index"]


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def _cut(film: Path, folder: Path) -> None:
    """Write each span of a silent film as a file of its own, without loss."""
    folder.mkdir()
    with av.open(str(film)) as container:
        pictures = list(container.decode(video=0))
    for start_s, end_s in SPANS:
        with av.open(str(folder / f"{start_s:04.1f}.mkv"), "w") as output:
            stream: Any = output.add_stream("ffv1", rate=RATE)
            first = pictures[0]
            stream.width, stream.height, stream.pix_fmt = (
                first.width,
                first.height,
                first.format.name,
            )
            for number, picture in enumerate(pictures[round(start_s * RATE) : round(end_s * RATE)]):
                frame = VideoFrame.from_ndarray(picture.to_ndarray(), format=picture.format.name)
                frame.pts, frame.time_base = number, Fraction(1, RATE)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))


def _kept(config: CaptionConfig, order: str) -> list[dict[str, Any]]:
    """Return the kept tokens of a cache, from its files alone."""
    [folder] = find_folders(STORAGE, config.cache_root)
    files = list_folder(STORAGE, folder).files
    found = [row for file in files for row in read_columns(STORAGE, file).to_pylist()]
    return sorted(found, key=lambda row: row[order])


@pytest.mark.usefixtures("_ray")
def test_a_long_video_is_answered_window_by_window(tmp_path: Path) -> None:
    encode(tmp_path / "short.mp4", num_frames=128, key_every=40)
    (tmp_path / "long").mkdir()
    film = repeat(tmp_path / "short.mp4", tmp_path / "long" / "film.mp4", 15.36)
    _cut(film, tmp_path / "cut")
    media = MediaConfig(min_pixels=56 * 56, max_pixels=112 * 112)
    config = CaptionConfig(
        source=str(tmp_path / "long"),
        output=str(tmp_path / "captions"),
        model=str(write_tiny_model(tmp_path / "model", selector=True)),
        media=replace(media, window_s=4.0),
        answer=AnswerConfig(max_new_tokens=8, system_prompt="See and hear."),
    )
    pieces = replace(
        config, source=str(tmp_path / "cut"), output=str(tmp_path / "pieces"), media=media
    )
    said: list[str] = []
    first = caption_corpus(config, said.append)
    assert (first.source.videos, first.videos, first.windows, first.videos_ok) == (1, 4, 4, 4)
    assert any(line.startswith("4 videos and windows done, 0 failed") for line in said)
    answers = read_answers(config.output, STORAGE).sort_by("start_s").to_pylist()
    assert [(row["start_s"], row["end_s"]) for row in answers] == SPANS
    assert {row["uri"] for row in answers} == {str(film)}
    assert len({row["object_key"] for row in answers}) == 1

    # What is kept and answered of a window is what is of a file that holds it alone.
    caption_corpus(pieces, said.append)
    alone = read_answers(pieces.output, STORAGE).sort_by("uri").to_pylist()
    assert [row["text"] for row in answers] == [row["text"] for row in alone]
    kept = {row["video_key"]: row for row in _kept(config, "video_key")}
    ours = [kept[row["video_key"]] for row in answers]
    theirs = _kept(pieces, "uri")
    assert [[row[name] for name in TOKENS] for row in ours] == [
        [row[name] for name in TOKENS] for row in theirs
    ]

    # Another question reads the windows' tokens, and a run that only compresses has nothing to do.
    ask = replace(config, answer=replace(config.answer, prompt="What moves?"))
    second = caption_corpus(ask, said.append)
    assert (second.cache_hits, second.answers_ok, second.source.windows) == (4, 4, 3)
    assert [stage.videos for stage in second.stages if stage.stage == "decode"] == [0]
    assert compress_corpus(config, said.append).videos == 0
    assert list(verify_output(STORAGE, config.output)) == []
    assert list(verify_cache(STORAGE, find_folders(STORAGE, config.cache_root)[0])) == []
