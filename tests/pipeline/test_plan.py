"""The whole plan on local Ray, against a real S3 server: bad videos, a rerun, another question."""

import csv
import io
import json
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from omnisift.answer import Answerer
from omnisift.checkpoint import build_selector, load_backbone, load_tokenizer, read_selector
from omnisift.compress import drop_shares
from omnisift.compressor import Clip, VideoCompressor
from omnisift.mini.tiny import write_tiny_model
from pipeline import rows
from pipeline.answers import find_files, read_answers
from pipeline.config import (
    AnswerConfig,
    CaptionConfig,
    CompressionConfig,
    DecodeConfig,
    MediaConfig,
)
from pipeline.errors import StartupError
from pipeline.film import decode_file
from pipeline.parquet import read_columns
from pipeline.run import answer_questions, caption_corpus, compress_corpus
from pipeline.storage import Storage
from pipeline.testing.clips import render
from pipeline.testing.s3_server import S3Server

GOOD = {"h264_sound.mp4": "a/h264 sound #1.mp4", "carphone.mp4": "ünïcode/carphone.mp4"}
BAD = {
    "truncated.mp4": ("broken/truncated.mp4", "truncated"),
    "page.mp4": ("broken/page.mp4", "not_a_video"),
    "empty.mp4": ("broken/empty.mp4", "not_a_video"),
}


