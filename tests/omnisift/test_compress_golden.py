"""Parity with the reference implementation's recorded outputs (tests/golden)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from omnisift.audio_selection import AudioSelector
from omnisift.compress import compress_batch
from omnisift.compression_plan import DropShares
from omnisift.layout import ModelLayout

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_the_reference(case: dict[str, Any]) -> None:
    vectors = load_file(GOLDEN / f"{case['name']}.safetensors")
    selector = AudioSelector(case["d_model"], case["hidden_dim"], case["num_heads"])
    selector.load_state_dict(
        {k.removeprefix("selector."): v for k, v in vectors.items() if k.startswith("selector.")}
    )
    embeds = vectors["inputs_embeds"].requires_grad_()  # [1, L, D]: the reference is batched
    [result] = compress_batch(
        [(embeds[0], vectors["input_ids"][0], vectors["position_ids"][:, 0])],
        DropShares(case["drop_share_video"], case["drop_share_audio"]),
        ModelLayout(video_token_id=case["video_token_id"], audio_token_id=case["audio_token_id"]),
        selector=selector,
    )
    assert torch.equal(result.keep_mask, vectors["keep_mask"].bool().flatten())
    torch.testing.assert_close(result.embeds, vectors["kept_embeds"].squeeze(0), rtol=0, atol=1e-6)
    assert torch.equal(result.kept_index, vectors["keep_mask"].flatten().nonzero().flatten())

    loss = torch.sigmoid(result.embeds @ vectors["loss_target"]).mean()
    loss.backward()
    torch.testing.assert_close(loss, vectors["loss"].reshape(()), rtol=0, atol=1e-6)
    torch.testing.assert_close(embeds.grad, vectors["grad_inputs_embeds"], rtol=0, atol=1e-5)
    gradients = {k: v for k, v in vectors.items() if k.startswith("grad_selector.")}
    assert gradients
    for name, parameter in selector.named_parameters():
        expected = gradients[f"grad_selector.{name}"]
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_selector_has_the_published_parameters() -> None:
    published = json.loads((GOLDEN / "selector_7b_parameters.json").read_text())
    with torch.device("meta"):
        selector = AudioSelector(3584)
    shapes = {name: list(value.shape) for name, value in selector.state_dict().items()}
    assert shapes == published["parameters"]
    assert sum(value.numel() for value in selector.state_dict().values()) == published["total"]
    assert selector.cross_attn.num_heads == published["num_heads"]
