"""Train the small model: the backbone on all tokens, then selector and LLM on compressed ones.

Shapes: B scenes, T frames, G grids, N tokens of a grid, A audio tokens, L tokens of the block,
P of the system turn, S of the questions, K objects, D width.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from omnisift.compress import Explore, compress_planned
from omnisift.compression_plan import CompressionPlan, DropShares, plan_compression
from omnisift.layout import ModelLayout
from omnisift.methods import DECIDERS, compress_with
from omnisift.mini import towers
from omnisift.mini.auxiliary import auxiliary_losses
from omnisift.mini.layers import GatedLayer, rms_norm, text_layer
from omnisift.mini.layouts import Clips, lay_out, place, shares_for, slot_mask
from omnisift.mini.lessons import IGNORED, Lesson, Lessons
from omnisift.mini.observe import Seen, observe
from omnisift.mini.questions import KINDS
from omnisift.mini.student import Stage, Student
from omnisift.training.exploring import Antithetic, exploring
from omnisift.training.loop import Schedule, train

_HELP_UNTIL, _HELP_AFTER = 0.6, 0.1  # share of the steps; weight of the auxiliary losses behind


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained."""

    stage: Stage
    schedule: Schedule
    seed: int
    method: str = "none"
    retain: tuple[float, ...] = (1.0,)  # drawn anew each step
    consistency: float = 0.0  # weight: background tokens stay as they were a grid before
    selector_rate: float = 1.0  # times the learning rate
    exploration: float = 0.0  # size of the noise on the scores that select


