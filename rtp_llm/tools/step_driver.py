"""Run batches of prompts on workers, step by step, for tools without a scheduler and a prefix cache."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from rtp_llm.srt.engine.executor import Executor
from rtp_llm.srt.plan import Admission, PageWrite, RowWork, StateAccess, StepPlan, StepResult
from rtp_llm.srt.pooling import PooledOutput, PoolingSpec
from rtp_llm.srt.request_spec import PromptMedia, RequestSpec
from rtp_llm.srt.sampling_params import SamplingParams

GREEDY = RequestSpec(SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=0), seed=0)
NUM_RANDOM_IDS = 10000  # ids of random prompts lie below this


def random_prompts(num_prompts: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Return random prompts of equal length, determined by the seed."""
    num_ids, draw = min(NUM_RANDOM_IDS, vocab_size), random.Random(seed)
    return [[draw.randrange(num_ids) for _ in range(length)] for _ in range(num_prompts)]


class StepDriver:
    """Computes one batch of prompts at a time; each row has pages of its own.

    Args:
        executor: with a loaded model; its cache is reserved before the first step, with a state slot for each row.
        num_groups: cache groups of the model.
    """

    def __init__(self, executor: Executor, num_groups: int, page_size: int) -> None:
        self._executor = executor
        self._num_groups = num_groups
        self._page_size = page_size
        self._step_id = 0
        self._lens: list[int] = []  # computed tokens of each row
        self._next = StepPlan(0)  # admissions, releases and page writes of the next step

    def start(
        self, prompts: Sequence[list[int]], num_new: int, media: Sequence[PromptMedia | None] | None = None
    ) -> None:
        """Replace the batch.

        Args:
            num_new: tokens that each prompt may be continued by.
            media: of each prompt.
        """
        num_pages = -(-(max(map(len, prompts)) + num_new) // self._page_size)
        specs = [replace(GREEDY, media=each) for each in media or [None] * len(prompts)]
        admissions = [
            Admission(row, str(row), ids, [], spec, state_slot=row + 1)
            for row, (ids, spec) in enumerate(zip(prompts, specs, strict=True))
        ]
        writes = [
            PageWrite(row, group, 0, list(range(1 + row * num_pages, 1 + (row + 1) * num_pages)))  # 0 is the dummy
            for row in range(len(prompts))
            for group in range(self._num_groups)
        ]
        self._next = StepPlan(0, list(range(len(self._lens))), admissions, writes)
        self._lens = [0] * len(prompts)

    def pool(self, prompt: list[int], pooling: PoolingSpec) -> PooledOutput:
        """Replace the batch by one prompt, compute it at once, and return its pooled output.

        Raises:
            RuntimeError: the request failed by itself.
        """
        self.start([prompt], 0)
        [admission] = self._next.admissions
        spec = replace(admission.spec, pooling=pooling)
        self._next = replace(self._next, admissions=[replace(admission, spec=spec)])
        plan = self._plan([len(prompt)])
        plan.work = [replace(work, sample=False) for work in plan.work]
        [row] = self._executor.submit(plan).result().rows
        if row.pooled is None:
            raise RuntimeError(row.error or "the model made no output")
        return row.pooled

    def step(self, num_tokens: Sequence[int]) -> StepResult:
        """Compute so many further tokens of each row; the result has the next token."""
        return self._executor.submit(self._plan(num_tokens)).result()

    def step_from(self, num_tokens: Sequence[int], load: int) -> StepResult:
        """Do the same as ``step``, from the states of a slot ``load`` on where it does not begin a row."""
        return self._executor.submit(self._plan(num_tokens, load)).result()

    def step_with_logits(self, num_tokens: Sequence[int]) -> tuple[StepResult, torch.Tensor]:
        """Do the same as ``step``, and return the logits [batch_size, vocab_size], float32 on the host."""
        return self._executor.rpc("step_with_logits", self._plan(num_tokens))[0]

    def step_on_ranks(self, num_tokens: Sequence[int], function: Callable[..., Any], *args: Any) -> list[Any]:
        """Have each rank's worker called by ``function(worker, plan, *args)`` with a step's plan, which it must
        execute; return one answer per rank."""
        return self._executor.rpc("apply", function, self._plan(num_tokens), *args)

    def _plan(self, num_tokens: Sequence[int], load: int | None = None) -> StepPlan:
        """Return a step's plan, which samples every row, even within its prompt, to get its logits. ``load``: the slot
        of the states before the step, where that is not the row's own."""
        plan, self._next = self._next, StepPlan(0)
        self._step_id += 1
        ends = [start + num for start, num in zip(self._lens, num_tokens, strict=True)]
        work = [
            RowWork(row, start, end - start, sample=True)
            for row, (start, end) in enumerate(zip(self._lens, ends, strict=True))
        ]
        self._lens = ends
        slots = [(w.row, 0 if w.start == 0 else load) for w in work]
        states = [StateAccess(row, load=slot) for row, slot in slots if slot is not None]
        return replace(plan, step_id=self._step_id, work=work, states=states)
