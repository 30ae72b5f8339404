"""Which failures are tried again, within a run and by the next one: the one place that says so."""

# Within a run, `storage.attempts` times: what a store says when it is busy (and every status of 500
# or more, a connection that is refused, one or a body that breaks off, an answer that does not
# come, credentials that cannot be fetched).
BUSY = frozenset(
    {
        "ConditionalRequestConflict",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
    }
)
# Within a run: a worker that dies is started again with the same rows. A video that it had alone
# fails as worker_crash after so many deaths: the first may be that of a whole node.
MAX_DEATHS = 2

# By the next runs: the same bytes and settings fail the same way, so these are not tried until the
# object or a setting changes.
FINAL = frozenset(
    {"bad_tokens", "decode_error", "no_video_stream", "not_a_video", "too_long", "truncated"}
)
# The video may be poison, or the machine was short of something: tried `retry.max_attempts` times.
# What fails in `answer` counts for the question alone, or for those of a video that are asked with
# it; all else for the video.
COSTLY = frozenset(
    {
        "decode_crash",
        "decode_timeout",
        "engine_died",
        "out_of_memory",
        "probe_timeout",
        "worker_crash",
    }
)
# Everything else (storage, credentials, disks, limits of the configuration) every run tries, and it
# does not count.


def passes(status: int, code: str) -> bool:
    """Return whether an answer of a store is of the kind that another request may mend."""
    return status >= 500 or status == 429 or code in BUSY


def counts(error_type: str) -> bool:
    """Return whether a try that ended so is one of `retry.max_attempts`."""
    return error_type in FINAL or error_type in COSTLY


def is_given_up(error_type: str, attempts: int, *, max_attempts: int) -> bool:
    """Return whether a failure of this type, after that many attempts that count, is left alone."""
    return error_type in FINAL or (error_type in COSTLY and attempts >= max_attempts)


def next_try(error_type: str) -> str:
    """Say in words when a failure is tried again."""
    if error_type in FINAL:
        return "not tried again until the object or a setting changes"
    if error_type in COSTLY:
        return "tried by retry.max_attempts runs in all"
    return "tried again by the next run"
