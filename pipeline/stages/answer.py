"""Answer: kept tokens + prompts -> text."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from omnisift.answer import Answer as Text
from omnisift.answer import Answerer, Prompt
from omnisift.checkpoint import load_backbone, load_tokenizer, resolve
from omnisift.codec import decode
from omnisift.compressor import KeptTokens, TooLongError
from pipeline import rows


@dataclass(frozen=True)
class AnswerSettings:
    """What an answering actor is started with."""

    model: str
    revision: str
    system_prompt: str
    max_new_tokens: int
    device: str  # "cuda" or "cpu"


class Answer:
    """Ask each video its prompts.

    Reads: tokens, positions, next_position, prompts. Writes: answers, one for each prompt and in
    their order. A prompt that cannot be answered fails alone.
    """

    def __init__(self, settings: AnswerSettings) -> None:
        """Load the LLM."""
        folder: Path = resolve(settings.model, settings.revision)
        self.answerer = Answerer(
            load_backbone(folder, part="language_model", device=settings.device),
            load_tokenizer(folder),
            system_prompt=settings.system_prompt,
            max_new_tokens=settings.max_new_tokens,
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turn a block of rows.KEPT into one of rows.ANSWERED; its prompts are one batch."""
        start = time.perf_counter()
        videos = list(rows.iterate(block))
        answers: list[list[dict[str, Any]]] = []
        batch: list[tuple[dict[str, Any], Prompt]] = []
        for video in videos:
            asked = video["prompts"] if video["error_type"] is None else []
            # The uri is for error messages; rows.ANSWERED has no place for it in an answer.
            named = {"uri": video["uri"]}
            answers.append([{**named, "prompt_id": prompt["prompt_id"]} for prompt in asked])
            batch += self._prompts(video, asked, answers[-1])
        self._answer(batch)
        spent = (time.perf_counter() - start) / max(1, len(batch))
        return rows.build(
            [
                {**video, "answers": given, "answer_s": spent * len(given)}
                for video, given in zip(videos, answers, strict=True)
            ],
            rows.ANSWERED,
        )

    def _prompts(
        self, video: dict[str, Any], asked: list[dict[str, str]], answers: list[dict[str, Any]]
    ) -> list[tuple[dict[str, Any], Prompt]]:
        """Return the prompts of a video with the answers to fill in; too long ones fail here."""
        if not asked:
            return []
        context = self.answerer.open(_kept_tokens(video, self.answerer.backbone.device))
        prompts = []
        for answer, prompt in zip(answers, asked, strict=True):
            try:
                prompts.append((answer, self.answerer.ask(context, prompt["prompt"])))
            except TooLongError as error:
                answer["error_type"] = "too_long"
                answer["error_message"] = (
                    f"{video['uri']}, prompt {prompt['prompt_id']}: {error}; shorten the "
                    "prompt, lower answer.max_new_tokens or cut the video"
                )
        return prompts

    def _answer(self, batch: list[tuple[dict[str, Any], Prompt]]) -> None:
        """Fill in the answers; a batch that does not fit the GPU is halved until it does."""
        if not batch:
            return
        try:
            texts = self.answerer([prompt for _, prompt in batch])
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(batch) == 1:
                answer, prompt = batch[0]
                answer["error_type"] = "out_of_memory"
                answer["error_message"] = (
                    f"{answer['uri']}, prompt {answer['prompt_id']}: {len(prompt)} tokens do "
                    "not fit the GPU; lower compression.retain or give the actor more of the GPU "
                    "(pools.answer_gpus)"
                )
                return
            half = len(batch) // 2
            self._answer(batch[:half])
            self._answer(batch[half:])
            return
        for (answer, _), text in zip(batch, texts, strict=True):
            answer.update(_columns(text))


def _columns(text: Text) -> dict[str, Any]:
    return {
        "text": text.text,
        "num_prompt_tokens": text.num_prompt_tokens,
        "num_output_tokens": text.num_output_tokens,
        "finish_reason": text.finish_reason,
    }


def _kept_tokens(row: dict[str, Any], device: torch.device) -> KeptTokens:
    num_tokens, width = row["token_shape"]
    return KeptTokens(
        embeds=decode(row["tokens"], row["token_dtype"], (num_tokens, width), device=device),
        positions=np.array(row["positions"], np.int32).reshape(3, -1),
        modality=np.array(row["modality"], np.uint8),
        next_position=row["next_position"],
        kept_index=np.array(row["kept_index"], np.int32),
        num_video_tokens=row["num_video_tokens"],
        num_audio_tokens=row["num_audio_tokens"],
    )
