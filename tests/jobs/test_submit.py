"""`ray job submit` against a cluster that asks for a token, as Ray 2.60 clusters do."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from omnisift.mini.tiny import write_tiny_model
from pipeline.answers import read_answers
from pipeline.config import StorageConfig
from pipeline.storage import Storage
from pipeline.testing import clips
from tests.ray_cluster import Cluster, local_cluster

ROOT = Path(__file__).parents[2]
WHERE = ["python", "-c", "import pipeline, ray; ray.init(); print('at', pipeline.__file__)"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with local_cluster(num_cpus=2) as running:
        yield running


def test_a_job_runs_from_the_submitted_folder(cluster: Cluster) -> None:
    done = cluster.submit(WHERE, working_dir=ROOT, timeout_s=180)
    assert done.returncode == 0, done.stdout + done.stderr
    places = [line for line in done.stdout.splitlines() if line.startswith("at ")]
    assert len(places) == 1, done.stdout
    # the copy that the cluster was sent, not the checkout that this environment has installed
    assert "/working_dir_files/" in places[0]
    assert str(ROOT) not in places[0]


def test_a_corpus_is_captioned_by_the_submitted_job(cluster: Cluster, tmp_path: Path) -> None:
    clips.render(tmp_path / "videos", ["carphone.mp4", "page.mp4"])
    model = write_tiny_model(tmp_path / "model", selector=True)
    output = tmp_path / "captions"
    done = cluster.submit(
        [
            *("python", "jobs/caption_corpus.py", f"source={tmp_path / 'videos'}"),
            *(f"output={output}", f"model={model}", "answer.max_new_tokens=4"),
            "answer.prompt=What is seen, and heard?",
        ],
        working_dir=ROOT,
        timeout_s=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answers = read_answers(str(output), Storage(StorageConfig())).to_pylist()
    found = {Path(row["uri"]).name: (row["prompt"], row["error_type"]) for row in answers}
    assert found == {
        "carphone.mp4": ("What is seen, and heard?", None),
        "page.mp4": ("What is seen, and heard?", "not_a_video"),
    }
    assert f"answers and report.json: {output}" in done.stdout


def test_a_job_that_fails_fails_the_command_that_submitted_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "job.py").write_text("raise SystemExit('no corpus')\n")
    done = cluster.submit(["python", "job.py"], working_dir=tmp_path, timeout_s=120)
    assert done.returncode != 0
    assert "no corpus" in done.stdout


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_a_client_without_the_token_is_refused(
    cluster: Cluster, tmp_path: Path, token: str | None
) -> None:
    (tmp_path / "job.py").write_text("print('ran')\n")
    stranger = {**cluster.environment, "HOME": os.devnull}  # no ~/.ray/auth_token either
    del stranger["RAY_AUTH_TOKEN"]
    if token is not None:
        stranger["RAY_AUTH_TOKEN"] = token
    refused = cluster.submit(
        ["python", "job.py"], working_dir=tmp_path, timeout_s=60, environment=stranger
    )
    assert refused.returncode != 0
    assert "ran\n" not in refused.stdout
    expected = "couldn't find an authentication token" if token is None else "Invalid auth"
    assert expected in refused.stderr
