"""Read chosen frames with decord instead of PyAV (`media.reader=decord`).

Right where its skipping works: H.264, VP9, AV1 and MPEG-4 sampled densely. It gives other pictures
than asked, without an error, from MPEG-TS and from long files sampled sparsely (docs/log.md).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import decord
import numpy as np
from numpy.typing import NDArray

from pipeline.media_index import DecodeError

_GROUP = 4  # pictures held at full size


def read_frames_decord(path: Path, numbers: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """Yield upright RGB pictures, uint8 [H, W, 3], of the frames `numbers` (ascending).

    Raises DecodeError decode_error where decord refuses the file.
    """
    try:
        # One thread: with its default some good VP9 files fail.
        reader = decord.VideoReader(str(path), num_threads=1)
        last = len(reader) - 1
        for start in range(0, len(numbers), _GROUP):
            group = [min(number, last) for number in numbers[start : start + _GROUP]]
            yield from reader.get_batch(group).asnumpy()
    except (decord.DECORDError, IndexError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise DecodeError(
            "decode_error", f"decord cannot read it ({reason}); try media.reader=pyav"
        ) from error
