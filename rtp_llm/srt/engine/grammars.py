"""Grammars in the core: requests wait until theirs is compiled; masks are made while a step is computed."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.constrained.backend import GrammarBackend, Matcher
from rtp_llm.srt.constrained.backends import backend_class
from rtp_llm.srt.constrained.queue import GrammarQueue
from rtp_llm.srt.constrained.thinking import fill_masks
from rtp_llm.srt.messages import AbortRequest, FromCore, GenerateRequest
from rtp_llm.srt.plan import TokenMasks


class Grammars:
    """All that the core's loop knows of grammars. Tokenizer and compiler are loaded when the first one comes.

    Args:
        on_admission: see EngineCore.
        skips_forced_tokens: tokens that a grammar forces are not drawn. With steps in flight some would be, depending
            on the moment, and answers with it.
    """

    def __init__(
        self,
        args: ServerArgs,
        model_config: ModelConfig,
        on_admission: Callable[[list[str]], None] | None,
        skips_forced_tokens: bool,
    ) -> None:
        self._skips_forced_tokens = skips_forced_tokens
        self._args = args
        self._model_config = model_config
        self._queue = GrammarQueue(
            self._make_backend,
            None if on_admission is None else lambda rid: on_admission([rid]),
            skips_forced_tokens,
        )
        self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="rtp-llm-masks")

    def __len__(self) -> int:
        """Requests that wait for their grammars."""
        return len(self._queue)

    @property
    def matchers(self) -> dict[str, Matcher]:
        """See Scheduler."""
        return self._queue.matchers

    def pass_on(self, messages: Sequence[Any], may_wait: bool) -> tuple[list[Any], list[FromCore]]:
        """Return the messages that the scheduler gets now, and the ends of requests that it never gets.

        Args:
            may_wait: there is nothing to do but to wait a moment for a grammar.
        """
        passed: list[Any] = []
        ends: list[FromCore] = []
        for message in messages:
            if isinstance(message, GenerateRequest) and message.spec.needs_matcher:
                self._queue.enter(message)
                continue
            if isinstance(message, AbortRequest):
                ends += self._queue.abort(message.rid)
            passed.append(message)
        if len(self._queue):
            requests, failed = self._queue.ready(may_wait and not passed)
            passed += requests
            ends += failed
        return passed, ends

    def masks(self, rows: list[int], matchers: Sequence[Matcher]) -> Future[TokenMasks]:
        """Begin to make the masks of ``rows``, whose matchers are given in the same order."""
        return self._mask_thread.submit(self._make_masks, rows, matchers)

    def _make_masks(self, rows: list[int], matchers: Sequence[Matcher]) -> TokenMasks:
        words = np.empty((len(rows), (self._model_config.vocab_size + 31) // 32), dtype=np.int32)
        fill_masks(self._queue.backend, matchers, words)
        return TokenMasks(rows, words)

    def _make_backend(self) -> GrammarBackend:
        # The library, the tokenizer and its readers take memory, for which a core without grammars has no use.
        from rtp_llm.srt.checkpoint import read_tokenizer

        tokenizer = read_tokenizer(self._args, self._model_config)
        return backend_class(self._args.grammar_backend)(
            tokenizer, self._model_config.vocab_size, self._skips_forced_tokens
        )

    def shutdown(self) -> None:
        self._queue.shutdown()
        self._mask_thread.shutdown(wait=False)
