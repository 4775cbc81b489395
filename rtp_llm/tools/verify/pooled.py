"""Verify models without text as their output: each pooled output, and the modules by which it is made.

Both sides compute each prompt at once, and ours gives numbers before the last function (softmax, length one). The first
module that differs is named, as for decoders; what may be wrong in it is not searched for.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from rtp_llm.srt.checkpoint import read_model_config, read_tokenizer
from rtp_llm.srt.configs.hf_config import CONFIG_ERRORS
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import choose_torch_device
from rtp_llm.srt.layers.fallback.encoders import encoder_kind
from rtp_llm.srt.layers.pooler import Pooler
from rtp_llm.srt.layers.splade import Splade
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.pooled import pooled_class
from rtp_llm.srt.models.registry import ModelImportError, UnknownArchitectureError, reason
from rtp_llm.srt.models.weight_loading import WeightLoadError
from rtp_llm.tools.verify.locate import (
    LOGITS_TOLERANCE,
    MODULE_TOLERANCE,
    Difference,
    compare,
    first_difference,
    relative_error,
)
from rtp_llm.tools.verify.model_class import registered
from rtp_llm.tools.verify.names import aligned_names
from rtp_llm.tools.verify.options import VerifyError, VerifyOptions
from rtp_llm.tools.verify.pointer import source_of
from rtp_llm.tools.verify.prompts import Prompt, read_or_default_prompts
from rtp_llm.tools.verify.recorders import OurRecorder, Recorder
from rtp_llm.tools.verify.sides import ForwardError, OurModel
from rtp_llm.tools.verify.trace import Trace

UNREAD = re.compile(r"(^|\.)(pooler|cls|lm_head|predictions)\.")  # weights that no pooled output needs
NUM_SHOWN = 3


@dataclass(frozen=True)
class PooledResult:
    """``error``: the largest distance of a line of an output from transformers', relative to its size."""

    prompt: Prompt
    task: str
    error: float


@dataclass(frozen=True)
class PooledReport:
    """
    Args:
        first: the first place that differs; None: they agree, or no module of ours was recorded.
        around: the places before and after it.
        source: the place in our model file to be read.
        left_out: outputs that transformers' class does not have.
        failure: why ours cannot be loaded or run; ``results`` is then empty.
    """

    model_path: str
    class_name: str
    dtype: str
    tolerance: float
    results: list[PooledResult] = field(default_factory=list)
    first: Difference | None = None
    around: list[Difference] = field(default_factory=list)
    source: str = ""
    left_out: list[str] = field(default_factory=list)
    failure: str = ""

    @property
    def agrees(self) -> bool:
        return not self.failure and all(result.error <= self.tolerance for result in self.results)


def makes_no_text(args: ServerArgs, options: VerifyOptions) -> bool:
    """Return whether the checkpoint's class has pooled outputs alone. What is wrong with it is told by whoever loads
    it."""
    try:
        with registered(args, options.model_class):
            config = read_model_config(args)
            return not ModelTraits.of(pooled_class(config)).generates
    except UnknownArchitectureError:
        return encoder_kind(read_model_config(args).architectures) is not None
    except (ModelImportError, ModelBuildError):
        return False


def verify_pooled(args: ServerArgs, options: VerifyOptions) -> PooledReport:
    """Compare ours with transformers.

    Raises:
        VerifyError: transformers has no such class, or the options do not fit the model.
    """
    if options.schedules:
        raise VerifyError("--schedules is for models that make text: others compute each input in one step")
    with registered(args, options.model_class):
        config = read_model_config(args)
        prompts = list(read_or_default_prompts(config, read_tokenizer(args, config), options))
        name = options.model_class or ", ".join(config.architectures)
        try:
            ours = OurModel(args, config, max(len(prompt.ids) for prompt in prompts))
            theirs = TheirEncoder(args, config)
            return _compared(ours, theirs, prompts, config)
        except (WeightLoadError, ModelBuildError, ModelImportError, ForwardError) as error:
            tolerance = LOGITS_TOLERANCE[config.dtype]
            return PooledReport(config.model_path, name, config.dtype, tolerance, failure=str(error))


class TheirEncoder:
    """Transformers' model of the class that the checkpoint names.

    Raises:
        VerifyError: there is none, or the checkpoint does not fit it.
    """

    def __init__(self, args: ServerArgs, config: ModelConfig) -> None:
        known = [name for name in config.architectures if isinstance(getattr(transformers, name, None), type)]
        names = ", ".join(config.architectures)
        if not known:
            raise VerifyError(f"there is nothing to compare {names} with: transformers has no class of that name")
        model_class, settings = getattr(transformers, known[0]), copy.deepcopy(config.hf_config)
        # As the engine reads it: with overrides, and in today's spelling. One of a model file's own is not for them.
        options = {"config": settings} if isinstance(settings, model_class.config_class) else {}
        try:
            model, info = model_class.from_pretrained(
                config.model_path, dtype=getattr(torch, config.dtype), output_loading_info=True, **options
            )
        except CONFIG_ERRORS as error:
            raise VerifyError(
                f"there is nothing to compare {names} with: {known[0]} of transformers cannot be made of "
                f"{config.model_path}: {reason(error)}"
            ) from error
        for kind in ("missing_keys", "mismatched_keys"):
            if wrong := sorted(str(key) for key in info[kind] if not UNREAD.search(str(key))):
                raise VerifyError(
                    f"{known[0]} of transformers is no reference for {config.model_path}, which lacks "
                    f"{', '.join(wrong[:8])}, or has them in another shape"
                )
        self.model: Any = model.eval().to(choose_torch_device(args.device))

    @torch.inference_mode()
    def run(self, prompt: Prompt, trace: Trace | None = None) -> Any:
        """Return transformers' output of a prompt."""
        ids = torch.tensor([prompt.ids], device=self.model.device)
        if trace is None:
            return self.model(input_ids=ids, output_hidden_states=True)
        with trace.step(0, len(prompt.ids)):
            return self.model(input_ids=ids, output_hidden_states=True)


