from pathlib import Path

import pytest

from omnisift.checkpoint import read_selector
from omnisift.methods import METHODS
from omnisift.mini.tiny import write_tiny_model
from pipeline.config import CaptionConfig, CompressionConfig
from pipeline.errors import StartupError
from pipeline.run import _warn_of_selector


@pytest.mark.parametrize("method", METHODS)
def test_only_a_method_that_selects_misses_a_trained_selector(method: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path)
    config = CaptionConfig(
        source="videos",
        output="captions",
        model=str(model),
        compression=CompressionConfig(method=method, require_selector=True),
    )
    if METHODS[method].selector:
        with pytest.raises(StartupError, match="selector untrained"):
            _warn_of_selector(config, read_selector(model, ""))
    else:
        assert _warn_of_selector(config, read_selector(model, "")) == []
