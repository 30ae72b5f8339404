"""Decode with the video engines of a GPU, NVDEC (`decode.nvdec=true`)."""

import errno
import socket

import av
import torch
from av.codec.hwaccel import HWAccel
from av.video.stream import VideoStream

# Standards that leave a decoder no choice, so that pictures are those of the CPU to the last bit,
# and their profiles that the engines know. MPEG-4 and what is older leave the rounding of its
# transform; AV1 is decoded by dav1d.
_PROFILES = {
    "h264": ("Constrained Baseline", "Main", "High"),
    "hevc": ("Main",),
    "vp9": ("Profile 0",),
}
_PIXELS = ("yuv420p", "yuvj420p")  # 8 bits; others come back in formats of their own
# A grey picture of 64 x 64 in H.264: parameter sets and one key frame.
_GREY = bytes.fromhex(
    "000000016742c00ada109a1000000300100000030328f1226a0000000168ce0fc8"
    "000000016588843a272727275d75d75d75d75d75d780"
)


class NvdecError(RuntimeError):
    """The GPU does not decode video here; says why, and what it takes."""


class Nvdec:
    """The video engines of one of the GPUs that CUDA shows; one CUDA context for all files.

    `accel` is for `open_media`: it fails where the engines cannot decode, and leaves pictures on
    the GPU until they are reformatted. Where they fail and the CPU does not, begin a new process: a
    CUDA context that has failed once may fail for ever.
    """

    def __init__(self) -> None:
        """Choose a GPU and decode a picture on it. Raises NvdecError where that fails."""
        gpus = torch.cuda.device_count()
        if not gpus:
            raise NvdecError("CUDA shows no GPU")
        self._slot, number = _take_slot()
        gpu = number % gpus
        self.accel = HWAccel(
            "cuda", device=str(gpu), allow_software_fallback=False, is_hw_owned=True
        )
        try:
            # Held, as the CUDA context that it made: to make one takes a third of a second.
            self._held = av.VideoCodecContext.create("h264", "r", hwaccel=self.accel)
            # PyAV opens it for the CPU, without an error, where FFmpeg has no such decoder.
            if not self._held.is_hwaccel:
                raise NvdecError("this build of FFmpeg has no NVDEC; install another of av")
            self._held.decode(av.Packet(_GREY))
            self._held.decode(None)
        except av.FFmpegError as error:
            raise NvdecError(
                f"GPU {gpu} decodes no H.264 ({error.strerror}); it takes the driver's libnvcuvid "
                "(in a container NVIDIA_DRIVER_CAPABILITIES=compute,utility,video) and 0.6 GB of "
                "its memory for each decoding actor"
            ) from error

    @staticmethod
    def takes(stream: VideoStream) -> bool:
        """Return whether a stream, opened for the CPU, is one that the engines decode alike."""
        codec = stream.codec_context
        return codec.profile in _PROFILES.get(codec.name, ()) and codec.pix_fmt in _PIXELS


def _take_slot() -> tuple[socket.socket, int]:
    """Return the lowest number that no other decoder of this machine has, and what holds it.

    Decoders so spread over its GPUs. A name without a file, which ends with the process.
    """
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    number = 0
    while True:
        try:
            held.bind(f"\0omnisift-nvdec-{number}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            number += 1
        else:
            return held, number
