"""Which places a source may name: each of the others is a failed row, and is never opened."""

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import rows
from pipeline.answer_index import AnswerIndex
from pipeline.boundary import BoundaryError, Roots, roots_of
from pipeline.config import (
    CaptionConfig,
    DecodeConfig,
    ListingConfig,
    MediaConfig,
    StorageConfig,
)
from pipeline.stages.decode import Decode
from pipeline.stages.source import list_work
from pipeline.storage import Storage
from pipeline.token_cache import CacheIndex

STORAGE = Storage(StorageConfig())


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder of videos, and beside it what is none of their owners' business."""
    for place in ("videos/a.mp4", "videos/deep/b.mp4", "videos-2/c.mp4", "secret.mp4"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")
    return tmp_path


def work(world: Path, source: Path | str, roots: list[str] | None = None) -> dict[str, str | None]:
    """List a source; return the error_type of each name, None for what would be decoded."""
    config = CaptionConfig(
        source=str(source),
        output=str(world / "output"),
        listing=ListingConfig(roots=roots or []),
    )
    listed = list_work(
        config,
        STORAGE,
        done=AnswerIndex(STORAGE, config.output, fingerprint="f"),
        cached=CacheIndex(STORAGE, config.cache_root),
        folder=str(world / "output" / "run"),
    )
    found: list[dict[str, Any]] = [
        row for part in (*listed.fresh, *listed.failed) for row in pq.read_table(part).to_pylist()
    ]
    assert len(found) == listed.counts.videos
    for row in found:
        if row["error_type"]:
            assert row["error_stage"] == "source"
            assert row["uri"].split("#")[0] in row["error_message"]
    return {row["uri"]: row["error_type"] for row in found}


def manifest(world: Path, *uris: str) -> Path:
    path = world / "videos" / "m.csv"
    path.write_text("\n".join(["uri", *uris]))
    return path


def test_a_manifest_names_nothing_outside_its_folder(world: Path) -> None:
    videos = world / "videos"
    (videos / "link.mp4").symlink_to(world / "secret.mp4")
    (videos / "inside.mp4").symlink_to(videos / "a.mp4")
    (videos / "door").symlink_to(world / "videos-2")
    (videos / "nowhere.mp4").symlink_to(world / "is-not-there.mp4")
    (videos / "circle.mp4").symlink_to(videos / "circle.mp4")
    os.mkfifo(videos / "pipe.mp4")
    source = manifest(
        world,
        "a.mp4",
        "deep/../deep/b.mp4",
        f"file://{videos}/inside.mp4",
        "../secret.mp4",
        "deep/../../secret.mp4",
        "/etc/passwd",
        "file:///etc/shadow",
        "link.mp4",
        "door/c.mp4",
        "nowhere.mp4",
        "circle.mp4",
        "pipe.mp4",
        "/dev/zero",
        "../videos-2/c.mp4",  # shares the beginning of the name, not the folder
        "http://127.0.0.1/a.mp4",
        "concat:/etc/passwd",
    )
    assert work(world, source) == {
        f"{videos}/a.mp4": None,
        f"{videos}/deep/b.mp4": None,
        f"{videos}/inside.mp4": None,
        f"{world}/secret.mp4": "outside_root",  # named in two ways
        "/etc/passwd": "outside_root",
        "/etc/shadow": "outside_root",
        f"{videos}/link.mp4": "outside_root",
        f"{videos}/door/c.mp4": "outside_root",
        f"{videos}/nowhere.mp4": "outside_root",
        f"{videos}/circle.mp4": "storage_error",
        f"{videos}/pipe.mp4": "not_a_video",
        "/dev/zero": "outside_root",
        f"{world}/videos-2/c.mp4": "outside_root",
        f"{source}#line 16": "bad_manifest_row",  # http://
        f"{videos}/concat:/etc/passwd": "not_found",  # a name as any other, of nothing
    }


def test_links_in_a_listed_folder_lead_nowhere_else(world: Path) -> None:
    videos = world / "videos"
    (videos / "link.mp4").symlink_to(world / "secret.mp4")
    (videos / "nowhere.mp4").symlink_to("gone.mp4")
    (videos / "circle.mp4").symlink_to("circle.mp4")
    (videos / "door").symlink_to(world / "videos-2")
    found = work(world, videos)
    assert {Path(uri).name: kind for uri, kind in found.items()} == {
        "a.mp4": None,
        "b.mp4": None,
        "link.mp4": "outside_root",
        "nowhere.mp4": None,  # within: decode says that there is nothing
        "circle.mp4": None,
    }


def test_roots_open_other_places_and_close_the_source(world: Path) -> None:
    source = manifest(world, "a.mp4", "../secret.mp4", "../videos-2/c.mp4", "s3://b/a.mp4")
    found = work(world, source, roots=[f"file://{world}/videos-2", "s3://bucket/incoming"])
    assert found == {
        f"{world}/videos/a.mp4": "outside_root",
        f"{world}/secret.mp4": "outside_root",
        f"{world}/videos-2/c.mp4": None,
        "s3://b/a.mp4": "outside_root",
    }
    roots = roots_of(
        CaptionConfig(source="x", output="y", listing=ListingConfig(roots=["s3://b/in/"]))
    )
    roots.check("s3://b/in/a.mp4")
    for uri in ("s3://b/in-2/a.mp4", "s3://b/in", "s3://c/in/a.mp4", "/tmp/a.mp4"):  # noqa: S108
        with pytest.raises(BoundaryError) as caught:
            roots.check(uri)
        assert caught.value.error_type == "outside_root"


def test_a_source_in_s3_names_no_local_file() -> None:
    roots = roots_of(CaptionConfig(source="s3://bucket/m.csv", output="s3://bucket/out"))
    roots.check("s3://another/a.mp4")
    with pytest.raises(BoundaryError, match="names nothing on a disk"):
        roots.check("/etc/passwd")


@pytest.mark.parametrize("name", ["two\nlines.mp4", "\x1b[2Jclear.mp4", "bell\x07.mp4", "\x9b.mp4"])
def test_names_that_would_forge_a_log_line_are_escaped(world: Path, name: str) -> None:
    (world / "videos" / name).write_bytes(b"video")
    found = work(world, world / "videos")
    (uri,) = [uri for uri, kind in found.items() if kind == "bad_name"]
    assert uri == f"{world}/videos/" + name.encode("unicode_escape").decode()


def test_a_link_that_is_put_there_later_is_not_followed(world: Path) -> None:
    victim = world / "videos" / "a.mp4"
    victim.unlink()
    victim.symlink_to(world / "secret.mp4")
    stage = Decode(
        MediaConfig(),
        DecodeConfig(temp_dir=str(world / "temp")),
        StorageConfig(),
        Roots((str(world / "videos"),), None),
    )
    row = {"video_key": "k", "uri": str(victim), "size_bytes": 5, "etag": "", "prompts": []}
    (block,) = stage(rows.build([{**row, "attempts": 1}], rows.IDENTITY))
    (out,) = rows.iterate(block)
    stage.close()
    assert (out["error_stage"], out["error_type"]) == ("decode", "outside_root")


def test_a_video_that_is_named_by_its_key_is_opened_under_the_roots_of_the_run(
    world: Path,
) -> None:
    """A run let it in; since then `listing.roots` may have been narrowed."""
    stage = Decode(
        MediaConfig(),
        DecodeConfig(temp_dir=str(world / "temp")),
        StorageConfig(endpoint_url="http://127.0.0.1:9", attempts=1),  # nobody is asked
        Roots((str(world / "videos"),), ("s3://b/in/",)),
    )
    found = {}
    for uri in (f"{world}/secret.mp4", "s3://b/out/a.mp4", "s3://b/in-2/a.mp4", "s3://b/in/a.mp4"):
        row = {"video_key": "k", "uri": uri, "size_bytes": 5, "etag": "", "prompts": []}
        (block,) = stage(rows.build([{**row, "attempts": 1}], rows.IDENTITY))
        (out,) = rows.iterate(block)
        found[uri.rpartition("//")[2]] = out["error_type"]
    stage.close()
    assert found.pop("b/in/a.mp4") != "outside_root"  # it alone was asked for
    assert set(found.values()) == {"outside_root"}
