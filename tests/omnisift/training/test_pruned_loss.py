"""The loss on the pruned sequence: transformers' own loss, and gradients by differences."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omnisift.answer import Answerer
from omnisift.audio_selection import AudioSelector
from omnisift.checkpoint import build_selector, load_backbone, load_tokenizer, read_selector
from omnisift.compress import drop_shares
from omnisift.compression_plan import DropShares
from omnisift.compressor import Clip, TooLongError, VideoCompressor
from omnisift.layout import Modality
from omnisift.methods import TRAINED_METHODS
from omnisift.mini.tiny import write_tiny_model
from omnisift.training.pruned_loss import Example, PrunedLoss
from tests.omnisift.slow_compress import slow_chunks, slow_compress

SYSTEM = "You see and hear."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), selector=True)


def _loss(folder: Path, **settings: object) -> PrunedLoss:
    backbone = load_backbone(folder)
    return PrunedLoss(
        backbone,
        build_selector(read_selector(folder), backbone.width),
        load_tokenizer(folder),
        drop_shares(0.25),
        system_prompt=SYSTEM,
        **settings,  # type: ignore[arg-type]
    )


def _clip(frames: int, height: int, width: int, samples: int) -> Clip:
    generator = torch.Generator().manual_seed(frames + samples)
    shape = (frames, height, width, 3)
    return Clip(
        frames=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        audio=torch.randn(samples, generator=generator) * 0.1,
        fps=2.0,
    )


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Unequal lengths, sound and none, an odd number of grids."""
    return [
        Example(_clip(8, 84, 84, 64_000), "What is seen?", "A red square falls."),
        Example(_clip(4, 56, 84, 0), "And heard?", "nothing"),
        Example(_clip(6, 84, 56, 50_000), "Why <|im_end|>?", "Because <|im_start|> é."),
    ]


def test_the_prompt_is_the_one_that_is_answered(folder: Path, examples: list[Example]) -> None:
    """Token by token: what the LLM reads in training is what it reads when it answers."""
    loss = _loss(folder)
    compressor = VideoCompressor(loss.backbone, loss.selector, loss.shares)
    answerer = Answerer(
        loss.backbone, load_tokenizer(folder), system_prompt=SYSTEM, max_new_tokens=1
    )
    for example in examples:
        laid = loss.lay(example)
        with torch.no_grad():
            [(embeds, positions)] = loss._prune([laid], loss._embed_all([laid]))
        [kept] = compressor([example.clip])
        prompt = answerer.ask(answerer.open(kept), example.prompt)
        length = len(embeds) - laid.num_answer
        assert torch.equal(embeds[:length], torch.cat([prompt.context.embeds, prompt.question]))
        asked = torch.cat([prompt.context.positions, prompt.question_positions], dim=1)
        assert torch.equal(positions[:, :length], asked)
        assert torch.equal(positions[0].diff()[length - 1 :], torch.ones(laid.num_answer))


def test_gradients_reach_llm_and_selector_and_nothing_else(
    folder: Path, examples: list[Example]
) -> None:
    loss = _loss(folder)
    loss([loss.lay(example) for example in examples]).loss.backward()
    trained = loss.trained()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
    reached = {name for name, p in trained.items() if p.grad is not None and p.grad.abs().max() > 0}
    assert len(reached) == len(trained)
    assert sum(name.startswith("thinker.compressor.") for name in reached) == 18
    ids = {id(parameter) for parameter in trained.values()}
    frozen = [p for p in loss.backbone.model.parameters() if id(p) not in ids]
    assert frozen
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_exploration_takes_the_mean_from_the_scores_gradient(
    folder: Path, examples: list[Example]
) -> None:
    def of_the_bias(exploration: float) -> float:
        torch.manual_seed(0)
        loss = _loss(folder, exploration=exploration)
        last = loss.selector.score_head[2]
        assert isinstance(last, torch.nn.Linear)
        torch.nn.init.zeros_(last.weight)  # all scores alike: the bias alone moves their sum
        loss([loss.lay(examples[0])]).loss.backward()
        assert last.bias.grad is not None
        return float(last.bias.grad.abs())

    assert of_the_bias(0.1) < 1e-3 * of_the_bias(0.0)


