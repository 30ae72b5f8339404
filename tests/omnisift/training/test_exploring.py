import torch

from omnisift.audio_selection import AudioSelector
from omnisift.training.exploring import Exploring


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
