"""Files that name other files or addresses: decoding them opens neither."""

import errno
import http.server
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import av
import pytest

from pipeline.config import DecodeConfig, MediaConfig
from pipeline.decoder_process import DecoderProcess
from pipeline.media_index import DecodeError
from pipeline.testing import clips


@dataclass
class Bait:
    """A pipe and an address that nobody has a reason to open; `taken` says who did."""

    pipe: Path
    port: int = 0
    taken: list[str] = field(default_factory=list)


@contextmanager
def bait(folder: Path) -> Iterator[Bait]:
    """Watch until the block ends."""
    laid = Bait(folder / "bait.ts")
    os.mkfifo(laid.pipe)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            laid.taken.append("address")
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            """Keep quiet."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    laid.port = server.server_port
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            try:  # refused while nobody has it open to read
                writer = os.open(laid.pipe, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
            else:
                laid.taken.append("pipe")
                os.close(writer)  # the reader meets the end of the file

    threads = [threading.Thread(target=each) for each in (server.serve_forever, watch)]
    for thread in threads:
        thread.start()
    try:
        yield laid
    finally:
        over.set()
        server.shutdown()
        for thread in threads:
            thread.join()
        server.server_close()
        laid.pipe.unlink()


def playlists(path: Path, port: int) -> dict[str, bytes]:
    """Return files that lead to `path` and to the address, by name."""
    found: dict[str, bytes] = {}
    for name, target in (("file", f"file://{path}"), ("http", f"http://127.0.0.1:{port}/a.ts")):
        hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{target}\n#EXT-X-ENDLIST\n"
        dash = (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT5S" '
            'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
            '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
            f"<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"
        )
        found |= {
            f"hls-{name}.mp4": hls.encode(),
            f"hls-{name}.m3u8": hls.encode(),
            f"key-{name}.m3u8": hls.replace(
                "#EXTINF", f'#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF'
            ).encode(),
            f"concat-{name}.mp4": f"ffconcat version 1.0\nfile '{target}'\n".encode(),
            f"concat-{name}.ffconcat": f"ffconcat version 1.0\nfile '{target}'\n".encode(),
            f"dash-{name}.mpd": dash.encode(),
            f"dash-{name}.mp4": dash.encode(),
        }
    sdp = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
    found["sdp.mp4"] = f"{sdp}m=video {port} RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n".encode()
    return found


def with_external_track(mp4: bytes, target: Path) -> bytes:
    """Make an MP4's first track lie in another file: a QuickTime alias in its 'dref' table."""
    place = str(target).replace("/", ":").encode()
    place += b"\0" * (len(place) % 2)
    alias = bytes(10) + bytes([0]) + bytes(27) + bytes(12) + bytes([0]) + bytes(63) + bytes(16)
    alias += struct.pack(">hh", -1, -1) + bytes(16)
    alias += struct.pack(">HH", 2, len(place)) + place + struct.pack(">Hh", 0xFFFF, 0)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    old = mp4.index(b"url \0\0\0\1") - 4
    changed = bytearray(mp4[:old] + entry + mp4[old + 12 :])
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        start = changed.index(box) - 4
        (size,) = struct.unpack_from(">I", changed, start)
        struct.pack_into(">I", changed, start, size + len(entry) - 12)
    return bytes(changed)


@pytest.fixture(scope="module")
def decoder() -> Iterator[DecoderProcess]:
    decoder = DecoderProcess(MediaConfig(), DecodeConfig(probe_s=30, deadline_s=30))
    yield decoder
    decoder.close()


def test_playlists_open_nothing_else(decoder: DecoderProcess, tmp_path: Path) -> None:
    with bait(tmp_path) as laid:
        for name, content in playlists(laid.pipe, laid.port).items():
            path = tmp_path / name
            path.write_bytes(content)
            with pytest.raises(DecodeError) as caught:
                decoder.decode(path)
            assert caught.value.error_type == "not_a_video", name
        assert laid.taken == []


def test_a_track_in_another_file_is_not_opened(decoder: DecoderProcess, tmp_path: Path) -> None:
    mp4 = clips.render(tmp_path, ["h264_sound.mp4"])["h264_sound.mp4"]
    with bait(tmp_path) as laid:
        path = tmp_path / "external.mov"
        path.write_bytes(with_external_track(mp4.read_bytes(), laid.pipe))
        with suppress(DecodeError):  # what is found is the file's own bytes, at wrong places
            decoder.decode(path)
        assert laid.taken == []


def test_the_bait_is_taken_by_who_does_follow(tmp_path: Path) -> None:
    """The watch sees what it must, and these files do lead there."""
    mp4 = clips.render(tmp_path, ["h264_sound.mp4"])["h264_sound.mp4"]
    with bait(tmp_path) as laid:
        follow = {"protocol_whitelist": "file,http,tcp", "allowed_extensions": "ALL"}
        cases = [
            ("hls-http.m3u8", "hls", follow, "address"),
            ("concat-file.ffconcat", "concat", {**follow, "safe": "0"}, "pipe"),
            ("external.mov", None, {"enable_drefs": "1", "use_absolute_path": "1"}, "pipe"),
        ]
        files = playlists(laid.pipe, laid.port)
        files["external.mov"] = with_external_track(mp4.read_bytes(), laid.pipe)
        for name, kind, options, expected in cases:
            (tmp_path / name).write_bytes(files[name])
            laid.taken.clear()
            with suppress(av.FFmpegError):
                av.open(str(tmp_path / name), format=kind, options=options).close()
            assert set(laid.taken) == {expected}, name
