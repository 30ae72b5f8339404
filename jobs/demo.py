"""From nothing to captions on this machine: `make demo` (real clips, a real S3 server, Ray)."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from omnisift.mini.tiny import write_tiny_model
from pipeline.testing.clips import render
from pipeline.testing.s3_server import S3Server, s3_server

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".demo"
BUCKET = "demo"
# Real clips with and without sound, renditions of them, and one that is cut off in the middle.
CLIPS = {
    "bigbuckbunny.mp4": "bigbuckbunny.mp4",
    "bikes.mp4": "silent/bikes.mp4",
    "carphone.mp4": "silent/car phone (ünïcode).mp4",
    "vp9_opus.webm": "renditions/vp9_opus.webm",
    "hevc.mp4": "renditions/hevc.mp4",
    "variable_rate.mp4": "renditions/variable_rate.mp4",
    "rotated.mp4": "renditions/rotated.mp4",
    "truncated.mp4": "broken/truncated.mp4",
}


def upload(server: S3Server) -> None:
    """Make the bucket and put the clips into it."""
    client = server.client()
    client.create_bucket(Bucket=BUCKET)
    for name, path in render(FOLDER / "clips", list(CLIPS)).items():
        client.upload_file(str(path), BUCKET, f"videos/{CLIPS[name]}")


def run(server: S3Server, job: str, *arguments: str) -> None:
    """Run a job as a person would, against the server, and show the command."""
    print(f"\n$ python jobs/{job} {' '.join(arguments)}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, **server.environment, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "jobs" / job), *arguments]
    subprocess.run(command, env=environment, check=True)
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


def main() -> None:
    """Upload, caption, show the answers, and run again twice to show what is reused."""
    shutil.rmtree(FOLDER / "s3", ignore_errors=True)
    model = write_tiny_model(FOLDER / "model")
    with s3_server(FOLDER / "s3") as server:
        print(f"An S3 server runs on {server.endpoint_url}; {len(CLIPS)} clips go into its bucket.")
        upload(server)
        output = f"s3://{BUCKET}/captions"
        caption = (
            f"source=s3://{BUCKET}/videos",
            f"output={output}",
            f"model={model}",
            "answer.max_new_tokens=16",
        )
        run(server, "caption_corpus.py", *caption)
        run(server, "show_answers.py", f"output={output}")
        print("\nThe model has random weights: its captions are gibberish, all else is real.")
        print("\nThe same command again: nothing is decoded, compressed or answered.")
        run(server, "caption_corpus.py", *caption)
        print("\nAnother question: answered from the cached tokens, nothing is decoded.")
        run(server, "caption_corpus.py", *caption, "answer.prompt=What is heard?")
        run(server, "show_answers.py", f"output={output}", "prompt=What is heard?")
    print(f"\nDone. The bucket's files stay in {FOLDER / 's3'} until the next make demo.")


if __name__ == "__main__":
    main()
