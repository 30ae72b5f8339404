"""What the backbone is taught beside answering: labels of its tokens that the world knows.

Shapes: B scenes, G grids, N tokens of a grid, A audio tokens, D width.
"""

import torch.nn.functional as F
from torch import Tensor

from omnisift.mini.lessons import Lesson
from omnisift.mini.observe import Seen
from omnisift.mini.pictures import ScenePlan
from omnisift.mini.sounds import SoundPlan
from omnisift.mini.student import Student
from omnisift.mini.world import COLOURS, NOISES


def auxiliary_losses(
    student: Student,
    lesson: Lesson,
    plans: tuple[ScenePlan, SoundPlan],
    seen: Seen,
    video: Tensor,
    audio: Tensor,
    heard_after: Tensor,
) -> dict[str, Tensor]:
    """Return the losses by name: what sounds, what is where, who made a sound, what stood still.

    `plans` are the lesson's on the device. `video` [B, G, N, D] and `audio` [B, A, D] come from the
    towers, `heard_after` [B, A, D] are the LLM's last states at the audio tokens.
    """
    pictures, sounds = plans
    noise = sounds.noise
    silent = seen.sound < 0
    noise_label = noise.gather(1, seen.sound.clamp(min=0)).masked_fill(silent, len(NOISES))
    there = seen.owner >= 0
    thing = seen.owner.clamp(min=0)
    looks = (
        pictures.colour[:, None].expand(-1, thing.shape[1], -1).gather(2, thing),
        pictures.shape[:, None].expand(-1, thing.shape[1], -1).gather(2, thing),
        seen.action.gather(2, thing),
    )
    losses = {
        "loss/sound": F.cross_entropy(
            student.sound_head(audio).float().flatten(0, 1), noise_label.flatten()
        ),
        "loss/object": F.cross_entropy(
            student.object_head(video).float().flatten(0, 2), there.long().flatten()
        ),
    }
    for name, head, label in zip(
        ("colour", "shape", "action"), student.look_heads, looks, strict=True
    ):
        losses[f"loss/{name}"] = _cross_entropy(head(video), label, there)
    event = lesson.sound_event.to(video.device).gather(1, seen.sound.clamp(min=0))
    cause = pictures.event_thing.gather(1, event.clamp(min=0))
    cause = pictures.colour.gather(1, cause).masked_fill(event < 0, len(COLOURS))
    losses["loss/cause"] = _cross_entropy(student.cause_head(heard_after), cause, ~silent)
    still = ~there[:, :-1] & ~there[:, 1:]
    change = 1 - F.cosine_similarity(video[:, :-1], video[:, 1:], dim=-1)
    losses["loss/consistency"] = (change * still).sum() / still.sum().clamp(min=1)
    return losses


def _cross_entropy(logits: Tensor, labels: Tensor, where: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none")
    return (losses * where.flatten()).sum() / where.sum().clamp(min=1)
