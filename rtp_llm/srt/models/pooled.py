"""Which class runs a checkpoint whose outputs may be pooled, and what sentence-transformers' files change of them."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.sentence_transformers import DenseModule, SentenceTransformer, SpladeModule
from rtp_llm.srt.layers.encoder_attention import sees_both_ways
from rtp_llm.srt.layers.pooled_decoder import as_pooled, as_scorer
from rtp_llm.srt.layers.pooler import REDUCTIONS, EachToken, Pooler, Positions, Reduction, SideBySide
from rtp_llm.srt.layers.splade import Splade
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.registry import ModelRegistry, UnknownArchitectureError
from rtp_llm.srt.models.weight_files import find_weight_files, read_weights

logger = logging.getLogger(__name__)

# Names of transformers' classes that are a decoder with a layer ``score`` in place of its head.
_SUFFIXES = {"ForSequenceClassification": "classify"}
TOKEN_HEADS = {"sparse": ("sparse_linear.pt", "relu"), "token_embed": ("colbert_linear.pt", "normalize")}
SPLADE = "splade"
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
    poolers = dict(ModelTraits.of(model).poolers) | _token_heads(model, model_config)
    sentences, pooling = model_config.sentence_transformer, model_config.pooling
    attributes: Any = model
    if pooling == SPLADE or (pooling is None and sentences is not None and sentences.splade is not None):
        asked = SpladeModule() if sentences is None or sentences.splade is None else sentences.splade
        attributes.poolers = {"sparse": _splade(model, poolers.get("sparse"), asked)}
        return
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
    attributes.poolers = {
        **poolers,
        "embed": Pooler(reduction, width, head or old.head, "normalize", is_finished),
    }


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
