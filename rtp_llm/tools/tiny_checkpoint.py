"""Tiny random checkpoints, in float32, of any causal language model that transformers has a class for.

Their weights make the answers depend on everything: norms are not one, biases and correction biases are not zero,
routers tell experts apart, and logits are not flat.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rtp_llm.tools.tiny_config import tiny_config

MOST_PARAMETERS = 30e6
CHARACTERS = [chr(code) for code in [*range(0x21, 0x7F), 0x0120, 0x010A]]  # as bytes are written: space, newline


class NotMadeError(ValueError):
    """No tiny checkpoint of the architecture can be made; the cause is chained."""


def model_class_of(architecture: str) -> type[transformers.PreTrainedModel] | None:
    """Return transformers' class of this name, or the causal language model whose name differs in case alone."""
    by_lower_case = {name.lower(): name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    for name in (architecture, by_lower_case.get(architecture.lower(), "")):
        found = getattr(transformers, name, None) if name else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None


def make_tiny_checkpoint(
    architecture: str,
    directory: str | Path,
    given: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    tokenizer: bool = False,
) -> str:
    """Write a tiny checkpoint, and return its directory.

    Args:
        given: the contents of a config.json whose structure is kept (see ``tiny_config``).
        overrides: fields of the configuration.
        tokenizer: write one, too, in which each id stands for one character, so that texts differ where ids do.

    Raises:
        NotMadeError: transformers has no such class, it refuses the small configuration, or even that is large.
    """
    model_class = model_class_of(architecture)
    if model_class is None or model_class.config_class is None:
        raise NotMadeError(f"transformers {transformers.__version__} has no model class {architecture}")
    try:
        config = tiny_config(model_class.config_class, given, overrides)
        size = _num_parameters(model_class, config)
        if size > MOST_PARAMETERS:
            raise NotMadeError(f"a small {architecture} still has {size / 1e6:.0f} million parameters")
        with torch.random.fork_rng():
            torch.manual_seed(0)  # what ``disturb`` does not set anew
            model = model_class(config).to(torch.float32)
        disturb(model)
        model.save_pretrained(directory)
    except NotMadeError:
        raise
    except Exception as error:  # whatever transformers raises over a configuration that is none of its presets
        raise NotMadeError(f"{architecture}: {type(error).__name__}: {error}") from error
    if tokenizer:
        character_tokenizer().save_pretrained(directory)
    return str(directory)


def _num_parameters(model_class: Any, config: transformers.PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters())


def disturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Give a model weights that make its answers depend on everything.

    Vectors (norms, biases) and what lies in buffers of the checkpoint, such as correction biases, stay near what they
    begin with.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.data.add_(0.2 * noise)
        elif parameter is embedding.weight:
            parameter.data.copy_(0.1 * noise)
        elif parameter is getattr(head, "weight", None):
            parameter.data.copy_(0.4 * noise)
        else:
            parameter.data.copy_(1.2 * noise / math.sqrt(parameter.shape[-1]))
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point() and len(buffer.unique()) == 1:
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))


def character_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, but ASCII's printable ones only, and no merges.

    For some model types transformers keeps only vocabulary and merges of a tokenizer; for this kind that is all.
    """
    vocabulary = ["<s>", "<|endoftext|>", "<unk>", *CHARACTERS]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>"
    )
