"""The small trained model that ships: where it lies, and what it was made for."""

from pathlib import Path

from omnisift.mini.world import SIDE

FOLDER = Path(__file__).parent / "weights"
FRAME_PIXELS = SIDE**2  # of a frame it reads: media.min_pixels and media.max_pixels
HELD_OUT_SEED = 1  # seeds 1 to 9 of the world were never trained on
