"""Spoken words of the world: `python -m omnisift.mini.words` has eSpeak NG say them anew.

Shapes: W words, V voices, n samples of the longest.
"""

import io
import subprocess
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import av
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from omnisift.media import SAMPLE_RATE

Word = Literal["yes", "no", "stop", "hello"]
WORDS: tuple[Word, ...] = get_args(Word)
# Accents and speakers of eSpeak NG 1.51.
VOICES = ("en-us", "en-gb+f2", "en-us+m3", "en-gb+m7", "en-us+f4", "en-gb-x-rp+f3")
_WORDS_A_MINUTE = 260
_QUIET = 0.03  # of the peak: silence before and behind a word
_FILE = Path(__file__).with_name("words.safetensors")


@cache
def spoken() -> npt.NDArray[np.float32]:
    """Return the words, [W, V, n] at 16 kHz with a peak of 1, zeros behind each."""
    samples = load_file(_FILE)["samples"].astype(np.float32)
    return samples / np.float32(np.iinfo(np.int16).max)


@cache
def seconds() -> npt.NDArray[np.float32]:
    """Return how long each word is, [W, V]."""
    lengths: npt.NDArray[np.float32] = load_file(_FILE)["seconds"]
    return lengths


def _say(word: Word, voice: str) -> npt.NDArray[np.float32]:
    words = ["espeak-ng", "-v", voice, "-s", str(_WORDS_A_MINUTE), "--stdout", word]
    said = subprocess.run(words, capture_output=True, check=True).stdout
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    with av.open(io.BytesIO(said), "r") as container:
        frames = [*container.decode(audio=0), None]
        pieces = [piece.to_ndarray()[0] for frame in frames for piece in resampler.resample(frame)]
    wave = np.concatenate(pieces).astype(np.float32)
    loud = np.flatnonzero(np.abs(wave) > _QUIET * np.abs(wave).max())
    wave = wave[loud[0] : loud[-1] + 1]
    loudest: npt.NDArray[np.float32] = wave / np.abs(wave).max()
    return loudest


def main() -> None:
    """Have all words said, and write them beside this file."""
    said = [[_say(word, voice) for voice in VOICES] for word in WORDS]
    longest = max(len(wave) for row in said for wave in row)
    samples = np.zeros((len(WORDS), len(VOICES), longest), np.int16)
    for word, row in enumerate(said):
        for voice, wave in enumerate(row):
            samples[word, voice, : len(wave)] = np.round(wave * np.iinfo(np.int16).max)
    lengths = np.array([[len(wave) / SAMPLE_RATE for wave in row] for row in said], np.float32)
    save_file({"samples": samples, "seconds": lengths}, _FILE)


if __name__ == "__main__":
    main()
