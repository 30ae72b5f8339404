import torch

from omnisift.audio_selection import AudioSelector
from omnisift.training.exploring import Antithetic, Exploring


def test_exploring_centres_the_gradient_and_without_noise_is_the_selector() -> None:
    torch.manual_seed(0)
    selector = AudioSelector(16, 8, num_heads=2)
    video, audio = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    valid = torch.ones(2, 5, dtype=torch.bool)
    plain = selector(video, valid, audio)
    torch.testing.assert_close(Exploring(selector, 0.0)(video, valid, audio), plain)
    noisy = Exploring(selector, 0.3)(video, valid, audio)
    assert not torch.equal(noisy, plain)
    # Raising all scores of a chunk alike has no gradient: only their differences choose.
    last = selector.score_head[2]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.zeros_(last.weight)  # all scores equal, so their sum moves with the bias alone
    Exploring(selector, 0.3)(video, valid, audio).sum().backward()
    assert last.bias.grad is not None
    assert last.bias.grad.abs().max() < 1e-6


class Scores(torch.nn.Module):
    """Scores that do not depend on what is seen and heard."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(scores)

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        return self.scores


def missed(scores_CA: torch.Tensor, worth_CA: torch.Tensor, keep: int) -> torch.Tensor:
    """What is lost with the tokens that are dropped, of each chunk: a loss without a gradient."""
    kept = scores_CA.topk(keep, dim=1).indices
    return worth_CA.sum(1) - worth_CA.gather(1, kept).sum(1)


def test_the_gradient_of_two_selections_is_that_of_the_expected_loss() -> None:
    torch.manual_seed(0)
    chunks, tokens, keep, noise = 40_000, 5, 2, 0.5
    scores, worth = torch.randn(tokens) * 0.5, torch.tensor([1.0, 0.0, 0.0, 2.0, 0.3])
    # Many chunks alike are many draws of one chunk.
    selector = Scores(scores.repeat(chunks, 1))
    both = Antithetic(selector, noise)  # type: ignore[arg-type]
    nothing = torch.zeros(0)
    losses = [
        missed(both(nothing, nothing, nothing), worth.expand(chunks, -1), keep) for _ in range(2)
    ]
    both.loss(losses[0], losses[1]).backward()
    assert selector.scores.grad is not None
    found = selector.scores.grad.sum(0)

    push = noise * torch.randn(400_000, tokens)
    for token in range(tokens):
        step = torch.zeros(tokens)
        step[token] = 0.1
        up, down = (
            missed(scores + push + sign * step, worth.expand(len(push), -1), keep).mean()
            for sign in (1, -1)
        )
        assert abs(found[token] - (up - down) / 0.2) < 0.03
