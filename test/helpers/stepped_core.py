"""A core over a real model that a test steps by hand, and requests of every kind for it."""

from collections.abc import Sequence
from typing import Any

from made_requests import generate_request
from thread_memory import share_memory
from thread_ranks import ThreadExecutor

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.engine.core import EngineCore
from rtp_llm.srt.engine.executor import InProcessExecutor, MultiProcessExecutor
from rtp_llm.srt.messages import GenerateRequest, TokenOutput
from rtp_llm.srt.plan import TokenLogprob
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.utils.ipc import QueueLink
from rtp_llm.srt.worker.worker import WorkerConfig
from tiny_models import random_prompts, tiny_model


class Core:
    """A core that is stepped by hand.

    Args:
        depth, delayed: of its executor.
        processes: the worker runs in a process of its own, as each of several ranks does; call ``close`` then.
        threads: a rank is a thread of this process; call ``close`` then.
        shares_memory: these, with requests of their own, send tokens through memory, not by torch's operations.
        options: of the engine; ``model_path`` in place of a tiny model's name.
    """

    def __init__(
        self,
        name: str = "",
        depth: int = 0,
        delayed: bool = False,
        processes: bool = False,
        threads: bool = False,
        shares_memory: bool = False,
        **options: Any,
    ) -> None:
        model_path = tiny_model(name) if name else options.pop("model_path")
        args = ServerArgs(
            **{"model_path": model_path, "device": "cpu", "dtype": "float32", "context_length": 300}
            | {"max_total_tokens": 2000, "chunked_prefill_size": 16, "max_running_requests": 32}
            | options
        )
        model_config = ModelConfig.from_pretrained(
            args.model_path, dtype=args.dtype, context_length=args.context_length
        )
        config = WorkerConfig(args, model_config, args.device or "cpu")
        self.executor: Any = InProcessExecutor(config, depth, delayed)
        if processes:
            self.executor = MultiProcessExecutor(config, 60.0, depth)
        elif threads:
            self.executor = ThreadExecutor(config, depth)
            if shares_memory:
                share_memory(self.executor._worlds)
        self.link = QueueLink()
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.link.client.on_messages(self.take)
        self.core = EngineCore(args, model_config, self.link.core, executor=self.executor)

    def close(self) -> None:
        self.core.shutdown()

    def take(self, messages: list) -> None:
        for message in messages:
            if isinstance(message, TokenOutput):
                self.outputs.setdefault(message.rid, []).append(message)

    def run(self, requests: list[GenerateRequest]) -> dict[str, list[int]]:
        for request in requests:
            self.link.client.send(request)
        self.core.step(block=False)
        while not self.core.scheduler.idle or len(self.core.grammars):
            self.core.step(block=False)
        self.core.scheduler.check_integrity()
        return {rid: [t for o in outputs for t in o.token_ids] for rid, outputs in self.outputs.items()}

    def logprobs(self) -> dict[str, list[TokenLogprob]]:
        """What was told of each request's tokens, its prompt's first, in however many parts."""
        return {
            rid: [part for output in outputs for part in (*output.prompt_logprobs, *output.logprobs)]
            for rid, outputs in self.outputs.items()
        }


def greedy_requests(prompts: Sequence[list[int]], num_new: int) -> list[GenerateRequest]:
    params = SamplingParams(temperature=0.0, max_new_tokens=num_new, ignore_eos=True)
    return [generate_request(str(place), prompt, params) for place, prompt in enumerate(prompts)]


def mixed_requests(vocab_size: int) -> list[GenerateRequest]:
    """Greedy and sampled, with penalties, biases, minimum lengths and logprobs, over shared and own prompts."""
    prompts = random_prompts(vocab_size, (3, 40, 70, 21, 21, 1, 90, 33))
    prompts[4] = [*prompts[3][:15], 5, 6]
    variants: list[dict] = [
        {"temperature": 0.0, "ignore_eos": True},
        {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.7},
        {"temperature": 1.3, "top_k": 9, "repetition_penalty": 1.4},
        {"temperature": 0.0, "presence_penalty": 1.5, "min_new_tokens": 10},
        {"temperature": 1.0, "min_p": 0.1, "logit_bias": {3: 4.0}, "stop_token_ids": [3]},
    ]
    requests = []
    for i, prompt in enumerate(prompts * 2):
        params = SamplingParams(max_new_tokens=12 + i, **variants[i % len(variants)])
        logprob = i % 3 == 0
        requests.append(
            generate_request(
                f"r{i}",
                prompt,
                params,
                1000 + i,
                return_logprob=logprob,
                logprob_start_len=0,
                eos_token_ids=(vocab_size - 1,),
            )
        )
    return requests
