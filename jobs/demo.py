"""From nothing to captions on this machine: `make demo` (real clips, a real S3 server, Ray)."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from omnisift.mini.clips import write_clip
from omnisift.mini.questions import CAPTION_PROMPTS, caption, caption_match
from omnisift.mini.shipped import FOLDER as MODEL
from omnisift.mini.shipped import FRAME_PIXELS, HELD_OUT_SEED
from omnisift.mini.world import draw_scene
from pipeline.answers import read_answers
from pipeline.config import StorageConfig
from pipeline.storage import Storage
from pipeline.testing.clips import render
from pipeline.testing.s3_server import S3Server, s3_server

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".demo"
BUCKET = "demo"
# Scenes that the small model has not been trained on.
SCENES = {f"scenes/{number}.mp4": draw_scene(HELD_OUT_SEED, number, 8) for number in range(4)}
QUESTION = "What is heard in the background?"
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
    """Make the bucket and put the scenes and the clips into it."""
    client = server.client()
    client.create_bucket(Bucket=BUCKET)
    for name, scene in SCENES.items():
        path = FOLDER / "clips" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        client.upload_file(str(write_clip(path, scene)), BUCKET, f"videos/{name}")
    for name, path in render(FOLDER / "clips", list(CLIPS)).items():
        client.upload_file(str(path), BUCKET, f"videos/{CLIPS[name]}")


def compare(server: S3Server, output: str) -> None:
    """Print what was said of each scene beside what is true of it."""
    os.environ.update(server.environment)
    answers = read_answers(output, Storage(StorageConfig())).to_pylist()
    said = {row["uri"].partition("/videos/")[2]: row["text"] or "" for row in answers}
    right = total = 0
    for name, scene in SCENES.items():
        matched, sentences = caption_match(said[name], scene)
        right, total = right + matched, total + sentences
        print(f"{name}: {matched} of {sentences} sentences are true")
        print(f"    said: {said[name]}\n    true: {caption(scene)}")
    print(f"Of the scenes' captions {right} of {total} sentences match what was drawn.")


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
    with s3_server(FOLDER / "s3") as server:
        print(f"An S3 server runs on {server.endpoint_url}; into its bucket go")
        print(f"{len(SCENES)} scenes of the small model's world and {len(CLIPS)} other clips.")
        upload(server)
        output = f"s3://{BUCKET}/captions"
        caption = (
            f"source=s3://{BUCKET}/videos",
            f"output={output}",
            f"model={MODEL}",
            f"media.min_pixels={FRAME_PIXELS}",
            f"media.max_pixels={FRAME_PIXELS}",
            "answer.max_new_tokens=112",
            f"answer.prompt={CAPTION_PROMPTS[0]}",
        )
        run(server, "caption_corpus.py", *caption)
        run(server, "show_answers.py", f"output={output}")
        print(
            "\nThe small model knows only its own world of shapes and sounds. What it says of the"
        )
        print("real clips is told in that world's words and means nothing; of the scenes:\n")
        compare(server, output)
        print("\nThe same command again: nothing is decoded, compressed or answered.")
        run(server, "caption_corpus.py", *caption)
        print("\nAnother question: answered from the cached tokens, nothing is decoded.")
        run(server, "caption_corpus.py", *caption, "answer.prompt=What is heard in the background?")
        run(
            server, "show_answers.py", f"output={output}", "prompt=What is heard in the background?"
        )
    print(f"\nDone. The bucket's files stay in {FOLDER / 's3'} until the next make demo.")


if __name__ == "__main__":
    main()
