"""The scheduler's configuration."""

from dataclasses import dataclass

from rtp_llm.srt.pooling import ONLY_TOKENS, PooledOutputs


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_req_len: int  # tokens of the longest request that fits the context and the cache
    max_running_requests: int = 256
    chunked_prefill_size: int = 2048  # prompt tokens per step; -1: prompts are not cut
    max_prefill_tokens: int = 16384  # prompt tokens per step, also where prompts are not cut (a longer one runs alone)
    schedule_policy: str = "fcfs"
    disable_radix_cache: bool = False
    max_media_block: int = 0  # tokens of media that a step must compute together, at most
    # Of a model with recurrent states: a prompt's are saved at multiples of so many tokens. 0: not; None: by memory.
    state_checkpoint_interval: int | None = None
    share_prefixes: bool = False  # whether the attention back end reads StepPlan.shared_prefixes
    outputs: PooledOutputs = ONLY_TOKENS  # that the model has
    num_stages: int = 1  # of a pipeline of workers: as many steps are in flight, of different rows
