"""Decoders with pooled outputs: any model that generates, made into one that embeds, classifies or rewards."""

from typing import Any

from torch import nn

from rtp_llm.srt.layers.embedding import ParallelLMHead
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

    name = f"{model_class.__name__}To{kind.capitalize()}"
    attributes = {"__init__": __init__, "__module__": model_class.__module__}
    own_forms = {"gguf": vars(model_class)["gguf"]} if "gguf" in vars(model_class) else {}  # GGUFs hold the same model
    return type(name, (model_class,), attributes | own_forms)


def rewards(config: Any, head: nn.Module) -> dict[str, Pooler]:
    """Return the output of a reward model: its numbers, as they are."""
    return {"reward": Pooler("last", config.num_labels, head)}
