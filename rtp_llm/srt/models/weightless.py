"""Models without weights: instances whose methods are needed in a process that does not run the model."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.device.choice import building_for, provider_named
from rtp_llm.srt.distributed.parallel_state import SplitError
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import share_ropes
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.registry import reason

SMALL = 1 << 16  # values of a tensor that a constructor may read
_BY_SHAPE = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


class _LargeOnMeta(TorchFunctionMode):
    """Allocates large tensors made by shape without memory. Other tensors are normal: some constructors read them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **{**(kwargs or {}), "device": "meta"}) if func in _BY_SHAPE else None
        return made if made is not None and made.numel() > SMALL else func(*args, **(kwargs or {}))


def build_without_weights(
    model_class: type, model_config: ModelConfig, quant_config: QuantizationConfig | None = None
) -> nn.Module:
    """Build an instance with all attributes that its constructor sets, whose parameters take no memory.

    Raises:
        ModelBuildError: the class cannot be built in this way; the cause is chained.
        SplitError: it cannot be divided over the ranks of this thread's world.
    """
    modes: tuple[AbstractContextManager, ...] = (torch.device("meta"), _LargeOnMeta())
    for mode in modes:
        try:
            with mode, building_for(provider_named("reference")), share_ropes(), torch.no_grad():
                return model_class(config=model_config.hf_config, quant_config=quant_config)
        except SplitError:
            raise
        except Exception as error:  # whatever a model's constructor may raise; the cause is chained
            failure = error
    raise ModelBuildError(
        f"{model_class.__name__} cannot be built without weights, which its pad_input_ids needs, since media are put "
        f"into prompts outside of the workers: {reason(failure)}. Let its constructor read no large tensor"
    ) from failure
