"""Say what 8 bits change in the small model's answers: `python jobs/benchmark_precision.py FOLDER`.

Cached tokens, vLLM's weights and its KV cache are in 8 bits beside 16, on scenes that the model has
never seen. FOLDER keeps their tokens and the answers, and what it has is not done again: made
where there is a decoder, it can be carried to where there is a GPU.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from omnisift.answer import Answer
from omnisift.checkpoint import build_selector, load_backbone, read_selector
from omnisift.codec import Codec
from omnisift.compressor import KeptTokens, VideoCompressor
from omnisift.engines.interface import AskedVideo, Question
from omnisift.engines.vllm_engine import VllmEngine, VllmOptions
from omnisift.mini.layouts import shares_for
from omnisift.mini.questions import draw_questions
from omnisift.mini.shipped import FOLDER, HELD_OUT_SEED
from omnisift.mini.world import draw_scene
from omnisift.prompts import Sampling
from pipeline.config import AnswerConfig
from pipeline.testing.kept_files import count_kept, read_kept, write_kept

RETAIN = 0.35
FIRST_SCENE = 100


class Precision(NamedTuple):
    """What is held in how many bits."""

    tokens: Codec = "bfloat16"
    weights: str = ""  # vLLM's name; empty: as the checkpoint is
    kv_cache: str = "auto"  # vLLM's name; auto: as the weights are computed with


SIXTEEN = "16 bits"
PRECISIONS = {
    SIXTEEN: Precision(),
    "tokens in int8": Precision(tokens="int8"),
    "weights in fp8": Precision(weights="fp8"),
    "KV cache in fp8": Precision(kv_cache="fp8"),
    "all in 8 bits": Precision("int8", "fp8", "fp8"),
}


def compress(scenes: int) -> list[KeptTokens]:
    """Render scenes as mp4 files, decode them as the pipeline does, and keep their tokens."""
    from pipeline.testing.scene_clips import decode_scene  # it needs a decoder's libraries

    backbone = load_backbone(FOLDER)
    selector = build_selector(read_selector(FOLDER), backbone.width)
    compressor = VideoCompressor(backbone, selector, shares_for(RETAIN))
    found = []
    for number in range(FIRST_SCENE, FIRST_SCENE + scenes):
        clip = decode_scene(draw_scene(HELD_OUT_SEED, number))
        found += compressor([clip], video_keys=[str(number)])
    return found


def kept_files(folder: Path, scenes: int) -> dict[Codec, str]:
    """Return the file of the scenes' kept tokens in each codec; write what is not there."""
    codecs: tuple[Codec, ...] = ("bfloat16", "int8")
    if not all((folder / codec).exists() for codec in codecs):
        kept = compress(scenes)
        for codec in codecs:
            write_kept(str(folder / codec), kept, codec)
    return {codec: str(next((folder / codec).glob("part-*.parquet"))) for codec in codecs}


def answers_of(precision: Precision, videos: Sequence[AskedVideo]) -> list[list[str]]:
    """Return what the shipped model answers; a refusal is an error here."""
    engine = VllmEngine(
        FOLDER,
        system_prompt=AnswerConfig().system_prompt,
        max_new_tokens=4,
        sampling=Sampling(),
        options=VllmOptions(
            gpu_memory_fraction=0.1,
            quantization=precision.weights,
            kv_cache_dtype=precision.kv_cache,
            eager=True,
            # also on a CPU, where the engine would compute in float32
            more={"dtype": "bfloat16", "kv_cache_memory_bytes": 1 << 30},
        ),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    try:
        given = engine(videos)
    finally:
        engine.close()
    texts = [[a.text for a in answers if isinstance(a, Answer)] for answers in given]
    if [len(said) for said in texts] != [len(video.questions) for video in videos]:
        raise RuntimeError(f"vLLM refused questions: {given}")
    return texts


def main() -> None:
    """Make what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for kept tokens and answers")
    parser.add_argument("--scenes", type=int, default=40, help="how many, if none are in FOLDER")
    parser.add_argument("--questions", type=int, default=6, help="about each")
    parser.add_argument("--only", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args()
    files = kept_files(options.folder, options.scenes)
    numbers = range(count_kept(files["bfloat16"]))
    asked = [
        draw_questions(draw_scene(HELD_OUT_SEED, FIRST_SCENE + number), 0, options.questions)
        for number in numbers
    ]
    said: dict[str, list[list[str]]] = {}
    for name in options.only:
        file = options.folder / f"{name}.json"
        if not file.exists():
            tokens = files[PRECISIONS[name].tokens]
            videos = [
                AskedVideo(str(i), read_kept(tokens, i), [Question(q.text) for q in asked[i]])
                for i in numbers
            ]
            file.write_text(json.dumps(answers_of(PRECISIONS[name], videos)))
        said[name] = json.loads(file.read_text())
    print(
        f"{len(numbers)} scenes, {sum(map(len, asked))} questions at {RETAIN:.0%} of the tokens\n"
    )
    print(
        "| | right, % | other answers than in 16 bits | now right, now wrong |\n|---|---|---|---|"
    )
    truth = [question.answer for questions in asked for question in questions]
    usual = list(chain(*said[SIXTEEN])) if SIXTEEN in said else []
    for name, answers in said.items():
        found = list(chain(*answers))
        right = sum(text == true for text, true in zip(found, truth, strict=True))
        line = f"| {name} | {100 * right / len(truth):.1f} |"
        if usual:
            both = list(zip(usual, found, truth, strict=True))
            gained = sum(new == true != old for old, new, true in both)
            lost = sum(old == true != new for old, new, true in both)
            line += f" {sum(old != new for old, new, _ in both)} | {gained}, {lost} |"
        print(line)


if __name__ == "__main__":
    main()
