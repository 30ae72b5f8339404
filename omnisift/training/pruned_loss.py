"""Next-token cross-entropy of the answer on the pruned sequence: what trains LLM and selector.

The prompt is the one that `omnisift/answer.py` answers; behind it stand the answer and <|im_end|>,
which alone are learned. Towers and projectors are frozen; the selector is reached through the
straight-through factor of the compression (OmniSIFT, arXiv 2602.04804).

Shapes: B sequences, L tokens, A tokens of all answers, D width.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone, language_model
from omnisift.checkpoint import SELECTOR_PREFIX
from omnisift.compress import Explore
from omnisift.compression_plan import COMPLETE, Deciders, DropShares, plan_compression
from omnisift.compressor import Clip, TooLongError, VideoCompressor
from omnisift.layout import Block, Modality
from omnisift.methods import TRAINED_METHODS, compress_with, find_method
from omnisift.prompts import PromptText, prompt_positions
from omnisift.training.exploring import Antithetic, exploring


@dataclass(frozen=True, eq=False)
class Example:
    """A video, a question and the answer to learn."""

    clip: Clip
    prompt: str
    answer: str
    video_key: str = ""  # seeds the methods that leave something to chance


@dataclass(frozen=True, eq=False)
class LaidExample:
    """An example whose tokens are in their places; the towers have not run."""

    example: Example
    block: Block
    before: Tensor  # [L1] ids of the text in front of the block
    after: Tensor  # [L2] ids of the text behind it, the answer last
    after_positions: Tensor  # [3, L2]
    num_answer: int  # tokens, <|im_end|> included


class LossSums(NamedTuple):
    """Sums over the answers' tokens; divide by `num_answer` of a whole batch, not of a part."""

    loss: Tensor  # float32, with gradient
    correct: Tensor  # tokens that are the likeliest
    num_answer: int
    num_tokens: int  # that the LLM read


class _Embedded(NamedTuple):
    """An example before it is pruned."""

    before: Tensor  # [L1, D]
    block: Tensor  # [L, D]
    after: Tensor  # [L2, D]


