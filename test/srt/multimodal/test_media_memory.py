"""The budget that media share: who waits, who goes first, and that nobody waits for ever."""

import asyncio
import random

import pytest

from rtp_llm.srt.multimodal.memory import (
    MIB,
    MediaMemory,
    MediaScope,
    Need,
    Room,
    current_scope,
    media_scope,
    total_need,
)
from rtp_llm.srt.sampling_params import ContextLengthExceeded, InvalidRequest


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_who_comes_first_is_served_first():
    async def run() -> None:
        room, order = Room(100), []

        async def work(name: str, num_bytes: int) -> None:
            with room.account(num_bytes) as account:
                await account.take(num_bytes)
                order.append(name)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(work(name, n) for name, n in (("a", 60), ("large", 90), ("small", 10), ("b", 20))))
        assert order == ["a", "large", "small", "b"], "a small one overtook a large one that waited"
        assert (room.held, room.num_waiting) == (0, 0) and room.most_held <= 100

    asyncio.run(run())


def test_who_holds_some_goes_before_who_holds_none():
    async def run() -> None:
        room = Room(100)
        old, holder = room.account(100), room.account(60)
        await holder.take(30)
        waiting = asyncio.ensure_future(old.take(100))
        await settle()
        await asyncio.wait_for(holder.take(30), 1)
        late = room.account(10)
        late_take = asyncio.ensure_future(late.take(10))
        await settle()
        assert not waiting.done() and not late_take.done()
        holder.close()
        await asyncio.wait_for(waiting, 1)
        assert not late_take.done()
        old.close()
        await asyncio.wait_for(late_take, 1)
        late.close()
        assert room.held == 0

    asyncio.run(run())


def test_what_could_end_in_a_deadlock_is_not_given():
    """With 10 of 100 each, neither could be sure of the other 90 that it may come to want."""

    async def run() -> None:
        room = Room(100)
        one, other = room.account(100), room.account(100)
        await one.take(10)
        begin = asyncio.ensure_future(other.take(10))
        await settle()
        assert not begin.done()
        await asyncio.wait_for(one.take(10), 1)
        one.give(0, lower_claim=20)  # now 60 are enough for the first, and all for the second after that
        await asyncio.wait_for(begin, 1)
        one.close()
        other.close()

    asyncio.run(run())


def test_who_leaves_gives_back_and_waits_no_more():
    async def run() -> None:
        room = Room(10)
        first, second, third = room.account(10), room.account(10), room.account(5)
        await first.take(10)
        waits = [asyncio.ensure_future(account.take(account.claim)) for account in (second, third)]
        await settle()
        waits[0].cancel()
        await settle()
        assert waits[0].cancelled() and room.num_waiting == 1
        second.close()
        first.give(5)
        await asyncio.wait_for(waits[1], 1)
        assert room.held == 10
        first.close()
        first.close()
        first.give(5)
        third.close()
        assert room.held == 0

    asyncio.run(run())


def test_a_cancelled_take_that_was_given_at_that_moment_is_given_back():
    async def run() -> None:
        room = Room(10)
        first, second = room.account(10), room.account(10)
        await first.take(10)
        wait = asyncio.ensure_future(second.take(10))
        await settle()
        first.close()  # gives to the second, whose task has not run since
        wait.cancel()
        await asyncio.wait([wait])
        assert wait.cancelled() and second.held == 0 and room.held == 0

    asyncio.run(run())


def test_no_more_than_was_claimed():
    async def run() -> None:
        room = Room(10)
        account = room.account(99)
        assert account.claim == 10
        await account.take(10)
        with pytest.raises(ValueError, match="1 bytes more than 10"):
            await account.take(1)

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(12))
def test_random_work_ends_whatever_is_asked_for_and_given_up(seed):
    """Accounts grow in steps, give back, are cancelled and fail, in any order."""
    draw = random.Random(seed)

    async def run() -> None:
        room, done = Room(1000), []

        async def work(number: int) -> None:
            claim = draw.choice([draw.randint(1, 100), draw.randint(1, 1000), 5000])
            with room.account(claim) as account:
                claim = account.claim
                while account.held < claim and draw.random() < 0.9:
                    await account.take(draw.randint(1, min(claim - account.held, 300)))
                    assert 0 < room.held <= room.size and account.held <= account.claim
                    if draw.random() < 0.3:
                        account.give(draw.randint(0, account.held))
                    if draw.random() < 0.1:
                        raise InvalidRequest("broken")
                    await asyncio.sleep(draw.random() * 0.001)
            done.append(number)

        tasks = []
        for number in range(150):
            tasks.append(asyncio.ensure_future(work(number)))
            if draw.random() < 0.3:
                await asyncio.sleep(0)
            if draw.random() < 0.2:
                draw.choice(tasks).cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert all(isinstance(result, (InvalidRequest, asyncio.CancelledError, type(None))) for result in results)
        assert len(done) > 20 and room.most_held > 500
        assert (room.held, room.num_waiting, room._accounts) == (0, 0, {})

    asyncio.run(run())


def test_threads_share_a_room():
    """Each engine call without a loop runs one of its own."""
    room = Room(100)

    async def work() -> None:
        for _ in range(50):
            with room.account(60) as account:
                await account.take(40)
                await account.take(20)

    async def run() -> None:
        await asyncio.wait_for(asyncio.gather(*(asyncio.to_thread(asyncio.run, work()) for _ in range(4))), 60)

    asyncio.run(run())
    assert room.held == 0 and room.most_held <= 100


def test_what_can_never_fit_is_refused_by_the_flag():
    memory = MediaMemory(4)
    memory.check_fits(3 * MIB, "the image", "image_data")
    memory.check_file_fits(MIB, "the image is", "image_data")
    with pytest.raises(InvalidRequest, match=r"the image would take about 4 MiB .* --media-memory-budget-mb") as caught:
        memory.check_fits(3 * MIB + 1, "the image", "image_data")
    assert caught.value.param == "image_data"
    with pytest.raises(InvalidRequest, match=r"larger than the 1 MiB .* --media-memory-budget-mb"):
        memory.check_file_fits(MIB + 1, "the image is", "image_data")


def test_what_a_prompt_needs():
    assert total_need([]) == 0
    needs = [Need(held=10, decoding=5, preparing=7, features=1)] * 6
    assert total_need(needs[:1]) == needs[0].alone == 10 + 1 + 7
    assert total_need(needs) == 6 * 11 + 4 * 5  # four are decoded at once
    assert total_need([*needs, Need(held=0, preparing=100)]) == 6 * 11 + 100


def test_a_scope_gives_all_back_and_knows_how_long_a_prompt_may_be():
    async def run() -> None:
        room = Room(10)
        with pytest.raises(ZeroDivisionError), media_scope(MediaScope()) as scope, current_scope() as same:
            assert same is scope
            await scope.keep(room.account(4)).take(4)
            assert room.held == 4
            _ = 1 / 0
        assert room.held == 0
        with current_scope() as own:
            await own.keep(room.account(3)).take(3)
        assert own is not scope and room.held == 0

    asyncio.run(run())
    MediaScope().check_tokens(10**9, "image_data")
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 7 tokens: the prompt's media alone"):
        MediaScope(7).check_tokens(8, "image_data")
