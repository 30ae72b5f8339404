"""vLLM beside transformers, where vLLM is installed (GPU or CPU build).

Point it at a checkpoint of your own with OMNISIFT_PARITY_MODEL=/folder.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from omnisift.checkpoint import thinker_config
from omnisift.measure.answer_parity import measure_parity
from omnisift.measure.random_checkpoint import random_kept, write_random_llm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
]


def test_vllm_agrees_with_transformers_and_sees_a_lost_position(tmp_path: Path) -> None:
    given = os.environ.get("OMNISIFT_PARITY_MODEL")
    folder = (
        Path(given)
        if given
        else write_random_llm(tmp_path, width=256, heads=4, kv_heads=2, layers=2)
    )
    width = thinker_config(folder).text_config.hidden_size
    kept = [
        random_kept(width, grids=grids, side=side, retain=0.25, seed=grids)
        for grids, side in ((2, 4), (7, 5))
    ]
    found = measure_parity(folder, kept, device="cuda" if torch.cuda.is_available() else "cpu")
    assert found.holds, found
    assert found.same_choices == found.choices
