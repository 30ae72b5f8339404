from collections.abc import Iterator

import pytest

from pipeline.testing.s3_server import S3Server, s3_server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run one S3 server for all tests; each makes a bucket of its own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server
