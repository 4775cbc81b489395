"""A step on its way through a worker: not launched, waiting for its masks, or launched."""

from rtp_llm.srt.plan import StepPlan, StepResult, TokenMasks
from rtp_llm.srt.worker.own_rows import OwnRows
from rtp_llm.srt.worker.worker import NoResult, PendingLogits, PendingResult, Worker


class WorkerStep:
    """Launched as far as it can be; only ``result`` waits. ``own_rows``: the worker's, of all that plans are about."""

    def __init__(self, plan: StepPlan, worker: Worker, own_rows: OwnRows | None = None) -> None:
        self._own_rows = own_rows
        self.plan = plan if own_rows is None else own_rows.plan(plan)
        self._worker = worker
        self._logits: PendingLogits | None = None
        self._masks: TokenMasks | None = None
        self._launched: PendingResult | NoResult | None = None

    def launch(self) -> None:
        if self._logits is None:
            self._logits = self._worker.forward(self.plan)
        if self._launched is None and (self._masks is not None or not self.plan.masked_rows):
            self._launched = self._worker.sample(self._logits, self._masks)

    @property
    def is_launched(self) -> bool:
        """Whether nothing more is needed for its result."""
        return self._launched is not None

    def set_masks(self, masks: TokenMasks) -> None:
        masks = masks if self._own_rows is None else self._own_rows.masks(masks)
        check_masks(self.plan, masks)
        self._masks = masks

    def result(self) -> StepResult:
        self.launch()
        if self._launched is None:
            raise RuntimeError(waits_for_masks(self.plan))
        return self._launched.result()


def check_masks(plan: StepPlan, masks: TokenMasks) -> None:
    """Refuse masks that leave out a row that the step waits for.

    Raises:
        ValueError: names those rows.
    """
    missing = set(plan.masked_rows) - set(masks.rows)
    if missing:
        raise ValueError(f"step {plan.step_id} needs a mask for rows {sorted(missing)} too")


def waits_for_masks(plan: StepPlan) -> str:
    """Return the sentence that says why there is no result yet."""
    return f"step {plan.step_id} waits for the masks of rows {plan.masked_rows}"
