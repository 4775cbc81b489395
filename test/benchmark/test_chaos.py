"""What a chaos run holds against the parts that it kills."""

import random
import threading
from typing import Any, cast

import pytest

from benchmark.chaos import Fleet
from benchmark.soak_server import ServerFailed
from tiny_server import wait_for


class EndsOnce:
    """A router that is down; it ends while it is started for the second time, once it may."""

    def __init__(self) -> None:
        self.starts = 0
        self.may_end = threading.Event()

    def is_running(self) -> bool:
        return False

    def start(self) -> None:
        self.starts += 1
        if self.starts == 2:  # the first start is the fleet's own
            self.may_end.wait(30)
            raise ServerFailed("ended with status 2")

    def kill(self) -> None: ...


@pytest.mark.parametrize("is_killed", [True, False])
def test_only_what_was_killed_may_end_while_starting(is_killed: bool) -> None:
    router = EndsOnce()
    fleet = Fleet([], cast(Any, router))
    fleet.start()
    wait_for(lambda: router.starts == 2)
    if is_killed:
        assert fleet.kill("router", random.Random(0))
    router.may_end.set()
    wait_for(lambda: router.starts == 3)  # that it ended has been looked at
    fleet.stop()
    assert fleet.problems == ([] if is_killed else ["ended with status 2"])