class TheirModules(Recorder):
    """Hooks for a model of transformers, under our names of its modules."""

    def __init__(self, model: nn.Module, trace: Trace, names: Mapping[nn.Module, str]) -> None:
        super().__init__(model, trace)
        self.names = names

    def watch(self, name: str, module: nn.Module) -> None:
        super().watch(self.names[module], module)


def expected(pooler: Pooler, task: str, output: Any, prompt: Prompt) -> torch.Tensor | None:
    """Return an output of ours as it follows from transformers'; None if that has nothing of the kind."""
    logits = getattr(output, "logits", None)
    if isinstance(pooler, Splade):
        of_logits = Splade(pooler.width, None, pooler.sums, pooler.twice)
        return None if logits is None else _pooled(of_logits, logits[0], prompt)
    if task in ("classify", "score", "token_classify"):
        return None if logits is None or logits.shape[-1] != pooler.width else logits[0].float()
    states = getattr(output, "last_hidden_state", None)
    if states is None and getattr(output, "hidden_states", None):
        states = output.hidden_states[-1]
    return None if states is None else _pooled(pooler, states[0], prompt)


def _pooled(pooler: Pooler, states: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    positions = pooler.positions(np.array(prompt.ids))
    read = states[torch.from_numpy(positions).to(states.device)]
    lines = pooler(read, torch.tensor([len(read)], device=states.device), None, False)
    return lines if pooler.per_token else lines[0]


@torch.inference_mode()
def _compared(ours: OurModel, theirs: TheirEncoder, prompts: list[Prompt], config: ModelConfig) -> PooledReport:
    poolers: Mapping[str, Pooler] = ModelTraits.of(ours.model).poolers
    results, left_out = [], set()
    for prompt in prompts:
        output = theirs.run(prompt)
        for task, pooler in poolers.items():
            wanted = expected(pooler, task, output, prompt)
            if wanted is None:
                left_out.add(task)
                continue
            found, wanted = ours.pool(prompt, task), wanted.cpu()
            error = relative_error(*(lines.reshape(-1, wanted.shape[-1]) for lines in (found, wanted)))
            results.append(PooledResult(prompt, task, error))
    if not results:
        raise VerifyError(
            f"transformers' {type(theirs.model).__name__} has none of the outputs {', '.join(poolers)}: there is "
            "nothing to compare"
        )
    tolerance, name = LOGITS_TOLERANCE[config.dtype], type(ours.model).__name__
    report = PooledReport(config.model_path, name, config.dtype, tolerance, results, left_out=sorted(left_out))
    return report if report.agrees else _localised(report, ours, theirs)


def _localised(report: PooledReport, ours: OurModel, theirs: TheirEncoder) -> PooledReport:
    """Return the report with the first place that differs, in the shortest prompt that does."""
    wrong = [result for result in report.results if result.error > report.tolerance]
    worst = min(wrong, key=lambda result: len(result.prompt.ids))
    our_trace, their_trace = (Trace(len(worst.prompt.ids)) for _ in range(2))
    with OurRecorder(ours.model, our_trace):
        ours.pool(worst.prompt, worst.task, our_trace)
    with TheirModules(theirs.model, their_trace, aligned_names(ours.model, theirs.model)):
        theirs.run(worst.prompt, their_trace)
    differences = compare(our_trace, their_trace)
    index = first_difference(differences, MODULE_TOLERANCE[report.dtype])
    made: dict[str, Any] = {item: getattr(report, item) for item in ("model_path", "class_name", "dtype", "tolerance")}
    made |= {"results": report.results, "left_out": report.left_out}
    if index is None:
        return PooledReport(**made)
    place = differences[index].place
    source = source_of(ours.model, place.module, place.part, our_trace, built=ours.built)
    around = differences[max(0, index - NUM_SHOWN) : index + NUM_SHOWN + 1]
    return PooledReport(**made, first=differences[index], around=around, source=source)


def hint(report: PooledReport) -> str:
    """Return what is to be said of outputs that differ where no module does."""
    tasks = ", ".join(dict.fromkeys(result.task for result in report.results if result.error > report.tolerance))
    return f"All modules agree that both sides have: what differs is made after the last one, by the pooler of {tasks}."
