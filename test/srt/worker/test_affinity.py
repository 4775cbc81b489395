"""On which processors a rank computes."""

import os
import sys
import threading
from typing import Any

import pytest

from rtp_llm.srt.configs.server_args import ServerArgs, ServerArgsError
from rtp_llm.srt.worker import affinity
from rtp_llm.srt.worker.affinity import own_processors, use_processors

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are bound on Linux only")


class Provider:
    """Notes what it is told, and the processors of the calling thread."""

    def use_threads(self, *given: Any) -> None:
        self.given, self.cpus = given, sorted(os.sched_getaffinity(0))


def used(args: ServerArgs, place: int) -> Provider:
    provider = Provider()
    thread = threading.Thread(target=use_processors, args=(provider, args, place, args.num_ranks * args.dp_size))
    thread.start()  # another thread: the processors of this one stay
    thread.join()
    return provider


def test_a_rank_is_bound_to_its_processors() -> None:
    usable = sorted(os.sched_getaffinity(0))
    names = f"{usable[0]};{usable[-1]}"
    second = used(ServerArgs(model_path="m", dp_size=2, cpu_affinity=names, cpu_threads=4), place=1)
    assert (second.given, second.cpus) == ((2, False, 0, 1), [usable[-1]])
    assert used(ServerArgs(model_path="m", tp_size=2, cpu_affinity=names), place=0).given == (None, False, 0, 1)
    assert used(ServerArgs(model_path="m", tp_size=2, cpu_threads=4), place=1).given == (4, False, 1, 2)
    assert sorted(os.sched_getaffinity(0)) == usable


def test_nodes_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "numa_nodes", lambda: [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert own_processors("numa", 0, 1) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [own_processors("numa", place, 2) for place in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert own_processors("0-1,5;2", 0, 2) == [0, 1, 5] and own_processors(None, 0, 2) is None


def test_processors_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=r"may not use the processors \[4095\]"):
        use_processors(Provider(), ServerArgs(model_path="m", cpu_affinity="4095"), 0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0-3;4-7;8", "has 3 lists of processors, but there are 2 ranks"),
        ("0-3", "has 1 lists"),
        ("all", "must be numa, or lists of processors such as 0-3;4-7, not 'all'"),
        ("0-3;", "must be numa"),
        ("3-0;1", "'3-0' ends before it begins"),
    ],
)
def test_wrong_lists_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ServerArgsError, match=problem):
        ServerArgs(model_path="m", tp_size=2, cpu_affinity=text)
