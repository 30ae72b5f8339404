import pytest
import torch

from omnisift.training.exploring import Antithetic, exploring


@pytest.mark.parametrize("width", [50, 62, 1100])
def test_exploring_centres_the_gradient_of_what_is_there(width: int) -> None:
    """Raising all scores of a chunk alike has no gradient, however wide the rows of its group."""
    torch.manual_seed(0)
    counts = torch.tensor([50, 7, width])
    score = torch.rand(3, width, requires_grad=True)
    valid = torch.arange(width) < counts[:, None]
    explore = exploring(0.3)
    assert explore is not None
    noisy = explore(score, valid)
    assert not (noisy == score)[valid].any()
    worth = torch.rand(3, width)
    (noisy * valid * worth).sum().backward()
    assert score.grad is not None
    for row, count in enumerate(counts):
        there = worth[row, :count]
        expected = there - there.mean()
        torch.testing.assert_close(score.grad[row, :count], expected, rtol=0, atol=1e-4)
        assert not score.grad[row, count:].any()


def test_exploring_without_noise_is_the_published_gradient() -> None:
    assert exploring(0.0) is None


def test_the_pull_of_a_video_is_that_of_all_its_chunks_in_every_group() -> None:
    torch.manual_seed(0)
    groups = [torch.randn(4, 3, requires_grad=True), torch.randn(2, 9, requires_grad=True)]
    noise = Antithetic(0.5)
    pushed = [noise.first(score, torch.ones(score.shape)) for score in groups]
    turned = [noise.second(score, torch.ones(score.shape)) for score in groups]
    noise.loss(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])).backward()
    for score, up, down in zip(groups, pushed, turned, strict=True):
        torch.testing.assert_close(up + down, 2 * score)
        push = (up - down).detach() / 2
        # Half the difference of a video's losses, the mean over both videos.
        half = torch.tensor([1.0, -0.5]).repeat_interleave(len(score) // 2)
        torch.testing.assert_close(score.grad, half[:, None] / 2 * push / 0.5**2)


def test_nothing_is_learned_of_nothing() -> None:
    with pytest.raises(RuntimeError, match="nothing was selected"):
        Antithetic(0.5).loss(torch.zeros(1), torch.zeros(1))


def missed(scores_CA: torch.Tensor, worth_CA: torch.Tensor, keep: int) -> torch.Tensor:
    """What is lost with the tokens that are dropped, of each chunk: a loss without a gradient."""
    kept = scores_CA.topk(keep, dim=1).indices
    return worth_CA.sum(1) - worth_CA.gather(1, kept).sum(1)


def test_the_gradient_of_two_selections_is_that_of_the_expected_loss() -> None:
    torch.manual_seed(0)
    chunks, tokens, keep, noise = 40_000, 5, 2, 0.5
    scores, worth = torch.randn(tokens) * 0.5, torch.tensor([1.0, 0.0, 0.0, 2.0, 0.3])
    # Many chunks alike are many draws of one chunk; a row is wider than its sound.
    score = scores.repeat(chunks, 1)
    padded = torch.nn.functional.pad(score, (0, 20)).requires_grad_()
    valid = torch.arange(tokens + 20).expand(chunks, -1) < tokens
    both = Antithetic(noise)
    losses = [
        missed(explore(padded, valid)[:, :tokens], worth.expand(chunks, -1), keep)
        for explore in (both.first, both.second)
    ]
    both.loss(losses[0], losses[1]).backward()
    assert padded.grad is not None
    assert not padded.grad[:, tokens:].any()
    found = padded.grad.sum(0)

    push = noise * torch.randn(400_000, tokens)
    for token in range(tokens):
        step = torch.zeros(tokens)
        step[token] = 0.1
        up, down = (
            missed(scores + push + sign * step, worth.expand(len(push), -1), keep).mean()
            for sign in (1, -1)
        )
        assert abs(found[token] - (up - down) / 0.2) < 0.03
