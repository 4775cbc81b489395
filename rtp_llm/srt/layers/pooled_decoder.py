"""Decoders with pooled outputs: any model that generates, made into one that embeds, classifies, rewards or scores."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rtp_llm.srt.layers.embedding import ParallelLMHead
from rtp_llm.srt.layers.logits_processor import LogitsProcessor
from rtp_llm.srt.layers.pooler import Pooler, classifiers, embedders

KINDS = ("embed", "classify", "reward")


class NoHead(nn.Module):
    """In place of the head of a model whose tokens nobody wants."""


def drop_heads(model: nn.Module) -> None:
    """Take the output heads out of a model that was just built, and ignore their weights. It makes no tokens then.

    A head that is the embedding as well stays.
    """
    heads = [name for name, module in model.named_modules() if isinstance(module, ParallelLMHead)]
    for name in heads:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, NoHead())
    attributes: Any = model
    attributes.ignore = [*getattr(model, "ignore", ()), *(rf"^{name}\." for name in heads)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    defaults = getattr(model, "weight_defaults", {})
    attributes.weight_defaults = {name: other for name, other in defaults.items() if name in parameters}
    attributes.generates = False


def as_pooled(model_class: type[nn.Module], kind: str, generates: bool = False) -> type[nn.Module]:
    """Return a subclass of a decoder's class with pooled outputs of the last token.

    Args:
        kind: ``embed``; or ``classify`` or ``reward``, by a layer ``score`` [num_labels, hidden_size], as in
            transformers' ...ForSequenceClassification.
        generates: it makes tokens, too, and has its head.
    """

    def __init__(self: Any, config: Any, quant_config: Any = None) -> None:
        model_class.__init__(self, config=config, quant_config=quant_config)  # type: ignore[call-arg]
        if not generates:
            drop_heads(self)
        text_config = config.get_text_config()
        if kind == "embed":
            self.poolers = embedders("last", text_config.hidden_size)
            return
        self.score = nn.Linear(text_config.hidden_size, config.num_labels, bias=False)
        self.poolers = classifiers(config, "last", self.score) if kind == "classify" else rewards(config, self.score)

    return _subclass(model_class, kind.capitalize(), __init__, generates)


def _subclass(
    model_class: type[nn.Module], kind: str, constructor: Callable[..., None], generates: bool
) -> type[nn.Module]:
    attributes: dict[str, Any] = {"__init__": constructor, "__module__": model_class.__module__, "generates": generates}
    own_forms = {"gguf": vars(model_class)["gguf"]} if "gguf" in vars(model_class) else {}  # GGUFs hold the same model
    return type(f"{model_class.__name__}To{kind}", (model_class,), attributes | own_forms)


def as_scorer(model_class: type[nn.Module], token_ids: Sequence[int], excludes: bool) -> type[nn.Module]:
    """Return a subclass of a decoder's class with the logits of some tokens behind an input as its output.

    Args:
        token_ids: the tokens.
        excludes: there are two, that do not fit and fit: the output is ``score``, the share that the second has of the
            probabilities of both, which is the sigmoid of the difference of their logits. Else each token is a label.
    """

    def __init__(self: Any, config: Any, quant_config: Any = None) -> None:
        model_class.__init__(self, config=config, quant_config=quant_config)  # type: ignore[call-arg]
        processors = [module for module in self.modules() if isinstance(module, LogitsProcessor)]
        if not processors:
            raise ValueError(f"{model_class.__name__} computes no logits by LogitsProcessor: no tokens can be scored")
        for processor in processors:
            processor.pooled_token_ids = list(token_ids)
        if excludes:
            self.poolers = {"score": Pooler("last", 1, _difference, "sigmoid")}
            return
        config.num_labels = len(token_ids)
        self.poolers = classifiers(config, "last", nn.Identity())

    return _subclass(model_class, "Score", __init__, generates=True)


def _difference(logits: torch.Tensor) -> torch.Tensor:
    """[N, 2] -> [N, 1]: the second less the first."""
    return logits[:, 1:] - logits[:, :1]


def rewards(config: Any, head: nn.Module) -> dict[str, Pooler]:
    """Return the output of a reward model: its numbers, as they are."""
    return {"reward": Pooler("last", config.num_labels, head)}