class Trainer:
    """The loss of a lesson."""

    def __init__(
        self, student: Student, lessons: Lessons, recipe: Recipe, device: torch.device
    ) -> None:
        """Take lessons for as many steps as the recipe has."""
        self.student, self.lessons, self.recipe, self.device = student, lessons, recipe, device
        self.layout = ModelLayout.of(student.model.config)
        self.trained = student.trained(recipe.stage)
        self.prefix = torch.tensor(lessons.text.before_video, device=device)
        self.end = lessons.text.im_end
        self._positions = self._slot_positions()
        self._masks = lru_cache(maxsize=64)(lambda length: slot_mask(length, lessons.slots, device))
        self._clips = lru_cache(maxsize=32)(
            lambda duration_s, audio_tokens: lay_out(self.layout, duration_s, audio_tokens, device)
        )
        self._plans = lru_cache(maxsize=64)(self._plan)

    def _slot_positions(self) -> Tensor:
        offsets = np.concatenate([np.arange(length) for length in self.lessons.slots.lengths])
        return torch.from_numpy(offsets).to(self.device)

    def loss(self, lesson: Lesson, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a lesson and what is logged; `progress` is the share of steps done."""
        recipe, student = self.recipe, self.student
        pictures, sounds = lesson.plans(self.device)
        with torch.no_grad():
            seen = observe(
                pictures,
                sounds,
                lesson.duration_s,
                rough=True,
                tail_samples=lesson.tail_samples,
            )
        wide = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        frozen = nullcontext() if recipe.stage == "backbone" else torch.no_grad()
        with wide:
            with frozen:
                video = towers.encode_frames(student.model, seen.frames).float()
                audio = towers.encode_mel(student.model, seen.mel).float()
            clips = self._clips(lesson.duration_s, audio.shape[1])
            embeds = place(student.model, clips, video, audio)
            if recipe.stage == "selector":
                return self._selector_loss(lesson, seen, clips, embeds.detach())
            if recipe.method == "none":
                kept = embeds
                kept_positions = clips.positions[:, None].expand(-1, len(embeds), -1)
            else:
                explore = exploring(recipe.exploration)
                kept, kept_positions, mask = self._compress(lesson, clips, embeds, explore)
            hidden = self._read(lesson, kept, kept_positions, clips.block.next_position)
            losses, metrics = self._text_losses(lesson, hidden[:, -lesson.ids.shape[1] :])
            loss = losses.sum()
            if recipe.method != "none":
                metrics |= _kept_metrics(mask[:, clips.audio], seen.sound >= 0)
            if recipe.stage == "backbone":
                weight = 1.0 if progress < _HELP_UNTIL else _HELP_AFTER
                after = hidden[:, len(self.prefix) : len(self.prefix) + embeds.shape[1]]
                heard_after = after.index_select(1, clips.audio)
                aux = auxiliary_losses(
                    student, lesson, (pictures, sounds), seen, video, audio, heard_after
                )
                steady = aux.pop("loss/consistency")
                loss = loss + weight * torch.stack(list(aux.values())).sum()
                if recipe.consistency:
                    loss = loss + recipe.consistency * steady
                metrics |= aux | {"loss/consistency": steady}
        return loss, metrics

    def _selector_loss(
        self, lesson: Lesson, seen: Seen, clips: Clips, embeds: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare two selections that differ by noise; the LLM stays as it is."""
        noise = Antithetic(self.recipe.exploration)
        found: list[tuple[Tensor, dict[str, Tensor]]] = []
        for explore in (noise.first, noise.second):
            # The second only reads the scores of the first.
            with torch.no_grad() if found else nullcontext():
                kept, positions, mask = self._compress(lesson, clips, embeds, explore)
            with torch.no_grad():
                hidden = self._read(lesson, kept, positions, clips.block.next_position)
                found.append(self._text_losses(lesson, hidden[:, -lesson.ids.shape[1] :]))
        (first, metrics), (second, _) = found
        loss = noise.loss(first, second)
        return loss, metrics | _kept_metrics(mask[:, clips.audio], seen.sound >= 0)

    def _compress(
        self, lesson: Lesson, clips: Clips, embeds: Tensor, explore: Explore | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the kept tokens [B, n, D], their positions [3, B, n], who was kept [B, L]."""
        recipe = self.recipe
        number = int(lesson.keys[0].rpartition("/")[2])
        chance = np.random.default_rng([recipe.seed, number])
        shares = shares_for(float(chance.choice(recipe.retain)))
        rows = embeds.float()
        deciders = DECIDERS.get(recipe.method)
        with torch.autocast(self.device.type, enabled=False):
            if deciders is not None and not deciders.by_chance:
                # The plan is the same for all clips of a layout: made once, not at each step.
                plan = self._plans(lesson.duration_s, len(clips.audio), len(rows), shares)
                results = compress_planned(
                    rows.unbind(), plan, self.student.selector, explore=explore
                )
            else:
                ids = torch.from_numpy(clips.block.ids)
                positions = torch.from_numpy(clips.block.positions)
                results = compress_with(
                    recipe.method,
                    [(row, ids, positions) for row in rows],
                    shares,
                    self.layout,
                    selector=self.student.selector,
                    explore=explore,
                    video_keys=lesson.keys,
                )
        index = torch.stack([result.kept_index for result in results])
        kept = torch.stack([result.embeds for result in results])
        return (
            kept,
            clips.positions[:, index],
            torch.stack([result.keep_mask for result in results]),
        )

    def _plan(
        self, duration_s: int, audio_tokens: int, number: int, shares: DropShares
    ) -> CompressionPlan:
        block = self._clips(duration_s, audio_tokens).block
        layout = torch.from_numpy(block.ids), torch.from_numpy(block.positions)
        return plan_compression(
            [layout] * number,
            shares,
            self.layout,
            device=self.device,
            deciders=DECIDERS[self.recipe.method],
        )

    def _read(self, lesson: Lesson, kept: Tensor, positions: Tensor, next_position: int) -> Tensor:
        """Run the LLM over system turn, kept tokens and slots; return its last states [B, ., D]."""
        embed = self.student.model.get_input_embeddings()
        ids = lesson.ids.to(self.device, non_blocking=True)
        batch, start = len(ids), len(self.prefix)
        x = torch.cat([embed(self.prefix).expand(batch, -1, -1), kept, embed(ids)], dim=1)
        before = torch.arange(start, device=self.device).expand(3, batch, -1)
        behind = (self._positions + start + next_position).expand(3, batch, -1)
        place = torch.cat([before, positions + start, behind], dim=2)
        text = self.student.text
        cos, sin = (angle[:, None] for angle in text.rotary_emb(x, place))
        config = self.student.model.config.text_config
        heads = config.num_attention_heads, config.num_key_value_heads
        mask = self._masks(start + kept.shape[1])
        for layer in text.layers:
            x = text_layer(GatedLayer.of_text(layer), x, mask, cos, sin, *heads)
        return rms_norm(x, text.norm.weight, text.norm.variance_epsilon)

    def _text_losses(self, lesson: Lesson, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return each scene's part in the loss [B], and what is logged."""
        targets = lesson.targets.to(self.device, non_blocking=True)
        kinds = lesson.kinds.to(self.device, non_blocking=True)
        logits = self.student.model.lm_head(hidden).float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(targets)
        right = logits.argmax(-1) == targets
        told = targets != IGNORED
        asked = told & (kinds < len(KINDS))
        captioned = told & (kinds == len(KINDS))
        answers = asked & (targets != self.end)
        # Each token counts alike, whichever scene it is of.
        of_questions = (losses * asked).sum(1) / asked.sum()
        of_caption = (losses * captioned).sum(1) / captioned.sum()
        metrics = {
            "loss/questions": of_questions.sum(),
            "loss/caption": of_caption.sum(),
            "accuracy": (right & answers).sum() / answers.sum(),
            "accuracy/caption": (right & captioned).sum() / captioned.sum(),
        }
        for index, kind in enumerate(KINDS):
            mine = answers & (kinds == index)
            metrics[f"accuracy/{kind}"] = (right & mine).sum() / mine.sum().clamp(min=1)
        return of_questions + of_caption, metrics


def _kept_metrics(kept: Tensor, sounding: Tensor) -> dict[str, Tensor]:
    """Return which share of the audio tokens is kept, of those with a sound and of the others."""
    return {
        "kept/sounding": (kept & sounding).sum() / sounding.sum().clamp(min=1),
        "kept/silent": (kept & ~sounding).sum() / (~sounding).sum().clamp(min=1),
    }


def run_stage(
    student: Student,
    lessons: Lessons,
    recipe: Recipe,
    folder: Path,
    *,
    device: torch.device,
    workers: int,
    log_every: int = 50,
) -> None:
    """Train a stage; goes on where `folder` stopped. The student is trained in place."""
    student.to(device)
    trainer = Trainer(student, lessons, recipe, device)
    steps = recipe.schedule.steps
    lessons_from: dict[str, Iterator[Lesson]] = {}

    def loss_of(step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        if not lessons_from:
            loader = DataLoader(
                lessons,
                batch_size=None,
                sampler=range(step, steps),
                num_workers=workers,
                pin_memory=device.type == "cuda",
                prefetch_factor=4 if workers else None,
            )
            lessons_from["next"] = iter(loader)
        return trainer.loss(next(lessons_from["next"]), step / steps)

    train(
        loss_of,
        trainer.trained,
        recipe.schedule,
        folder=folder,
        seed=recipe.seed,
        checkpoint_every=max(1, steps // 2),
        log_every=log_every,
        rate_of=lambda name: recipe.selector_rate if name.startswith("selector.") else 1.0,
    )
