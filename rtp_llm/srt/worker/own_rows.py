"""A plan's part for one rank, where ranks have requests of their own (``--enable-dp-attention``)."""

from dataclasses import replace
from typing import Protocol, TypeVar

from rtp_llm.srt.plan import StepPlan, TokenMasks


class _OfRow(Protocol):
    row: int


Item = TypeVar("Item", bound=_OfRow)


class OwnRows:
    """Rows [rank * num_rows, (rank + 1) * num_rows) of plans, which are this rank's rows 0 to num_rows."""

    def __init__(self, rank: int, num_rows: int) -> None:
        self._first, self._end = rank * num_rows, (rank + 1) * num_rows

    def plan(self, plan: StepPlan) -> StepPlan:
        """Return what a plan says of these rows. Each of its shared prefixes and new pages is of one rank's rows."""
        return StepPlan(
            plan.step_id,
            releases=self._rows(plan.releases),
            admissions=self._own(plan.admissions),
            page_writes=self._own(plan.page_writes),
            work=self._own(plan.work),
            masked_rows=self._rows(plan.masked_rows),
            shared_prefixes=[
                replace(prefix, rows=rows) for prefix in plan.shared_prefixes if (rows := self._rows(prefix.rows))
            ],
            new_pages=[replace(new, rows=rows) for new in plan.new_pages if (rows := self._rows(new.rows))],
            known_tokens=self._own(plan.known_tokens),
            states=self._own(plan.states),
            rank_tokens=plan.rank_tokens,
        )

    def masks(self, masks: TokenMasks) -> TokenMasks:
        lines = [line for line, row in enumerate(masks.rows) if self._first <= row < self._end]
        return TokenMasks([masks.rows[line] - self._first for line in lines], masks.words[lines])

    def _rows(self, rows: list[int]) -> list[int]:
        return [row - self._first for row in rows if self._first <= row < self._end]

    def _own(self, items: list[Item]) -> list[Item]:
        return [replace(item, row=item.row - self._first) for item in items if self._first <= item.row < self._end]  # type: ignore[type-var]
