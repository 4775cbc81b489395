"""A prompt computed on several tensor-parallel ranks, each of which records what its modules take and give."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import choose_device
from rtp_llm.srt.engine.executor import MultiProcessExecutor
from rtp_llm.srt.layers.quantization.base import PackedLayer, dequantized
from rtp_llm.srt.plan import StepPlan
from rtp_llm.srt.worker.worker import Worker, WorkerConfig
from rtp_llm.tools.step_driver import StepDriver
from rtp_llm.tools.verify.prompts import Prompt
from rtp_llm.tools.verify.recorders import OurRecorder
from rtp_llm.tools.verify.trace import LOGITS, Place, Trace, kept

TIMEOUT_S = 60.0  # of what ranks say to each other


class Ranks(AbstractContextManager["Ranks"]):
    """Our model on several ranks, a process each, one prompt at a time. They end with the context."""

    def __init__(self, args: ServerArgs, config: ModelConfig, max_len: int, num_ranks: int = 2) -> None:
        args = replace(args, tp_size=num_ranks)
        worker = WorkerConfig(args, config, choose_device(args.device))
        self._executor = MultiProcessExecutor(worker, args.dist_timeout or TIMEOUT_S)
        try:
            num_groups = len(self._executor.load().layout.groups)
            pages = [-(-max_len // args.page_size)] * num_groups
            self._executor.init_cache(pages, 1, max_len, num_state_slots=1)
        except BaseException:
            self._executor.shutdown()
            raise
        self._driver = StepDriver(self._executor, num_groups, args.page_size)

    def __exit__(self, *exception: object) -> None:
        self._executor.shutdown()

    def traces(self, prompt: Prompt, trace: Trace) -> list[Trace]:
        """Compute a prompt at once; return what each rank records in a copy of an empty trace, with the logits of its
        last token under the place LOGITS of no module."""
        self._driver.start([prompt.ids], 1, [prompt.media])
        return self._driver.step_on_ranks([len(prompt.ids)], _recorded_step, trace)

    def tensors(self, names: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Return, of each rank, ``tensors_of`` modules by their names in our model."""
        return self._executor.rpc("apply", _tensors_of, list(names))


def _recorded_step(worker: Worker, plan: StepPlan, trace: Trace) -> Trace:
    model = worker.runner.model
    with OurRecorder(model, trace), trace.step(0, trace.num_tokens):
        _, logits = worker.step_with_logits(plan)
    trace.tensors[Place("", LOGITS)] = kept(logits[-1:])
    trace.forget_pieces()
    return trace


def _tensors_of(worker: Worker, names: Sequence[str]) -> dict[str, torch.Tensor]:
    return tensors_of(worker.runner.model, names)


def tensors_of(model: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return copies of what modules hold, float32 on the host, by ``module.name``: weights, buffers, and other tensors
    among their attributes. The weight of a linear layer is [outputs, inputs], a table's
    [rows, size], however it is kept."""
    modules = dict(model.named_modules())
    found: dict[str, torch.Tensor] = {}
    for name in names:
        if name not in modules:
            continue
        module = modules[name]
        held = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
        held |= dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if isinstance(module, PackedLayer):
            held = {"weight": dequantized(module)} | held  # a cause is rather told of the weight than of the bias
        found |= {f"{name}.{key}": kept(value) for key, value in held.items() if value.is_floating_point()}
    return found
