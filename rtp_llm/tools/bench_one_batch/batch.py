"""A loaded model that computes one batch of requests at a time."""

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Self

import torch

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import choose_device, provider_named
from rtp_llm.srt.engine.capacity import Capacity, StateCapacity, auto_max_tokens, plan_capacity, plan_states
from rtp_llm.srt.engine.core import DEFAULT_DIST_TIMEOUT_S, DEFAULT_MAX_RUNNING_REQUESTS
from rtp_llm.srt.engine.executors import make_executor
from rtp_llm.srt.plan import StepResult
from rtp_llm.srt.request_spec import PromptMedia
from rtp_llm.srt.worker.worker import LoadedModel, WorkerConfig
from rtp_llm.tools.bench_one_batch.options import OneBatchError, flag_of
from rtp_llm.tools.step_driver import StepDriver

logger = logging.getLogger(__name__)

# Options of ServerArgs that only a scheduler uses. Those of the HTTP server are marked in ServerArgs.
SCHEDULER_OPTIONS = (
    "chunked_prefill_size", "max_prefill_tokens", "schedule_policy", "disable_radix_cache", "disable_overlap_schedule",
    "max_running_requests", "swa_full_tokens_ratio", "state_cache_fraction", "state_checkpoint_interval",
    "decode_log_interval", "watchdog_timeout", "random_seed",
)  # fmt: skip


class OneBatch:
    """A loaded model that computes one batch of requests at a time; each row has pages of its own.

    Args:
        server_args: options of servers and schedulers are ignored, with a warning that names them.

    Raises:
        ValueError, OSError, RuntimeError: what is wrong with the options, the checkpoint or the machine.
    """

    def __init__(self, server_args: ServerArgs, model_config: ModelConfig) -> None:
        _warn_of_unused(server_args)
        self._args = server_args
        self.model_config = model_config
        device = choose_device(server_args.device)
        free_bytes, _ = provider_named(device).memory_bytes()
        self._executor = make_executor(
            WorkerConfig(server_args, model_config, device),
            depth=0,
            dist_timeout_s=server_args.dist_timeout or DEFAULT_DIST_TIMEOUT_S,
        )
        try:
            loaded = self._executor.load()
            self._states, self._capacity = self._plan_capacity(loaded, device, free_bytes)
        except BaseException:
            self._executor.shutdown()
            raise
        self.computes_blocks = loaded.max_media_block > 0  # media are computed in one step each
        self._driver = StepDriver(self._executor, len(loaded.layout.groups), server_args.page_size)

    def _plan_capacity(self, loaded: LoadedModel, device: str, free_bytes: int) -> tuple[StateCapacity, Capacity]:
        """Plan the cache with as many pages for sliding windows as for others: none is freed here."""
        provider = provider_named(device)
        fraction = self._args.mem_fraction_static or provider.mem_fraction_static
        ranks_sharing = self._args.num_ranks if provider.ranks_share_memory else 1
        budget_bytes = max(0, int(free_bytes * fraction) // ranks_sharing - loaded.weight_bytes)
        auto_tokens = auto_max_tokens(self.model_config.context_length, DEFAULT_MAX_RUNNING_REQUESTS)
        states = plan_states(
            loaded.layout.states,
            DEFAULT_MAX_RUNNING_REQUESTS,
            budget_bytes,
            auto_tokens,
            checkpoint_fraction=0.0,
            keeps_checkpoints=False,
            beside_pages=bool(loaded.layout.groups),
        )
        pages = plan_capacity(
            loaded.layout.groups,
            self.model_config.context_length,
            None,
            budget_bytes - states.num_bytes,
            self._args.max_total_tokens,
            auto_tokens,
            window_ratio=1.0,
        )
        return states, pages

    @property
    def max_total_tokens(self) -> int:
        """Tokens that the cache can hold."""
        return self._capacity.max_total_tokens

    def why_not(self, batch_size: int, num_tokens: int) -> str | None:
        """Return why there is no room for so many requests of so many tokens; None if there is."""
        if num_tokens > self.model_config.context_length:
            return f"{num_tokens} tokens exceed the context length of {self.model_config.context_length}"
        if self._states.num_slots and batch_size > self._states.num_slots:
            return f"{batch_size} requests exceed the {self._states.num_slots} whose states there is memory for"
        page_size = self._args.page_size
        if batch_size > self.max_total_tokens // (-(-num_tokens // page_size) * page_size):
            return f"{batch_size} x {num_tokens} tokens exceed the {self.max_total_tokens} that the cache holds"
        return None

    def reserve(self, max_batch_size: int, max_len: int) -> None:
        """Reserve the cache. Call it once, before the first batch."""
        num_slots = max_batch_size if self._states.num_slots else 0
        self._executor.init_cache(list(self._capacity.num_pages), max_batch_size, max_len, num_slots)

    def start(self, prompts: list[list[int]], num_new: int, media: Sequence[PromptMedia | None] | None = None) -> None:
        """Replace the batch.

        Args:
            num_new: tokens that each prompt may be continued by.
            media: of each prompt.
        """
        reason = self.why_not(len(prompts), max(map(len, prompts)) + num_new)
        if reason is not None:
            raise OneBatchError(reason)
        self._driver.start(prompts, num_new, media)

    def step(self, num_tokens: list[int]) -> list[int]:
        """Compute so many further tokens of each row; return the most probable next tokens."""
        return _token_ids(self._driver.step(num_tokens))

    def step_with_logits(self, num_tokens: list[int]) -> tuple[list[int], torch.Tensor]:
        """Do the same as ``step``, and return the logits [batch_size, vocab_size], float32 on the host."""
        result, logits = self._driver.step_with_logits(num_tokens)
        return _token_ids(result), logits

    def start_profile(self, activities: list[str], record_shapes: bool) -> None:
        self._executor.rpc("start_profile", activities, record_shapes)

    def stop_profile(self, path_prefix: str) -> list[str]:
        """Write the traces; return their paths, one of each rank."""
        return self._executor.rpc("stop_profile", path_prefix)

    def shutdown(self) -> None:
        self._executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()


def _warn_of_unused(args: ServerArgs) -> None:
    unused = [
        flag_of(item.name)
        for item in fields(args)
        if (item.metadata["server"] or item.name in SCHEDULER_OPTIONS) and getattr(args, item.name) != item.default
    ]
    if unused:
        logger.warning("without a server and a scheduler these do nothing: %s", ", ".join(unused))


def _token_ids(result: StepResult) -> list[int]:
    for row, answer in enumerate(result.rows):
        if answer.error is not None:
            raise RuntimeError(f"prompt {row}: {answer.error}")
    return [answer.token_ids[0] for answer in result.rows]
