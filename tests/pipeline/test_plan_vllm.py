"""The whole plan with vLLM as its engine, where vLLM is installed: its rows are transformers'."""

import csv
import logging
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import ray
import torch

from omnisift.measure.random_checkpoint import write_random_llm
from pipeline.answers import read_answers
from pipeline.config import AnswerConfig, CacheConfig, CaptionConfig, MediaConfig, PoolsConfig
from pipeline.run import answer_questions, caption_corpus
from pipeline.storage import Storage
from pipeline.testing.clips import source

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
]

ASKS = [
    ("sound", "Is there sound?", "yes|no"),
    ("many", "How many?", '["one", "two", "three"]'),
    ("free", "What is it?", ""),
]


@pytest.fixture
def _local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_local_ray")
def test_captions_and_choices_are_those_of_the_reference_engine(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("bigbuckbunny.mp4", "carphone_pristine.mp4"):
        (videos / name).write_bytes(source(name).read_bytes())
    (videos / "bad.mp4").write_text("no video")
    uris = sorted(videos.iterdir())
    table = videos / "questions.csv"  # local files are named relative to the source's folder
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "prompt_id", "prompt", "choices"])
        for video in uris:
            writer.writerows([str(video), *ask] for ask in ASKS)
    model = write_random_llm(tmp_path / "model", width=256, heads=4, kv_heads=2, layers=2)
    seen = {}
    for engine in ("transformers", "vllm"):
        config = CaptionConfig(
            source=str(videos),
            output=str(tmp_path / engine),
            model=str(model),
            media=MediaConfig(fps=1.0, max_frames=8, min_pixels=12_544, max_pixels=12_544),
            cache=CacheConfig(path=str(tmp_path / "cache")),  # both answer from the same tokens
            answer=AnswerConfig(engine=engine, max_new_tokens=16, context_tokens=4096, calls=4),
            pools=PoolsConfig(decode_actors=1, decode_cpus=0.3, compress_cpus=0.2, answer_cpus=0.2),
        )
        first = caption_corpus(config)
        assert (first.videos_ok, first.videos_failed) == (2, 1)
        asking = replace(config, source=str(table))
        assert answer_questions(asking).answers_ok == 6
        again = answer_questions(asking)
        assert (again.answers_ok, again.source.prompts_answered) == (0, 6)
        rows = read_answers(config.output, Storage(config.storage)).to_pylist()
        seen[engine] = {
            (row["uri"], row["prompt_id"]): (
                # in 16 bits a random model's next token may fall either way
                row["text"] if row["choices"] or not torch.cuda.is_available() else None,
                row["choices"],
                row["finish_reason"],
                row["num_prompt_tokens"],
                row["error_type"],
            )
            for row in rows
        }
    assert seen["vllm"] == seen["transformers"]
    assert len(seen["vllm"]) == 12
