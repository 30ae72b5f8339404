"""Put on PYTHONPATH: the clock of this process, as Python's datetime tells it, is wrong."""

import datetime as dt
import os
from typing import Any

_REAL = dt.datetime
_AHEAD = dt.timedelta(seconds=float(os.environ["CHAOS_AHEAD_S"]))


class _Kind(type):
    def __instancecheck__(cls, thing: object) -> bool:
        return isinstance(thing, _REAL)


class _Wrong(_REAL, metaclass=_Kind):
    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> Any:
        return _REAL.now(tz) + _AHEAD

    @classmethod
    def utcnow(cls) -> Any:
        return _REAL.now(dt.UTC).replace(tzinfo=None) + _AHEAD


dt.datetime = _Wrong  # type: ignore[misc]