def _slow_loss(loss: PrunedLoss, folder: Path, example: Example) -> Tensor:
    """Return the summed loss by slow loops over chunks and tokens and transformers' own forward."""
    model, layout = loss.backbone.model, loss.backbone.layout
    block = loss._compressor.block_of(example.clip)
    with torch.inference_mode():
        media = {
            Modality.VIDEO: list(loss.backbone.encode_video([example.clip.frames])[0]),
            Modality.AUDIO: list(loss.backbone.encode_audio([example.clip.audio])[0]),
        }
    embed = model.get_input_embeddings()
    rows = [
        media[Modality(kind)].pop(0).clone() if kind else embed(torch.tensor(id_))
        for id_, kind in zip(block.ids.tolist(), block.modality.tolist(), strict=True)
    ]
    pruned = slow_compress(
        torch.stack(rows),
        block.ids.tolist(),
        block.positions[0].tolist(),
        weights=dict(loss.selector.named_parameters()),
        num_heads=loss.selector.cross_attn.num_heads,
        video_drop=loss.shares.video,
        audio_drop=loss.shares.audio,
        video_token_id=layout.video_token_id,
        audio_token_id=layout.audio_token_id,
    )
    assert pruned.margin > 1e-6, "a tie would make the comparison empty"
    tokenizer = load_tokenizer(folder)
    mark = tokenizer.get_vocab()

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True
        ).input_ids
        return found

    start, end = mark["<|im_start|>"], mark["<|im_end|>"]
    before = [start, *ids(f"system\n{SYSTEM}"), end, *ids("\n"), start, *ids("user\n")]
    asked = [*ids(example.prompt), end, *ids("\n"), start, *ids("assistant\n")]
    answer = [*ids(example.answer), end]
    texts = [embed(torch.tensor(part)) for part in (before, asked + answer)]
    keep = np.array(pruned.keep)
    behind = np.arange(len(asked + answer)) + len(before) + block.next_position
    positions = [
        np.tile(np.arange(len(before)), (3, 1)),
        block.positions[:, keep] + len(before),
        np.tile(behind, (3, 1)),
    ]
    embeds = torch.cat([texts[0], pruned.embeds, texts[1]])
    labels = torch.full((len(embeds),), -100)
    labels[-len(answer) :] = torch.tensor(answer)
    output = model(
        inputs_embeds=embeds[None],
        position_ids=torch.from_numpy(np.concatenate(positions, axis=1))[:, None],
        attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
        labels=labels[None],
    )
    mean: Tensor = output.loss
    return mean * len(answer)


def _gradients(loss: PrunedLoss) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in loss.trained().items() if p.grad is not None}
    loss.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_slow_loops_and_transformers_own_loss(
    folder: Path, examples: list[Example], checkpointing: bool
) -> None:
    loss = _loss(folder, gradient_checkpointing=checkpointing)
    runs: list[int] = []
    loss.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    sums = loss([loss.lay(example) for example in examples])
    sums.loss.backward()
    assert len(runs) == (2 if checkpointing else 1)  # again in the backward pass
    gradients = _gradients(loss)
    slow = torch.stack([_slow_loss(loss, folder, example) for example in examples]).sum()
    slow.backward()
    expected = _gradients(loss)
    assert float(sums.loss.detach()) == pytest.approx(float(slow.detach()), rel=1e-5)
    assert gradients.keys() == expected.keys() == loss.trained().keys()
    for name, gradient in gradients.items():
        atol = 2e-4 * float(expected[name].abs().max()) + 1e-8
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=atol, msg=name)


class _Told(nn.Module):
    """A selector that says what it was told."""

    def __init__(self, score: Tensor) -> None:
        super().__init__()
        self.score = score

    def forward(self, *_: Tensor) -> Tensor:
        return self.score


