"""The reference engine, and the one for CPUs: transformers' layers."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from omnisift.answer import Answer, Answerer, Prompt
from omnisift.checkpoint import load_backbone, load_tokenizer
from omnisift.compressor import TooLongError
from omnisift.engines.interface import AskedVideo, Refusal
from omnisift.prompts import BadTokensError, Sampling

log = logging.getLogger(__name__)


class TransformersEngine:
    """Answer all questions of a call as one batch."""

    def __init__(
        self,
        folder: Path,
        *,
        system_prompt: str,
        max_new_tokens: int,
        sampling: Sampling,
        device: str,
    ) -> None:
        """Load the LLM of a checkpoint."""
        self.answerer = Answerer(
            load_backbone(folder, part="language_model", device=device),
            load_tokenizer(folder),
            system_prompt=system_prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
        )

    def __call__(self, videos: Sequence[AskedVideo]) -> list[list[Answer | Refusal]]:
        """Return an answer or a refusal for each question of each video."""
        asked = [self._prompts(video) for video in videos]
        prompts = [prompt for of_video in asked for prompt in of_video]
        given = iter(self._answer([prompt for prompt in prompts if isinstance(prompt, Prompt)]))
        return [
            [next(given) if isinstance(prompt, Prompt) else prompt for prompt in of_video]
            for of_video in asked
        ]

    def close(self) -> None:
        """Do nothing: the weights go with the object."""

    def _prompts(self, video: AskedVideo) -> list[Prompt | Refusal]:
        """Return what can be asked of a video; questions that are too long are refused here."""
        try:
            context = self.answerer.open(video.kept)
        except BadTokensError as error:
            return [Refusal("bad_tokens", str(error))] * len(video.questions)
        prompts: list[Prompt | Refusal] = []
        for question in video.questions:
            try:
                prompt = self.answerer.ask(
                    context, question.text, choices=question.choices, seed=question.seed
                )
            except TooLongError as error:
                prompts.append(Refusal("too_long", str(error)))
            else:
                prompts.append(prompt)
        return prompts

    def _answer(self, prompts: list[Prompt]) -> list[Answer | Refusal]:
        """Answer a batch; one that does not fit the GPU is halved until it does."""
        if not prompts:
            return []
        try:
            return list(self.answerer(prompts))
        except torch.OutOfMemoryError:
            # Behind this block: as long as the error is handled, it holds what the layers had.
            log.warning("%d questions together do not fit the GPU's memory", len(prompts))
        torch.cuda.empty_cache()
        if len(prompts) == 1:
            return [Refusal("out_of_memory", f"{len(prompts[0])} tokens do not fit the GPU")]
        half = len(prompts) // 2
        return self._answer(prompts[:half]) + self._answer(prompts[half:])
