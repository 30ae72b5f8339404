import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omnisift.checkpoint import read_selector
from omnisift.methods import METHODS
from omnisift.mini.tiny import write_tiny_model
from pipeline import run
from pipeline.config import CaptionConfig, CompressionConfig
from pipeline.errors import StartupError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
            run._warn_of_selector(config, read_selector(model, ""))
    else:
        assert run._warn_of_selector(config, read_selector(model, "")) == []


@pytest.mark.parametrize("machines", [1, 3])
def test_weights_are_fetched_where_actors_need_them_and_behind_the_pools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machines: int
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / COMMIT
    shutil.copytree(write_tiny_model(tmp_path / "tiny"), snapshot)
    steps: list[Any] = []

    def resolve(_model: str, revision: str, *, weights: bool = True) -> Path:
        steps.append((revision, weights))
        return snapshot

    def pools(*_: Any, **__: Any) -> Any:
        steps.append("pools")
        return SimpleNamespace(uses_gpu=False, answer=SimpleNamespace(gpus=0.0))

    def stop(*_: Any, **__: Any) -> None:
        raise StartupError("far enough")

    monkeypatch.setattr(run, "resolve", resolve)
    monkeypatch.setattr(run, "start_ray", lambda: None)
    monkeypatch.setattr(run, "size_pools", pools)
    monkeypatch.setattr(run, "nodes_up", lambda: [(2.0, 0.0)] * machines)
    monkeypatch.setattr(run, "make_settings", stop)
    config = CaptionConfig(source=str(tmp_path), output=str(tmp_path / "out"), model="a/b")
    with pytest.raises(StartupError, match="far enough"):
        run.caption_corpus(config)
    # A branch may have moved since it was looked up: the second time it is the commit.
    assert steps == [("main", False), "pools", *([(COMMIT, True)] if machines == 1 else [])]


def test_a_cluster_that_is_long_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray start` writes down where its cluster is; when it is killed nobody strikes that out."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # the paths of sockets are short
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        known = Path(folder, "ray", "ray_current_cluster")
        known.parent.mkdir()
        known.write_text("127.0.0.1:9")
        code = "import pipeline.run, ray; pipeline.run.start_ray(); print(len(ray.nodes()))"
        started = subprocess.run(
            [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, timeout=60
        )
    assert started.stdout.split()[-1] == "1"
