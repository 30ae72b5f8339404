"""Which failures are tried again by the next run: the one place that says so."""

# The same bytes and settings fail the same way: not tried until the object or a setting changes.
FINAL = frozenset(
    {"bad_tokens", "decode_error", "no_video_stream", "not_a_video", "too_long", "truncated"}
)
# The video may be poison, or the machine was short of something: tried `retry.max_attempts` times.
COSTLY = frozenset(
    {"decode_crash", "decode_timeout", "engine_died", "out_of_memory", "probe_timeout"}
)
# Everything else (storage, credentials, limits of the configuration) is tried by every run.


def is_given_up(error_type: str, attempts: int, *, max_attempts: int) -> bool:
    """Return whether a failure of this type, after that many attempts, is left alone."""
    return error_type in FINAL or (error_type in COSTLY and attempts >= max_attempts)
