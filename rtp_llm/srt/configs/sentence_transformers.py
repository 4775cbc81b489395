"""What a checkpoint of sentence-transformers says beside the model: modules.json and the files that it names.

    modules.json                        the modules, in order
    1_Pooling/config.json               which hidden states make the vector
    2_Dense/config.json, weights        layers after it, as many as there are
    2_Normalize                         vectors get length one
    1_SpladePooling/config.json         how weights of the vocabulary are made
    1_LogitScore/config.json            which tokens' logits make a score (configs/score_tokens.py)
    sentence_bert_config.json           max_seq_length, do_lower_case
    config_sentence_transformers.json   prompts: texts that are put before an input

Read on the host; the weights of dense layers are read where the model is (models/pooled.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"

# Its names of poolings, old (a flag for each, concatenated in this order) and new (a name, or several) -> ours.
_POOLINGS = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt",
    "weightedmean_tokens": "weighted_mean",
    "lasttoken": "last",
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "weightedmean": "weighted_mean",
}
_ACTIVATIONS = {"Identity": None, "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "Sigmoid": "sigmoid"}


class SentenceTransformerError(ValueError):
    """The files of sentence-transformers cannot be used."""


@dataclass(frozen=True, slots=True)
class DenseModule:
    """A layer on the pooled vector. ``activation``: a name of torch.nn.functional's functions; None: none."""

    folder: str  # with its weights, linear.weight and perhaps linear.bias
    in_features: int
    out_features: int
    bias: bool
    activation: str | None


@dataclass(frozen=True, slots=True)
class SpladeModule:
    """``sums``: over the input's tokens, else the largest; ``twice``: the logarithm is taken twice."""

    sums: bool = False
    twice: bool = False


@dataclass(frozen=True, slots=True)
class SentenceTransformer:
    """The settings of a checkpoint. ``poolings``: names of layers/pooler.py's reductions, concatenated."""

    poolings: tuple[str, ...] = ()
    dense: tuple[DenseModule, ...] = ()
    normalizes: bool = False
    max_seq_length: int | None = None
    lower_case: bool = False
    splade: SpladeModule | None = None  # weights of the vocabulary are the model's only output
    score_ids: tuple[int, ...] = ()  # of tokens whose logits make a score: what does not fit, what does; or the latter
    pools_prompt: bool = True  # False: the prompt's tokens are left out of the pooling
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


def read_sentence_transformer(directory: str) -> SentenceTransformer | None:
    """Read the settings of a checkpoint; None if it is none of sentence-transformers.

    Raises:
        SentenceTransformerError: a file is broken, or asks for what is not supported.
    """
    folder = Path(directory)
    if not (folder / MODULES_FILE).is_file():
        return None
    modules = _read(folder / MODULES_FILE)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise SentenceTransformerError(f"{folder / MODULES_FILE} must hold a list of modules")
    found: dict[str, Any] = {}
    dense: list[DenseModule] = []
    for module in modules:
        kind, path = str(module.get("type", "")).rpartition(".")[2], folder / str(module.get("path", ""))
        if kind in ("Transformer", "MLMTransformer"):
            found |= _transformer(path)
        elif kind == "Pooling":
            found |= _pooling(path / "config.json")
        elif kind == "Dense":
            dense.append(_dense(path))
        elif kind == "SpladePooling":
            found["splade"] = _splade(path / "config.json")
        elif kind == "LogitScore":
            found["score_ids"] = _score_ids(path / "config.json")
        elif kind == "Normalize":
            found["normalizes"] = True
        elif kind != "Dropout":  # only for training
            raise SentenceTransformerError(f"{folder / MODULES_FILE}: the module {kind!r} is not supported")
    return SentenceTransformer(dense=tuple(dense), **found, **_prompts(folder / PROMPTS_FILE))


def _transformer(path: Path) -> dict[str, Any]:
    settings = _read_object(path / "sentence_bert_config.json", missing={})
    length = settings.get("max_seq_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise SentenceTransformerError(f"{path}/sentence_bert_config.json: max_seq_length must be positive: {length!r}")
    return {"max_seq_length": length, "lower_case": settings.get("do_lower_case") is True}


def _pooling(path: Path) -> dict[str, Any]:
    settings = _read_object(path)
    given = settings.get("pooling_mode")
    if given is None:
        names = [name for name in _POOLINGS if settings.get(f"pooling_mode_{name}") is True]
    else:
        names = list(given) if isinstance(given, list) else [given]
    unknown = [name for name in names if name not in _POOLINGS]
    if unknown or not names:
        raise SentenceTransformerError(f"{path}: poolings must be some of {list(_POOLINGS)}, not {unknown or 'none'}")
    poolings = tuple(_POOLINGS[name] for name in names)
    return {"poolings": poolings, "pools_prompt": settings.get("include_prompt") is not False}


def _dense(path: Path) -> DenseModule:
    settings = _read_object(path / "config.json")
    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise SentenceTransformerError(
            f"{path}/config.json: activation_function must be one of {list(_ACTIVATIONS)}, not {activation!r}"
        )
    source = settings.get("module_input_name", "sentence_embedding")
    if source != "sentence_embedding":
        raise SentenceTransformerError(f"{path}/config.json: a layer on {source!r} is not supported")
    try:
        sizes = int(settings["in_features"]), int(settings["out_features"])
    except (KeyError, TypeError, ValueError) as error:
        raise SentenceTransformerError(f"{path}/config.json: in_features and out_features are needed") from error
    return DenseModule(str(path), *sizes, settings.get("bias") is not False, _ACTIVATIONS[activation])


def _splade(path: Path) -> SpladeModule:
    settings = _read_object(path)
    strategy, activation = settings.get("pooling_strategy", "max"), settings.get("activation_function", "relu")
    if strategy not in ("max", "sum") or activation not in ("relu", "log1p_relu"):
        raise SentenceTransformerError(
            f"{path}: pooling_strategy must be max or sum, and activation_function relu or log1p_relu, not "
            f"{strategy!r} and {activation!r}"
        )
    return SpladeModule(sums=strategy == "sum", twice=activation == "log1p_relu")


def _score_ids(path: Path) -> tuple[int, ...]:
    settings = _read_object(path)
    given = [settings.get(name) for name in ("false_token_id", "true_token_id")]
    ids = tuple(value for value in given if isinstance(value, int) and not isinstance(value, bool))
    if len(ids) < sum(value is not None for value in given) or given[1] is None:
        raise SentenceTransformerError(f"{path}: true_token_id, and perhaps false_token_id, must be ids, not {given}")
    return ids


def _prompts(path: Path) -> dict[str, Any]:
    settings = _read_object(path, missing={})
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise SentenceTransformerError(f"{path}: prompts must be an object of texts")
    if default is not None and default not in prompts:
        raise SentenceTransformerError(f"{path}: default_prompt_name {default!r} is not among {list(prompts)}")
    return {"prompts": prompts, "default_prompt_name": default}


def _read_object(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.is_file():
        return missing
    value = _read(path)
    if not isinstance(value, dict):
        raise SentenceTransformerError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SentenceTransformerError(f"{path} cannot be read: {error}") from error