def test_two_selections_pull_the_selector_by_the_difference_of_their_losses(
    folder: Path, examples: list[Example]
) -> None:
    """Against the plain loss of each example under a selector that says the pushed scores."""
    loss = _loss(folder, exploration=0.3)
    laid = [loss.lay(example) for example in examples]
    scores: list[Tensor] = []
    watch = loss.selector.register_forward_hook(lambda *args: scores.append(args[2]))
    torch.manual_seed(5)
    sums = loss(laid, selecting=True)
    watch.remove()
    sums.loss.backward(retain_graph=True)  # the scores are pulled by hand below
    found = _gradients(loss)
    assert {name for name in loss.trained() if "compressor" in name} == found.keys()

    heard = [one for one, example in zip(laid, examples, strict=True) if len(example.clip.audio)]
    assert 2 * len(heard) == len(scores) == 4  # the second selection only repeats them
    plain = _loss(folder)
    along, first = [], float(plain([laid[1]]).loss.detach())  # the one without sound
    torch.manual_seed(5)
    for one, score in zip(heard, scores[:2], strict=True):
        chunks = slow_chunks(
            one.block.ids.tolist(),
            one.block.positions[0].tolist(),
            video_token_id=plain.backbone.layout.video_token_id,
            audio_token_id=plain.backbone.layout.audio_token_id,
        )
        sound = [[i < len(chunk.audio) for i in range(score.shape[1])] for chunk in chunks]
        assert score.shape[0] == len(chunks)
        # Padding is no sound: it is neither pushed nor does its score learn.
        push = 0.3 * torch.randn_like(score) * torch.tensor(sound)
        losses = []
        for pushed in (score + push, score - push):
            plain.selector = cast("AudioSelector", _Told(pushed.detach()))
            with torch.no_grad():
                losses.append(float(plain([one]).loss))
        assert losses[0] != losses[1]
        along.append((losses[0] - losses[1]) / 2 * (score * push).sum() / 0.3**2)
        first += losses[0]
    assert float(sums.loss.detach()) == pytest.approx(first, rel=1e-5)
    assert sums.num_answer == sum(one.num_answer for one in laid)
    torch.stack(along).sum().backward()
    expected = _gradients(loss)
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        atol = 1e-3 * float(expected[name].abs().max()) + 1e-8
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("silent", [False, True])
def test_of_nothing_to_select_the_pull_is_zero_but_there(
    folder: Path, examples: list[Example], silent: bool
) -> None:
    loss = _loss(folder, exploration=0.3)
    sums = loss([loss.lay(examples[1])] if silent else [], selecting=True)
    sums.loss.backward()
    assert (float(sums.loss.detach()) > 0) == silent
    gradients = _gradients(loss)
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())


def test_of_no_examples_the_gradients_are_zero_but_there(folder: Path) -> None:
    loss = _loss(folder)
    sums = loss([])
    sums.loss.backward()
    assert (float(sums.loss.detach()), sums.num_answer) == (0, 0)
    llm = {name: p for name, p in loss.trained().items() if "compressor" not in name}
    assert all(p.grad is not None and not p.grad.any() for p in llm.values())


@pytest.mark.parametrize("method", ["random", "none", "omnisift_random_audio"])
def test_without_a_selector_in_the_method_it_gets_no_gradient(
    folder: Path, examples: list[Example], method: str
) -> None:
    loss = _loss(folder, method=method)
    sums = loss([loss.lay(examples[0])])
    sums.loss.backward()
    assert all(p.grad is None for p in loss.selector.parameters())
    assert not any("compressor" in name for name in loss.trained())
    assert loss.lm_head.weight.grad.abs().max() > 0
    block = loss.lay(examples[0]).block
    texts = sum(len(part) for part in (loss.lay(examples[0]).before, loss.lay(examples[0]).after))
    pruned = sums.num_tokens - texts
    assert pruned == len(block.ids) if method == "none" else pruned < 0.5 * len(block.ids)


def test_what_does_not_fit_is_said_before_the_towers_run(
    folder: Path, examples: list[Example]
) -> None:
    laid = _loss(folder).lay(examples[0])
    exact = int(_loss(folder)([laid]).num_tokens)
    assert _loss(folder, max_tokens=exact).lay(examples[0]).num_answer == laid.num_answer
    with pytest.raises(TooLongError, match=f"are {exact} tokens after pruning, the limit is"):
        _loss(folder, max_tokens=exact - 1).lay(examples[0])
    loss = _loss(folder)
    end = int(laid.after_positions[0, -1])
    loss.backbone.max_positions = end + 1
    loss.lay(examples[0])
    loss.backbone.max_positions = end
    with pytest.raises(TooLongError, match=f"end at position {end}, the model was made for {end}"):
        loss.lay(examples[0])


@pytest.mark.parametrize("method", TRAINED_METHODS)
def test_an_example_is_measured_by_what_its_method_keeps(
    folder: Path, examples: list[Example], method: str
) -> None:
    """Also where nothing seen is left: some methods then keep all sound, others do not."""
    loss = _loss(folder, method=method)
    for loss.shares in (drop_shares(0.25), DropShares(video=1.0, audio=0.5)):
        for example in examples:
            loss.max_tokens = 32_768
            laid = loss.lay(example)
            with torch.no_grad():
                exact = loss([laid]).num_tokens
            loss.max_tokens = exact
            loss.lay(example)
            loss.max_tokens = exact - 1
            with pytest.raises(TooLongError, match=f"are {exact} tokens after pruning"):
                loss.lay(example)


def test_a_method_without_training_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="got 'dycoke': the other methods have nothing to train"):
        _loss(folder, method="dycoke")
