"""--log-requests: a line when a request comes, and one when it ends."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rtp_llm.srt.managers.detokenizer import Completion

logger = logging.getLogger(__name__)

SHOWN_ITEMS = 64  # characters of a text, or token ids, at level 2


class RequestLog:
    """An Observer of a Frontend. ``level``: see ServerArgs.log_requests_level."""

    def __init__(self, level: int) -> None:
        self._level = level

    def started(self, completion: Completion) -> None:
        request = completion.request
        fields: dict[str, Any] = {"rid": request.rid, "prompt_tokens": len(request.prompt_ids)}
        if self._level >= 1:
            fields |= {"seed": request.spec.seed, "sampling_params": asdict(request.spec.params)}
        if self._level >= 2:
            fields["prompt_ids"] = self._shown(request.prompt_ids)
        logger.info("request %s", json.dumps(fields))

    def progressed(self, completion: Completion, num_new: int, elapsed_s: float, is_first: bool) -> None:
        pass

    def ended(self, completion: Completion, elapsed_s: float) -> None:
        reason = completion.finish_reason
        fields: dict[str, Any] = {
            "rid": completion.request.rid,
            "finish_reason": "hang-up" if reason is None else reason.to_dict(),
            "completion_tokens": len(completion.output_ids),
            "cached_tokens": completion.cached_tokens,
            "seconds": round(elapsed_s, 4),
        }
        if self._level >= 2:
            fields["text"] = self._shown(completion.text)
        logger.info("end %s", json.dumps(fields))

    def _shown(self, value: Sequence[Any]) -> Any:
        if self._level >= 3 or len(value) <= SHOWN_ITEMS:
            return value
        return {"first": value[:SHOWN_ITEMS], "of": len(value)}
