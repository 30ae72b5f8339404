import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from omnisift.mini.tiny import write_tiny_model
from pipeline.testing.clips import render
from pipeline.testing.s3_server import S3Server
from tests.chaos.night import CLIPS, FAILED, NUM_VIDEOS, Night, Seen
from tests.ray_cluster import local_cluster


@pytest.fixture(scope="session")
def start_night(
    s3: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Night]]:
    """A bucket of clips, and one cluster for all nights."""
    folder = tmp_path_factory.mktemp("chaos")
    client, bucket = s3.client(), f"chaos-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    for clip, path in render(folder / "clips", list(CLIPS)).items():
        for name in CLIPS[clip]:
            client.upload_file(str(path), bucket, f"videos/{name}")
    model = write_tiny_model(folder / "model", selector=True)
    before = dict(os.environ)
    os.environ.update(s3.environment)  # for the cluster's workers too
    try:
        with local_cluster(num_cpus=3) as cluster:

            def start(**changes: Any) -> Night:
                name = uuid.uuid4().hex[:8]
                log = folder / f"{name}.log"
                night = Night(cluster, bucket, model, f"s3://{bucket}/{name}", log)
                return replace(night, **changes)

            yield start
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def undisturbed(start_night: Callable[..., Night]) -> tuple[Seen, float]:
    """What readers see, and the seconds it took, when nothing breaks."""
    night = start_night()
    start = time.monotonic()
    assert night.run() == 0, night.tail()
    seen = night.seen()
    assert len(seen) == NUM_VIDEOS
    assert {name: what for name, (status, what) in seen.items() if status == "failed"} == FAILED
    return seen, time.monotonic() - start


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End with the table: a line for each kind of fault that was survived."""
    reports: Iterable[pytest.TestReport] = terminalreporter.getreports("passed")
    lines = [text for each in reports for name, text in each.user_properties if name == "chaos"]
    if lines:
        terminalreporter.section("faults survived")
        head = f"{'fault':<44}{'runs':>5}{'expected':>10}{'rows':>6}{'distinct':>10}{'s':>6}"
        for line in (head, *map(str, lines)):
            terminalreporter.line(line)
