"""The device under test: its name, timing on it, and how much of a part's time is left."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from make_checkpoint import SIZES
from rtp_llm import Engine
from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.device.provider import DeviceProvider

PART_S = 170.0  # seconds of a part, after which it begins nothing new


@dataclass(frozen=True)
class Row:
    """A line of the table. ``right`` None: it is no check, or could not be made."""

    what: str
    result: str
    right: bool | None = None


Rows = Iterator[Row]


@dataclass
class Machine:
    """A device, and its rates as far as they were measured.

    Attributes:
        is_dry: everything is tiny, on a device that only behaves like a GPU: no figure means anything.
        folder: for checkpoints.
        bytes_per_s: of copying; flops_per_s: of large products in bfloat16. None: not measured.
    """

    device: str
    is_dry: bool
    folder: Path
    bytes_per_s: float | None = None
    flops_per_s: float | None = None
    _end: float = field(default_factory=lambda: time.monotonic() + PART_S)

    @property
    def provider(self) -> DeviceProvider:
        return provider_named(self.device)

    @property
    def torch_device(self) -> str:
        return self.provider.torch_device

    def begin_part(self) -> None:
        self._end = time.monotonic() + PART_S

    def has_time(self, seconds: float) -> bool:
        """Whether the part may go on for so long."""
        return self.is_dry or time.monotonic() + seconds < self._end

    def pick(self, real: Any, dry: Any) -> Any:
        return dry if self.is_dry else real

    def seconds(self, work: Callable[[], object], repeats: int = 20) -> float:
        """Return the device's time for the work, of several runs in a row."""
        for _ in range(self.pick(3, 1)):
            work()
        repeats = self.pick(repeats, 1)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end), 1e-6) / 1e3 / repeats

    @contextmanager
    def engine(self, shape: str, **options: Any) -> Iterator[Engine]:
        """Give an engine in bfloat16 that this thread steps, with random weights in a shape of ``make_checkpoint``."""
        folder = self.folder / shape
        config = deepcopy(SIZES[shape])
        config.architectures = [ARCHITECTURES[config.model_type]]
        config.save_pretrained(folder)
        defaults: dict[str, Any] = {"dtype": "bfloat16", "max_running_requests": self.pick(256, 4)}
        defaults |= {"context_length": self.pick(12288, 128)}
        with Engine(
            model_path=str(folder),
            load_format="dummy",
            device=self.device,
            skip_tokenizer_init=True,
            inline=True,
            **defaults | options,
        ) as engine:
            yield engine
        del engine
        gc.collect()
        torch.cuda.empty_cache()


ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def prompts_of(shape: str, num_prompts: int, length: int, prefix: Sequence[int] = ()) -> list[list[int]]:
    """Random prompts that begin alike, and that no cache has seen."""
    draw, vocab_size = random.Random(random.randrange(1 << 62)), SIZES[shape].vocab_size
    return [[*prefix, *(draw.randrange(vocab_size) for _ in range(length - len(prefix)))] for _ in range(num_prompts)]


def generate(engine: Engine, prompts: list[list[int]], num_new: int) -> float:
    """Generate greedily, to the last token; return seconds."""
    params = {"temperature": 0, "max_new_tokens": num_new, "ignore_eos": True}
    start = time.perf_counter()
    engine.generate(input_ids=prompts, sampling_params=params)
    return time.perf_counter() - start


def step_seconds(engine: Engine, prompts: list[list[int]], num_steps: int) -> float:
    """Return the time of a decode step of cached prompts: that of many less that of a few."""
    few = 4
    generate(engine, prompts, few)
    return max(generate(engine, prompts, few + num_steps) - generate(engine, prompts, few), 1e-9) / num_steps
