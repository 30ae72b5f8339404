"""Every tensor of a checkpoint is the LLM's, under vLLM's name, or passed over."""

from pathlib import Path

import pytest
from safetensors import safe_open

from omnisift.engines.vllm_weights import language_model_name
from omnisift.mini.tiny import write_tiny_model


def test_the_tensors_of_a_published_checkpoint(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, selector=True)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    found = {name: language_model_name(name) for name in names}
    taken = {name for name, own in found.items() if own}
    assert taken == {n for n in names if n.startswith(("thinker.model.", "thinker.lm_head."))}
    assert taken < set(names)  # the towers and the selector are not
    for name in taken:
        assert found[name] == "language_model." + name.removeprefix("thinker.")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("thinker.model.language_model.norm.weight", "model.norm.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("talker.model.layers.0.mlp.up_proj.weight", None),
        ("token2wav.code2wav_dit_model.norm.weight", None),
        ("thinker.visual.blocks.0.norm1.weight", None),
        ("thinker.model.visual.blocks.0.norm1.weight", None),
        ("thinker.audio_tower.layers.0.fc1.weight", None),
        ("thinker.compressor.v_proj.weight", None),
    ],
)
def test_other_spellings(name: str, expected: str | None) -> None:
    assert language_model_name(name) == (expected and f"language_model.{expected}")
