"""Which requests run, as llama.cpp's /slots tells it: by slots, each of which holds one request."""

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from rtp_llm.srt.entrypoints.llama_cpp.settings import generation_settings
from rtp_llm.srt.managers.detokenizer import Completion


@dataclass(slots=True)
class Task:
    number: int  # of the request, from 0 on
    slot: int | None = None  # None: it waits for one


class Slots:
    """An Observer of a Frontend. Requests take the free slots in the order in which they come.

    Args:
        num_slots: the number of requests that may run at once.
        slot_tokens: the most that one may have.
    """

    def __init__(self, num_slots: int, slot_tokens: int) -> None:
        self.num_slots = num_slots
        self._slot_tokens = slot_tokens
        self._free = list(range(num_slots))  # a heap
        self._tasks: dict[Completion, Task] = {}
        self._waiting: deque[Completion] = deque()
        self._num_tasks = 0

    def started(self, completion: Completion) -> None:
        self._tasks[completion] = Task(self._num_tasks)
        self._num_tasks += 1
        self._waiting.append(completion)
        self._fill()

    def progressed(self, completion: Completion, num_new: int, elapsed_s: float, is_first: bool) -> None:
        pass

    def ended(self, completion: Completion, elapsed_s: float) -> None:
        task = self._tasks.pop(completion)
        if task.slot is None:
            self._waiting.remove(completion)
        else:
            heappush(self._free, task.slot)
            self._fill()

    def _fill(self) -> None:
        while self._free and self._waiting:
            self._tasks[self._waiting.popleft()].slot = heappop(self._free)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def told(self) -> list[dict[str, Any]]:
        """Return the slots in llama.cpp's form, without any text of a request."""
        slots: list[dict[str, Any]] = [
            {"id": i, "n_ctx": self._slot_tokens, "speculative": False, "is_processing": False}
            for i in range(self.num_slots)
        ]
        for completion, task in self._tasks.items():
            if task.slot is not None:
                slots[task.slot] |= _running(completion, task)
        return slots


def _running(completion: Completion, task: Task) -> dict[str, Any]:
    params, num_new = completion.request.spec.params, len(completion.output_ids)
    most = params.max_new_tokens
    state = {
        "has_next_token": not completion.finished,
        "has_new_line": "\n" in completion.text,
        "n_remain": -1 if most is None else most - num_new,
        "n_decoded": num_new,
    }
    return {
        "is_processing": True,
        "id_task": task.number,
        "n_prompt_tokens": completion.prompt_tokens,
        "n_prompt_tokens_cache": completion.cached_tokens,
        "params": generation_settings(params, completion.request.spec.seed),
        "next_token": [state],
    }