class PrunedLoss(nn.Module):
    """The loss of a few examples; its parameters are those that are trained."""

    def __init__(
        self,
        backbone: Backbone,
        selector: AudioSelector,
        tokenizer: PreTrainedTokenizerBase,
        shares: DropShares,
        *,
        system_prompt: str,
        method: str = "omnisift",
        max_tokens: int = 32_768,
        nominal_timestamps: bool = False,
        gradient_checkpointing: bool = False,
        exploration: float = 0.0,
    ) -> None:
        """Freeze all of `backbone` but its LLM (text embedding and head included).

        `max_tokens` bounds what the LLM reads of an example, after pruning. `exploration` is the
        noise of `exploring` and of `Antithetic`, 0 the published gradient.
        """
        super().__init__()
        if method not in TRAINED_METHODS:
            raise ValueError(
                f"method must be one of {', '.join(TRAINED_METHODS)}, got {method!r}: the other "
                "methods have nothing to train"
            )
        model = backbone.model.requires_grad_(False)
        self.language_model = language_model(model)
        self.lm_head: Any = model.lm_head
        self.selector = selector.to(backbone.device)
        self.language_model.requires_grad_(True)
        self.lm_head.requires_grad_(True)
        # Where nothing reads its scores, a checkpoint must not pass for one with a selector.
        self.selector.requires_grad_(find_method(method).selector)
        if gradient_checkpointing:
            # transformers 5.23 has the first name, 5.17 the second.
            enable = getattr(self.language_model, "activation_checkpointing_enable", None)
            (enable or self.language_model.gradient_checkpointing_enable)({"use_reentrant": False})
            self.language_model.train()  # transformers recomputes only then; there is no dropout
        self.backbone = backbone
        self.text = PromptText(tokenizer, system_prompt)
        self.shares = shares
        self.method = method
        self.max_tokens = max_tokens
        self.exploration = exploration
        self._compressor = VideoCompressor(
            backbone, selector, shares, method=method, nominal_timestamps=nominal_timestamps
        )

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in a published checkpoint."""
        prefixes = {
            "language_model": "thinker.model.",
            "lm_head": "thinker.lm_head.",
            "selector": SELECTOR_PREFIX,
        }
        named = ((name.partition("."), value) for name, value in self.named_parameters())
        return {
            prefixes[part] + rest: value for (part, _, rest), value in named if value.requires_grad
        }

    def lay(self, example: Example) -> LaidExample:
        """Lay out an example, on the host. Raises TooLongError where the LLM cannot read it."""
        block = self._compressor.block_of(example.clip)
        answer = self.text.choice(example.answer)
        after = [*self.text.after_video(example.prompt), *answer]
        before = self.text.before_video
        positions = prompt_positions(
            np.empty((3, 0), np.int64),
            next_position=block.next_position,
            num_before=len(before),
            num_after=len(after),
        )[:, len(before) :]
        end, limit = int(positions[0, -1]), self.backbone.max_positions
        if end >= limit:
            raise TooLongError(
                f"video, prompt and answer end at position {end}, the model was made for {limit}"
            )
        num_tokens = len(before) + self._num_kept(block) + len(after)
        if num_tokens > self.max_tokens:
            raise TooLongError(
                f"video, prompt and answer are {num_tokens} tokens after pruning, the limit is "
                f"{self.max_tokens}"
            )
        return LaidExample(
            example=example,
            block=block,
            before=torch.tensor(before),
            after=torch.tensor(after),
            after_positions=torch.from_numpy(positions),
            num_answer=len(answer),
        )

    def _num_kept(self, block: Block) -> int:
        if self.method == "none":
            return len(block.ids)
        layout = self.backbone.layout
        # Of chance and scores alike as many stay; but these lose sound whatever is still seen.
        alone = self.method in ("random", "omnisift_audio_only")
        plan = plan_compression(
            [(torch.from_numpy(block.ids), torch.from_numpy(block.positions))],
            self.shares,
            layout,
            device=torch.device("cpu"),
            deciders=Deciders(audio="audio") if alone else COMPLETE,
        )
        return plan.kept[0]

    def forward(self, batch: Sequence[LaidExample], *, selecting: bool = False) -> LossSums:
        """Return the sums of some examples; of none, zeros that carry gradients all the same.

        (Workers of a process group must run the same number of times, whatever their data.)
        With `selecting` the gradient is the selector's alone, that of `Antithetic`: the LLM stays
        as it is and reads each example twice. The loss is then that of the first selection.
        """
        if selecting:
            return self._compare_selections(batch)
        if not batch:
            return self._nothing()
        explore = exploring(self.exploration)
        sequences = self._prune(batch, self._embed_all(batch), explore)
        losses_A, correct = self._read_answers(batch, sequences)
        return LossSums(losses_A.sum(), correct, len(losses_A), _num_tokens(sequences))

    def _compare_selections(self, batch: Sequence[LaidExample]) -> LossSums:
        if not batch:
            with torch.no_grad():
                for _ in range(2):
                    nothing = self._nothing()
            return nothing._replace(loss=self._no_pull())
        with torch.no_grad():
            embedded = self._embed_all(batch)
        # One each: an example has chunks of its own, and a loss.
        noises = [Antithetic(self.exploration) for _ in batch]
        read: list[Tensor] = []
        for explores in ([noise.first for noise in noises], [noise.second for noise in noises]):
            # The second only reads the scores of the first.
            with torch.no_grad() if read else nullcontext():
                sequences = [
                    sequence
                    for laid, parts, explore in zip(batch, embedded, explores, strict=True)
                    for sequence in self._prune([laid], [parts], explore)
                ]
            with torch.no_grad():
                losses_A, correct = self._read_answers(batch, sequences)
            losses = losses_A.split([laid.num_answer for laid in batch])
            read.append(torch.stack([some.sum() for some in losses]))
        first_B, second_B = read
        pulls = [
            noise.loss(first_B[row : row + 1], second_B[row : row + 1])
            for row, noise in enumerate(noises)
            if noise.pushed  # there is sound
        ]
        pull = torch.stack(pulls).sum() if pulls else self._no_pull()
        loss = first_B.sum() + (pull - pull.detach())
        return LossSums(loss, correct, len(losses_A), _num_tokens(sequences))

    def _read_answers(
        self, batch: Sequence[LaidExample], sequences: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return the losses [A] of the answers' tokens, and how many are the likeliest."""
        longest = max(len(embeds) for embeds, _ in sequences)
        # Padded on the right, where causal attention does not look: no mask is needed.
        embeds_BLD = torch.stack([_pad(embeds.T, longest).T for embeds, _ in sequences])
        positions_3BL = torch.stack([_pad(positions, longest) for _, positions in sequences], dim=1)
        hidden_BLD = self._read(embeds_BLD, positions_3BL)
        hidden_AD = torch.cat(
            [
                # a token is predicted where the one in front of it stands
                hidden_BLD[row, len(embeds) - laid.num_answer - 1 : len(embeds) - 1]
                for row, (laid, (embeds, _)) in enumerate(zip(batch, sequences, strict=True))
            ]
        )
        targets_A = torch.cat([laid.after[-laid.num_answer :] for laid in batch])
        targets_A = targets_A.to(hidden_AD.device, non_blocking=True)
        # float32: a sum of exponentials over 150,000 words
        logits = self.lm_head(hidden_AD).float()
        losses_A = F.cross_entropy(logits, targets_A, reduction="none")
        return losses_A, (logits.argmax(dim=-1) == targets_A).sum()

    def _read(self, embeds_BLD: Tensor, positions_3BL: Tensor) -> Tensor:
        hidden: Tensor = self.language_model(
            inputs_embeds=embeds_BLD,
            position_ids=positions_3BL.to(embeds_BLD.device, non_blocking=True),
            use_cache=False,
        ).last_hidden_state
        return hidden

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.language_model.get_input_embeddings()(
            ids.to(self.backbone.device, non_blocking=True)
        )
        return embedded

    def _nothing(self) -> LossSums:
        ids = torch.tensor(self.text.before_video[:1])
        hidden = self._read(self._embed(ids)[None], torch.zeros((3, 1, 1), dtype=torch.long))
        loss = self.lm_head(hidden).float().sum() * 0
        return LossSums(loss, torch.zeros((), device=loss.device, dtype=torch.long), 0, 0)

    def _no_pull(self) -> Tensor:
        """Return a zero that has gradients for all of the selector."""
        return torch.stack([parameter.sum() for parameter in self.selector.parameters()]).sum() * 0

    def _embed_all(self, batch: Sequence[LaidExample]) -> list[_Embedded]:
        """Run the towers and embed the texts."""
        clips = [laid.example.clip for laid in batch]
        # Out of inference mode by a copy: autograd keeps none of its tensors.
        video = [x.clone() for x in self.backbone.encode_video([clip.frames for clip in clips])]
        audio = [x.clone() for x in self.backbone.encode_audio([clip.audio for clip in clips])]
        texts = [
            part
            for laid in batch
            for part in (laid.before, torch.from_numpy(laid.block.ids), laid.after)
        ]
        embedded = self._embed(torch.cat(texts)).split([len(part) for part in texts])
        return [
            _Embedded(
                embedded[3 * row],
                _place(embedded[3 * row + 1], laid.block, *media),
                embedded[3 * row + 2],
            )
            for row, (laid, media) in enumerate(
                zip(batch, zip(video, audio, strict=True), strict=True)
            )
        ]

    def _prune(
        self,
        batch: Sequence[LaidExample],
        embedded: Sequence[_Embedded],
        explore: Explore | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return embeddings [L, D] and positions [3, L] of the pruned sequences."""
        layout = self.backbone.layout
        kept = compress_with(
            self.method,
            [
                (
                    parts.block,
                    torch.from_numpy(laid.block.ids),
                    torch.from_numpy(laid.block.positions),
                )
                for laid, parts in zip(batch, embedded, strict=True)
            ],
            self.shares,
            layout,
            selector=self.selector,
            explore=explore,
            video_keys=[laid.example.video_key for laid in batch],
        )
        sequences = []
        for laid, parts, pruned in zip(batch, embedded, kept, strict=True):
            start = len(laid.before)
            embeds = torch.cat([parts.before, pruned.embeds, parts.after])
            # On the tokens' device: on the host they would wait for the compression.
            block_positions = torch.from_numpy(laid.block.positions).to(
                embeds.device, non_blocking=True
            )
            positions = torch.cat(
                [
                    torch.arange(start, device=embeds.device).expand(3, -1),
                    block_positions[:, pruned.kept_index] + start,
                    laid.after_positions.to(embeds.device, non_blocking=True),
                ],
                dim=1,
            )
            sequences.append((embeds, positions))
        return sequences


def _place(embeds_LD: Tensor, block: Block, video: Tensor, audio: Tensor) -> Tensor:
    """Put the media's tokens among the block's marks, which carry gradients."""
    for kind, tokens in ((Modality.VIDEO, video), (Modality.AUDIO, audio)):
        places = torch.from_numpy(np.flatnonzero(block.modality == kind)).to(embeds_LD.device)
        embeds_LD = embeds_LD.index_put((places,), tokens.to(embeds_LD.dtype))
    return embeds_LD


def _num_tokens(sequences: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(len(embeds) for embeds, _ in sequences)


def _pad(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1]))
