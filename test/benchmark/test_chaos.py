"""What a chaos run holds against the parts that it kills."""

import random
import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest

from benchmark.chaos import Fleet, longest_gap
from benchmark.fleet import NotAdded
from benchmark.soak_server import ServerFailed
from tiny_server import wait_for


class EndsOnce:
    """A router that is down; it ends while it is started for the second time, once it may."""

    def __init__(self) -> None:
        self.starts = 0
        self.urls = ["http://127.0.0.1:1"]
        self.may_end = threading.Event()

    def is_running(self) -> bool:
        return False

    def start(self, urls: Sequence[str] | None = None) -> None:
        self.starts += 1
        if self.starts == 2:  # the first start is the fleet's own
            self.may_end.wait(30)
            raise ServerFailed("ended with status 2")

    def kill(self) -> None: ...


@pytest.mark.parametrize("is_killed", [True, False])
def test_only_what_was_killed_may_end_while_starting(is_killed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    router = EndsOnce()
    fleet = Fleet([], cast(Any, router))
    monkeypatch.setattr(fleet, "ready", lambda: ["http://127.0.0.1:1"])
    fleet.start()
    wait_for(lambda: router.starts == 2)
    if is_killed:
        assert fleet.kill("router", random.Random(0))
    router.may_end.set()
    wait_for(lambda: router.starts == 3)  # that it ended has been looked at
    fleet.stop()
    assert fleet.problems == ([] if is_killed else ["ended with status 2"])


class Told:
    """A router that runs, and refuses the first replica that it is told of."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.refused: list[str] = []

    def is_running(self) -> bool:
        return True

    def start(self, urls: Sequence[str] | None = None) -> None: ...

    def add(self, url: str) -> None:
        if not self.refused:
            self.refused.append(url)
            raise NotAdded("not yet")
        self.urls.append(url)

    def kill(self) -> None: ...


def test_a_running_router_is_told_of_a_replica_until_it_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Told()
    fleet = Fleet([], cast(Any, router))
    monkeypatch.setattr(fleet, "ready", lambda: ["http://127.0.0.1:2"])
    fleet.start()
    wait_for(lambda: bool(router.urls))
    fleet.stop()
    assert router.refused == router.urls == ["http://127.0.0.1:2"]
    assert fleet.not_added == {"not yet": 1}


def test_the_longest_time_without_an_answer() -> None:
    assert longest_gap(10.0, [13.0, 11.0, 18.0], 20.0) == 5.0
    assert longest_gap(10.0, [11.0], 20.0) == 9.0
    assert longest_gap(10.0, [], 20.0) == 10.0
