"""A checkpoint from a stranger: its pickles are not loaded and its code is not run."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from omnisift.checkpoint import CheckpointError, load_backbone, load_tokenizer, read_selector
from omnisift.mini.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._path,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny", selector=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt"])
def test_weights_that_are_pickles_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    sprung = tmp_path / "sprung"
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Trap(sprung)}, folder / name)
    with pytest.raises(CheckpointError):
        load_backbone(folder)
    with pytest.raises(CheckpointError):
        read_selector(folder, str(folder / name))
    assert not sprung.exists()
    torch.load(io.BytesIO((folder / name).read_bytes()), weights_only=False)
    assert sprung.exists()  # who does load it falls in


def test_code_of_a_checkpoint_is_not_run(folder: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    code = f"from pathlib import Path\nPath({str(sprung)!r}).touch()\nclass Mine:\n    pass\n"
    (folder / "mine.py").write_text(code)
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        target: Any = "mine.Mine" if key == "AutoConfig" else ["mine.Mine", None]
        path.write_text(json.dumps({**content, "auto_map": {key: target}}))
    for load in (load_backbone, load_tokenizer):
        try:
            load(folder)
        except CheckpointError:
            continue  # refused is as good as passed over
    assert not sprung.exists()


def test_no_module_can_load_a_pickle() -> None:
    """The words by which Python code does so stand in no file of the product."""
    words = ("torch.load", "torch.save", "import pickle", "cloudpickle", "joblib", "allow_pickle=T")
    found = [
        (str(path.relative_to(ROOT)), word)
        for part in ("omnisift", "pipeline", "jobs")
        for path in (ROOT / part).rglob("*.py")
        for word in (*words, "trust_remote_code=True")
        if word in path.read_text(encoding="utf-8")
    ]
    assert found == []
