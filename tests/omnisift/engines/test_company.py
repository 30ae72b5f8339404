"""Nobody has more company than wanted, nobody is passed by."""

import asyncio
import math
import random

import pytest

from omnisift.engines.company import Company


@pytest.mark.parametrize("seed", range(20))
def test_nobody_has_more_company_than_wanted_and_nobody_is_passed_by(seed: int) -> None:
    chance = random.Random(seed)
    wanted = [chance.choice([1, 2, 3, 16, math.inf]) for _ in range(60)]
    company = Company()
    inside: set[int] = set()
    entered: list[int] = []

    async def visit(number: int) -> None:
        async with company.of(wanted[number]):
            inside.add(number)
            entered.append(number)
            for _ in range(chance.randrange(9)):
                await asyncio.sleep(0)
                assert all(len(inside) <= wanted[one] for one in inside)
            inside.remove(number)
            if not number % 7:
                raise RuntimeError("left in haste")

    async def everybody() -> list[BaseException | None]:
        visits = []
        for number in range(60):
            visits.append(asyncio.create_task(visit(number)))
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
        return await asyncio.gather(*visits, return_exceptions=True)

    ended = asyncio.run(asyncio.wait_for(everybody(), 60))
    assert [isinstance(end, RuntimeError) for end in ended] == [not n % 7 for n in range(60)]
    assert entered == list(range(60))


def test_those_who_may_are_inside_together() -> None:
    company = Company()
    inside = 0

    async def meet(most: float, number: int) -> None:
        nonlocal inside
        async with company.of(most):
            inside += 1
            while inside < number:
                await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def meetings() -> None:
        nonlocal inside
        for most, number in ((math.inf, 40), (16, 16)):
            inside = 0
            await asyncio.gather(*(meet(most, number) for _ in range(number)))

    asyncio.run(asyncio.wait_for(meetings(), 60))
