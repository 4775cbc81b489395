"""Which class runs a checkpoint whose outputs may be pooled, and what sentence-transformers' files change of them."""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.sentence_transformers import DenseModule, SentenceTransformer
from rtp_llm.srt.layers.encoder_attention import sees_both_ways
from rtp_llm.srt.layers.pooled_decoder import as_pooled, as_scorer
from rtp_llm.srt.layers.pooler import REDUCTIONS, Pooler, Reduction, SideBySide
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.registry import ModelRegistry, UnknownArchitectureError
from rtp_llm.srt.models.weight_files import find_weight_files, read_weights

logger = logging.getLogger(__name__)

# Names of transformers' classes that are a decoder with a layer ``score`` in place of its head.
_SUFFIXES = {"ForSequenceClassification": "classify"}
_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid}
TOKENIZER_FILE = "tokenizer.json"
_WITH_HEAD = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def pooled_class(model_config: ModelConfig) -> type[nn.Module]:
    """Return the class for a checkpoint: its model file's, or one made of it that has pooled outputs.

    Raises:
        UnknownArchitectureError, ModelImportError: as ModelRegistry.resolve_model_cls.
        ModelBuildError: the model cannot be converted as asked.
    """
    names, convert = model_config.architectures, model_config.convert
    try:
        model_class, _ = ModelRegistry.resolve_model_cls(names)
    except UnknownArchitectureError:
        of_decoder = _of_decoder(model_config)
        if of_decoder is None:
            raise
        return of_decoder
    if not ModelTraits.of(model_class).generates:
        if convert not in ("auto", "none"):
            raise ModelBuildError(f"{model_class.__name__} has outputs of its own: leave out --convert {convert}")
        return model_class
    if model_config.score_tokens is not None:
        return _scorer(model_class, model_config)
    if sees_both_ways(model_config.hf_text_config):
        return as_pooled(model_class, "embed" if convert in ("auto", "none") else convert)
    if convert == "auto":
        sentences = model_config.sentence_transformer
        return as_pooled(model_class, "embed") if sentences is not None and sentences.poolings else model_class
    if convert == "none":
        return model_class
    return as_pooled(model_class, convert, generates=convert == "embed" and names[0].endswith(_WITH_HEAD))


def _of_decoder(model_config: ModelConfig) -> type[nn.Module] | None:
    """Return the class of an architecture without a file of its own, made of its decoder's; None if there is none."""
    names, convert = model_config.architectures, model_config.convert
    for name in names:
        for suffix, kind in _SUFFIXES.items():
            if not name.endswith(suffix) or convert == "none":
                continue
            decoders = [name.removesuffix(suffix) + ending for ending in _WITH_HEAD]
            decoder = next((decoder for decoder in decoders if ModelRegistry.is_arch_supported(decoder)), None)
            if decoder is not None:
                logger.info("%s runs as %s with another head", name, decoder)
                if model_config.score_tokens is not None:
                    return _scorer(ModelRegistry.models[decoder], model_config)
                return as_pooled(ModelRegistry.models[decoder], kind if convert == "auto" else convert)
    return None


def _scorer(model_class: type[nn.Module], model_config: ModelConfig) -> type[nn.Module]:
    """Return a class that scores by the tokens that the configuration names.

    Raises:
        ModelBuildError: a token is not in the vocabulary.
    """
    asked = model_config.score_tokens
    assert asked is not None
    file = Path(model_config.model_path) / TOKENIZER_FILE
    texts = [token for token in asked.tokens if isinstance(token, str)]
    if texts and not file.is_file():
        raise ModelBuildError(f"{file} is needed to find the tokens {texts}; or name them by their ids")
    vocabulary = Tokenizer.from_file(str(file)) if texts else None
    ids: list[int] = []
    for token in asked.tokens:
        token_id = vocabulary.token_to_id(token) if isinstance(token, str) and vocabulary else token
        if not isinstance(token_id, int) or not 0 <= token_id < model_config.vocab_size:
            raise ModelBuildError(f"classifier_from_token: {token!r} is no token of the model's vocabulary")
        ids.append(token_id)
    logger.info("scores are made of the logits of %s (%s)", ", ".join(map(repr, asked.tokens)), ids)
    return as_scorer(model_class, ids, asked.excludes)


def set_pooling(model: nn.Module, model_config: ModelConfig, is_dummy: bool = False) -> None:
    """Let a model embed as sentence-transformers' files, or the option ``pooling``, say.

    Args:
        is_dummy: dense layers get random weights.

    Raises:
        ModelBuildError: the model embeds nothing, or a dense layer does not fit.
    """
    poolers = dict(ModelTraits.of(model).poolers)
    sentences, pooling = model_config.sentence_transformer, model_config.pooling
    if "embed" not in poolers:
        if pooling is not None:
            raise ModelBuildError(f"{type(model).__name__} makes no vectors: leave out --pooling {pooling}")
        return
    names = (pooling,) if pooling else () if sentences is None else sentences.poolings
    old: Pooler = poolers["embed"]
    reduction = _reduction(names) or old.reduction
    width = old.width * max(1, len(names))
    head: nn.Module | None = None
    if sentences is not None and sentences.dense:
        head = nn.Sequential(*(_dense(dense, is_dummy) for dense in sentences.dense))
        _check_sizes(sentences, width)
        width = sentences.dense[-1].out_features
    is_finished = old.is_finished if sentences is None else sentences.normalizes
    attributes: Any = model
    attributes.poolers = {
        **poolers,
        "embed": Pooler(reduction, width, head or old.head, "normalize", is_finished),
    }


def _reduction(names: tuple[str, ...]) -> Reduction | None:
    if not names:
        return None
    reductions = [REDUCTIONS[name]() for name in names]
    return reductions[0] if len(reductions) == 1 else SideBySide(reductions)


def _check_sizes(sentences: SentenceTransformer, width: int) -> None:
    for dense in sentences.dense:
        if dense.in_features != width:
            raise ModelBuildError(f"{dense.folder} takes vectors of {dense.in_features} components, but gets {width}")
        width = dense.out_features


class Dense(nn.Module):
    """A layer of sentence-transformers on pooled vectors."""

    def __init__(self, module: DenseModule) -> None:
        super().__init__()
        self.linear = nn.Linear(module.in_features, module.out_features, module.bias, dtype=torch.float32)
        self.activation = module.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        return x if self.activation is None else _ACTIVATIONS[self.activation](x)


def _dense(module: DenseModule, is_dummy: bool) -> Dense:
    layer = Dense(module).requires_grad_(False)
    if is_dummy:
        return layer
    weights = dict(read_weights(find_weight_files(module.folder, "auto")))
    expected = layer.state_dict()
    if {name: tensor.shape for name, tensor in weights.items()} != {n: t.shape for n, t in expected.items()}:
        raise ModelBuildError(
            f"{Path(module.folder)} must have the weights {sorted(expected)} of its config.json, not {sorted(weights)}"
        )
    layer.load_state_dict({name: tensor.float().clone() for name, tensor in weights.items()})
    return layer
