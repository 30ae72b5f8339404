from collections.abc import Iterator

import pytest
from hypothesis import settings

from pipeline.testing.s3_server import S3Server, s3_server

# The same examples on every run, so that a change fails by its own fault; other ones are met with
# `--hypothesis-profile=default`. No deadline: a busy machine is slow now and then.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run one S3 server for all tests; each makes a bucket of its own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server
