import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from pipeline.testing.held_cpus import held_cpus


class _Actor:
    def number(self) -> int:
        return 1


@pytest.fixture(scope="module")
def _three_cpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_three_cpus")
def test_actors_that_need_held_cpus_start_when_these_are_given_back() -> None:
    free = threading.Event()
    with held_cpus(2, free.is_set) as held_s:
        actors: list[Any] = [ray.remote(_Actor).options(num_cpus=1).remote() for _ in range(3)]
        numbers = [actor.number.remote() for actor in actors]
        started, waiting = ray.wait(numbers, num_returns=2, timeout=8)
        assert len(started) <= 1
        assert len(waiting) >= 2
        assert held_s == []
        free.set()
        assert sum(ray.get(numbers)) == 3
    assert held_s[0] > 0


@pytest.mark.usefixtures("_three_cpus")
def test_cpus_are_given_back_at_the_end_in_any_case() -> None:
    with pytest.raises(KeyError), held_cpus(3, lambda: False):
        raise KeyError
    actor: Any = ray.remote(_Actor).options(num_cpus=3).remote()
    assert ray.get(actor.number.remote()) == 1
    with held_cpus(0, lambda: False) as held_s:
        pass
    assert held_s == []
