"""What a worker knows of the request in a row."""

from dataclasses import dataclass

import numpy as np

from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.forward_batch import LogprobRow
from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.plan import Admission, RowWork


@dataclass(slots=True)
class RowState:
    """A row's admission. ``ids`` are the tokens that the host knew then or has told of since, int64."""

    admission: Admission
    ids: np.ndarray
    media: MultimodalInputs | None = None

    @property
    def prompt_len(self) -> int:
        return len(self.admission.prompt_ids)

    def logprob_row(self, batch_index: int, work: RowWork, offset: int, provider: DeviceProvider) -> LogprobRow | None:
        """Return the prompt logprobs wanted from this work: those of the prompt tokens that follow ``[start, end)``.

        Args:
            batch_index: the row's place in the batch; offset: that of its first token among the batch's.
        """
        asked = self.admission.spec.logprobs
        if self.admission.logprob_from is None or asked is None:
            return None
        first = max(work.start, self.admission.logprob_from)
        last = min(work.start + work.num_tokens, self.prompt_len - 1)
        if first >= last:
            return None
        columns = (
            np.arange(offset + first - work.start, offset + last - work.start),
            self.ids[first + 1 : last + 1],
            np.array(asked.token_ids_logprob, dtype=np.int64),
        )
        token_rows, targets, token_ids = provider.to_device_together(columns)
        return LogprobRow(batch_index, token_rows, targets, asked.top_logprobs_num, token_ids)
