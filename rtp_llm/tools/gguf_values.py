"""The values of a GGUF's weights under a checkpoint's names: what a reference without kernels for blocks is made of."""

import torch

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.kernels.block_tensor import BlockTensor
from rtp_llm.srt.models.gguf_weights import gguf_weights
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.models.weight_files import find_weight_files
from rtp_llm.srt.models.weightless import build_without_weights


def gguf_values(folder: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the weights of a GGUF's checkpoint folder, computed, with what the converter changed undone.

    Raises:
        GGUFError, ModelBuildError: the file or the model class cannot be used.
    """
    config = ModelConfig.from_pretrained(folder)
    model_class, _ = ModelRegistry.resolve_model_cls(config.architectures)
    model = build_without_weights(model_class, config)
    weights = gguf_weights(find_weight_files(folder, "gguf"), model, config)
    return {
        name: tensor.values(dtype) if isinstance(tensor, BlockTensor) else tensor.to(dtype, copy=True)
        for name, tensor in weights
    }
