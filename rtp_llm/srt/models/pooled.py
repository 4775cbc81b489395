"""Which class runs a checkpoint whose outputs may be pooled, and what sentence-transformers' files change of them."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import nn

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.sentence_transformers import HEAD_FILES, SentenceTransformer, SpladeModule
from rtp_llm.srt.layers.encoder_attention import sees_both_ways
from rtp_llm.srt.layers.pooled_decoder import as_pooled, as_scorer
from rtp_llm.srt.layers.pooler import (
    FINISHES,
    REDUCTIONS,
    Behind,
    EachToken,
    Pooler,
    Positions,
    Reduction,
    SideBySide,
    last_function,
)
from rtp_llm.srt.layers.splade import Splade
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.registry import ModelRegistry, UnknownArchitectureError
from rtp_llm.srt.models.sentence_layers import build_layers
from rtp_llm.srt.models.weight_files import read_weights

logger = logging.getLogger(__name__)

# Names of transformers' classes that are a decoder with a layer ``score`` in place of its head.
_SUFFIXES = {"ForSequenceClassification": "classify"}
TOKEN_HEADS = {"sparse": (HEAD_FILES[0], "relu"), "token_embed": (HEAD_FILES[1], "normalize")}
SPLADE = "splade"
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
    """Let a model's outputs be as sentence-transformers' files, or the option ``pooling``, say.

    Args:
        is_dummy: further layers get random weights.

    Raises:
        ModelBuildError: the model embeds nothing, or a layer does not fit.
    """
    poolers = dict(ModelTraits.of(model).poolers) | _token_heads(model, model_config)
    sentences, pooling = model_config.sentence_transformer or SentenceTransformer(), model_config.pooling
    attributes: Any = model
    _set_last_function(poolers, sentences)
    if pooling == SPLADE or (pooling is None and sentences.splade is not None):
        asked = sentences.splade or SpladeModule()
        attributes.poolers = {"sparse": _splade(model, poolers.get("sparse"), asked)}
        return
    if "embed" not in poolers:
        if pooling is not None:
            raise ModelBuildError(f"{type(model).__name__} makes no vectors: leave out --pooling {pooling}")
        return
    attributes.poolers = poolers
    names = (pooling,) if pooling else sentences.poolings
    token_layers, size = build_layers(sentences.token_layers, poolers["embed"].width, is_dummy)
    if token_layers is not None:
        tokens = Pooler("all", size, token_layers, "normalize", sentences.normalizes_tokens)
        attributes.poolers = poolers = {**poolers, "token_embed": tokens}
        if not names:
            del poolers["embed"]  # a model of late interaction alone
            return
    poolers["embed"] = _embed(poolers["embed"], model_config, names, token_layers, size, is_dummy)


def _embed(
    old: Pooler,
    model_config: ModelConfig,
    names: tuple[str, ...],
    token_layers: nn.Module | None,
    size: int,
    is_dummy: bool,
) -> Pooler:
    """Return the pooler of vectors of whole inputs. ``size``: of a token's state behind ``token_layers``."""
    sentences = model_config.sentence_transformer
    reduction = _reduction(names) or old.reduction
    if token_layers is not None:
        reduction = Behind(token_layers, reduction)
    width = size * len(names) if names else old.width
    if sentences is None:
        return Pooler(reduction, width, old.head, "normalize", old.is_finished)
    head, width = build_layers(sentences.layers, width, is_dummy)
    return Pooler(reduction, width, head or old.head, "normalize", sentences.normalizes)


def _set_last_function(poolers: dict[str, Pooler], sentences: SentenceTransformer) -> None:
    """Let a cross-encoder end in the function that its files name. Raise ModelBuildError for an unknown one."""
    if sentences.last_function is None:
        return
    try:
        name = last_function(sentences.last_function)
    except ValueError as error:
        raise ModelBuildError(str(error)) from error
    for task in poolers.keys() & {"classify", "score"}:
        poolers[task].finish = None if name is None else FINISHES[name]


def _splade(model: nn.Module, pooler: Pooler | None, asked: SpladeModule) -> Splade:
    if not isinstance(pooler, Splade):
        raise ModelBuildError(
            f"{type(model).__name__} has no head for masked tokens, which weights of the vocabulary are made by "
            "(SPLADE): that is for a ...ForMaskedLM"
        )
    return Splade(pooler.width, pooler.head, asked.sums, asked.twice)


class OwnTokens(EachToken):
    """All tokens but the one that the tokenizer puts before a text."""

    def __init__(self, first_id: int | None) -> None:
        self.first_id = first_id

    def positions(self, ids: npt.NDArray[np.int64]) -> Positions:
        return np.arange(int(ids[0] == self.first_id), len(ids))


def _token_heads(model: nn.Module, model_config: ModelConfig) -> dict[str, Pooler]:
    """Return the outputs of layers on each token's state that lie beside an embedder, as BGE-M3's do (Chen et al.,
    2024): ``sparse_linear.pt``, a weight for each token, and ``colbert_linear.pt``, a vector for each but the first."""
    found: dict[str, Pooler] = {}
    if "token_embed" not in ModelTraits.of(model).poolers:
        return found
    for task, (name, finish) in TOKEN_HEADS.items():
        file = Path(model_config.model_path) / name
        if not file.is_file():
            continue
        weights = dict(read_weights([file]))
        size, weight = model_config.hidden_size, weights.get("weight")
        if set(weights) != {"weight", "bias"} or weight is None or weight.ndim != 2 or weight.shape[1] != size:
            shapes = {key: list(tensor.shape) for key, tensor in weights.items()}
            raise ModelBuildError(f"{file} must have a weight [*, {size}] and a bias, not {shapes}")
        head = nn.Linear(size, len(weight), dtype=torch.float32).requires_grad_(False)
        head.load_state_dict({key: tensor.float().clone() for key, tensor in weights.items()})
        tokens = EachToken() if task == "sparse" else OwnTokens(model_config.bos_token_id)
        found[task] = Pooler(tokens, len(weight), head, finish)
    return found


def _reduction(names: tuple[str, ...]) -> Reduction | None:
    if not names:
        return None
    reductions = [REDUCTIONS[name]() for name in names]
    return reductions[0] if len(reductions) == 1 else SideBySide(reductions)