@pytest.fixture(scope="module")
def bucket(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket of clips, and a local Ray whose workers may read it."""
    clips = render(tmp_path_factory.mktemp("clips"), [*GOOD, *BAD])
    client, name = s3.client(), f"plan-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    for clip, key in {**GOOD, **{clip: key for clip, (key, _) in BAD.items()}}.items():
        client.upload_file(str(clips[clip]), name, f"videos/{key}")
    before = dict(os.environ)
    os.environ.update(s3.environment)
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    yield name
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), selector=True)


@pytest.fixture(scope="module")
def config(bucket: str, model: Path) -> CaptionConfig:
    return CaptionConfig(
        source=f"s3://{bucket}/videos",
        output=f"s3://{bucket}/captions",
        model=str(model),
        media=MediaConfig(min_pixels=56 * 56, max_pixels=112 * 112),
        answer=AnswerConfig(max_new_tokens=8, system_prompt="See and hear."),
    )


def _texts_without_ray(config: CaptionConfig, model: Path, clip: Path, prompt: str) -> str:
    """Answer one file by calling the parts one after another in this process."""
    decoded = decode_file(clip, config.media, DecodeConfig())
    backbone = load_backbone(model)
    compressor = VideoCompressor(
        backbone, build_selector(read_selector(model), backbone.width), drop_shares(0.25)
    )
    frames = torch.from_numpy(np.array(decoded.frames))
    audio = torch.from_numpy(np.array(decoded.audio))
    [kept] = compressor([Clip(frames=frames, audio=audio, fps=decoded.fps)])
    answerer = Answerer(
        backbone,
        load_tokenizer(model),
        system_prompt=config.answer.system_prompt,
        max_new_tokens=config.answer.max_new_tokens,
    )
    [answer] = answerer([answerer.ask(answerer.open(kept), prompt)])
    return answer.text


def _seen(config: CaptionConfig, prompt: str) -> dict[str, dict[str, object]]:
    found = read_answers(config.output, Storage(config.storage))
    return {row["uri"]: row for row in found.to_pylist() if row["prompt"] == prompt}


def test_from_bucket_to_answers_and_again(
    config: CaptionConfig, model: Path, tmp_path: Path, s3: S3Server
) -> None:
    said: list[str] = []
    first = caption_corpus(config, said.append)
    assert (first.videos_ok, first.videos_failed, first.cache_hits) == (2, 3, 0)
    assert first.failed_by_type == {"not_a_video": 2, "truncated": 1}
    assert first.warnings == []
    assert any("5 of 5 videos done, 3 failed" in line for line in said)

    # every row that went in came out, each answer as the parts give it without Ray
    seen = _seen(config, config.answer.prompt)
    assert len(seen) == 5
    clips = render(tmp_path, list(GOOD))
    for clip, key in GOOD.items():
        row = seen[f"{config.source}/{key}"]
        expected = _texts_without_ray(config, model, clips[clip], config.answer.prompt)
        assert (row["status"], row["text"]) == ("ok", expected)
    for key, error_type in BAD.values():
        row = seen[f"{config.source}/{key}"]
        assert (row["status"], row["error_type"]) == ("failed", error_type)
        assert key in str(row["error_message"])

    _check_cache(config, s3)

    # the same command again: nothing is decoded, compressed or answered
    second = caption_corpus(config, said.append)
    assert (second.videos, second.source.answered, second.source.given_up) == (0, 2, 3)
    assert all(stage.videos == 0 for stage in second.stages)
    assert _seen(config, config.answer.prompt) == seen

    # another question: answered from the cache, without decoding or compressing
    other = replace(config, answer=replace(config.answer, prompt="What is heard?"))
    third = caption_corpus(other, said.append)
    assert (third.videos_ok, third.cache_hits, third.source.fresh) == (2, 2, 0)
    videos = {stage.stage: stage.videos for stage in third.stages}
    assert (videos["decode"], videos["compress"]) == (0, 0)
    for clip, key in GOOD.items():
        expected = _texts_without_ray(config, model, clips[clip], "What is heard?")
        assert _seen(other, "What is heard?")[f"{config.source}/{key}"]["text"] == expected

    # another share, or another codec, is another cache: nothing is taken from the old one
    less = replace(
        config,
        compression=CompressionConfig(retain=0.1),
        cache=replace(config.cache, codec="int8"),
    )
    fourth = caption_corpus(less, said.append)
    assert (fourth.cache_hits, fourth.source.fresh, fourth.answers_ok) == (0, 5, 2)
    assert fourth.tokens_after < first.tokens_after


def _check_cache(config: CaptionConfig, s3: S3Server) -> None:
    """Read the cache with plain Parquet, as any other tool would."""
    client, bucket = s3.client(), config.source.split("/")[2]
    listing = client.list_objects_v2(Bucket=bucket, Prefix="captions/cache/")["Contents"]
    names = [entry["Key"] for entry in listing]
    [described] = [name for name in names if name.endswith("fingerprint.json")]
    ingredients = json.loads(client.get_object(Bucket=bucket, Key=described)["Body"].read())
    assert (ingredients["video_drop"], ingredients["audio_drop"]) == (0.77, 0.5)
    parts = [
        pq.read_table(pa.BufferReader(client.get_object(Bucket=bucket, Key=name)["Body"].read()))
        for name in names
        if name.endswith(".parquet")
    ]
    table = pa.concat_tables(parts)
    assert table.schema.equals(rows.CACHED)
    assert sorted(table.column("uri").to_pylist()) == sorted(
        f"{config.source}/{key}" for key in GOOD.values()
    )
    for row in table.to_pylist():
        length, width = row["token_shape"]
        tokens = np.frombuffer(row["tokens"], "<f4").reshape(length, width)
        assert np.isfinite(tokens).all()
        assert width == 64
        assert np.array(row["positions"]).shape == (3, length)
        assert len(row["modality"]) == len(row["kept_index"]) == length
        assert row["modality"].count(1) == row["kept_video_tokens"] < row["num_video_tokens"]
        assert row["modality"].count(2) == row["kept_audio_tokens"]
        assert max(map(max, row["positions"])) < row["next_position"]


def test_tokens_first_and_questions_by_uri_or_key_later(
    config: CaptionConfig, model: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    config = replace(config, output=config.output.replace("captions", "questions"))
    storage = Storage(config.storage)
    first = compress_corpus(config, said.append)
    assert (first.videos_ok, first.videos_failed, first.source.fresh) == (2, 3, 5)
    assert {stage.stage: stage.videos for stage in first.stages}["answer"] == 0
    # failures alone are rows, each of the prompt that it would have been asked
    seen = read_answers(config.output, storage).to_pylist()
    assert sorted(row["error_type"] for row in seen) == ["not_a_video", "not_a_video", "truncated"]

    second = compress_corpus(config, said.append)
    assert (second.videos, second.source.answered, second.source.given_up) == (0, 2, 3)

    # one video named by its key, one by its uri and by its key, and lines that ask for nothing
    videos = [
        row
        for uri in find_files(config.output, storage).committed
        if "/videos-" in uri
        for row in read_columns(storage, uri).to_pylist()
    ]
    key_of = {row["uri"].rpartition("/")[2]: row["video_key"] for row in videos}
    uri_of = {row["uri"].rpartition("/")[2]: row["uri"] for row in videos}
    asks = [
        ("", key_of["carphone.mp4"], "who", "Who is seen?"),
        ("", key_of["carphone.mp4"], "where", "Where is it?"),
        (uri_of["h264 sound #1.mp4"], "", "who", "Who is seen?"),
        ("", key_of["h264 sound #1.mp4"], "who", "Who is seen?"),
        (uri_of["page.mp4"], "", "who", "Who is seen?"),
        ("", "0" * 64, "who", "Who is seen?"),
        (uri_of["carphone.mp4"], "", "how", ""),
    ]
    text = io.StringIO()
    csv.writer(text).writerows([("uri", "video_key", "prompt_id", "prompt"), *asks])
    table = f"{config.output}-asked.csv"
    storage.write(table, text.getvalue().encode())
    asking = replace(config, source=table)
    third = answer_questions(asking, said.append)
    assert (third.cache_hits, third.answers_ok, third.source.fresh) == (2, 3, 0)
    assert (third.source.duplicates, third.source.broken_lines, third.videos_failed) == (1, 2, 3)
    given = {
        (row["uri"].rpartition("/")[2], row["prompt_id"]): row
        for row in read_answers(config.output, storage).to_pylist()
    }
    clip = render(tmp_path, ["carphone.mp4"])["carphone.mp4"]
    expected = _texts_without_ray(config, model, clip, "Where is it?")
    assert given["carphone.mp4", "where"]["text"] == expected
    assert given["carphone.mp4", "where"]["video_key"] == key_of["carphone.mp4"]
    assert given["page.mp4", "who"]["error_type"] == "not_a_video"
    assert (
        "no earlier run"
        in given["questions-asked.csv#line 7", _id_of_broken(given)]["error_message"]
    )

    # again: only the broken lines, which fail as they must
    fourth = answer_questions(asking, said.append)
    assert (fourth.answers_ok, fourth.cache_hits, fourth.source.prompts_answered) == (0, 0, 3)
    with pytest.raises(StartupError, match="questions are a"):
        answer_questions(config, said.append)


def _id_of_broken(given: dict[tuple[str, str], dict[str, object]]) -> str:
    """Return the prompt id under which broken lines are failed."""
    return next(prompt_id for uri, prompt_id in given if "#line" in uri)


def test_what_the_user_must_mend_is_said_before_anything_is_decoded(
    config: CaptionConfig, tmp_path: Path
) -> None:
    bare = str(write_tiny_model(tmp_path / "bare"))
    for changed, message in (
        (replace(config, model=str(tmp_path)), r"no config\.json"),
        (replace(config, source=f"{config.source}/none/such"), "source=.*none/such"),
        (
            replace(config, model=bare, compression=CompressionConfig(require_selector=True)),
            "selector untrained",
        ),
        (replace(config, pools=replace(config.pools, decode_actors=9)), "2 CPUs are too few"),
        (
            replace(config, pools=replace(config.pools, compress_gpus=1.0, answer_gpus=0.5)),
            "0 GPUs are too few: compressing and answering take 1.5",
        ),
    ):
        with pytest.raises(StartupError, match=message):
            caption_corpus(changed)
