"""What a checkpoint of sentence-transformers says beside the model: modules.json and the files that it names.

    modules.json                        the modules, in order
    1_Pooling/config.json               which hidden states make the vector
    2_Dense/config.json, weights        layers after it, as many as there are; LayerNorm likewise
    2_Normalize                         vectors get length one
    1_SpladePooling/config.json         how weights of the vocabulary are made
    1_LogitScore/config.json            which tokens' logits make a score (configs/score_tokens.py)
    sentence_bert_config.json           max_seq_length, do_lower_case
    tokenizer_config.json               model_max_length, which is max_seq_length since version 6
    config_sentence_transformers.json   prompts: texts that are put before an input; a classifier's last function

The model's own files may be in a folder, 0_Transformer, as older versions wrote them. Read on the host; the weights of
layers are read where the model is (models/pooled.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

MODULES_FILE = "modules.json"
CONFIG_FILE = "config.json"
PROMPTS_FILE = "config_sentence_transformers.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
HEAD_FILES = ("sparse_linear.pt", "colbert_linear.pt")  # BGE-M3's further heads, which no module names
# Names of the file about the model, of which a checkpoint has one.
TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

_PACKAGE = "sentence_transformers"
_TRANSFORMERS = ("Transformer", "MLMTransformer")
_WITH_WEIGHTS = (*_TRANSFORMERS, "Dense", "LayerNorm")
_SENTENCE, _TOKENS = "sentence_embedding", "token_embeddings"  # what a module reads and writes
_NO_LIMIT = 1 << 30  # tokens; transformers writes 1e30 where there is no limit

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
# Classes of torch.nn -> names of torch.nn.functional's functions.
_ACTIVATIONS = {
    "Identity": None,
    "Tanh": "tanh",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Mish": "mish",
    "ELU": "elu",
    "SELU": "selu",
    "CELU": "celu",
    "Sigmoid": "sigmoid",
    "Hardtanh": "hardtanh",
    "Hardswish": "hardswish",
    "Softplus": "softplus",
    "Softsign": "softsign",
}


class SentenceTransformerError(ValueError):
    """The files of sentence-transformers cannot be used."""


@dataclass(frozen=True, slots=True)
class DenseModule:
    """A layer on vectors.

    ``activation``: a name of torch.nn.functional's functions; None: none. ``residual``: what the layer reads is added
    to what it gives, through a projection without bias if its size is another.
    """

    folder: str  # with its weights, linear.weight and perhaps linear.bias and residual.weight
    in_features: int
    out_features: int
    bias: bool
    activation: str | None
    residual: bool = False


@dataclass(frozen=True, slots=True)
class LayerNormModule:
    folder: str  # with its weights, norm.weight and norm.bias
    size: int


@dataclass(frozen=True, slots=True)
class UnitLength:
    """Vectors get length one before what follows."""


@dataclass(frozen=True, slots=True)
class FirstComponents:
    """Vectors are cut to their first ``count`` components."""

    count: int


Layer = DenseModule | LayerNormModule | UnitLength | FirstComponents


@dataclass(frozen=True, slots=True)
class SpladeModule:
    """``sums``: over the input's tokens, else the largest; ``twice``: the logarithm is taken twice."""

    sums: bool = False
    twice: bool = False


@dataclass(frozen=True, slots=True)
class SentenceTransformer:
    """The settings of a checkpoint. ``poolings``: names of layers/pooler.py's reductions, concatenated."""

    poolings: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()  # on the pooled vector
    normalizes: bool = False  # in the end
    token_layers: tuple[Layer, ...] = ()  # on the tokens' states, before the pooling
    normalizes_tokens: bool = False  # behind them
    max_seq_length: int | None = None
    lower_case: bool = False
    takes_messages: bool = False  # an embedder whose texts are messages of a conversation (``modality_config``)
    splade: SpladeModule | None = None  # weights of the vocabulary are the model's only output
    score_ids: tuple[int, ...] = ()  # of tokens whose logits make a score: what does not fit, what does; or the latter
    last_function: str | None = None  # of a classifier: the name of a class of torch.nn, in place of config.json's
    pools_prompt: bool = True  # False: the prompt's tokens are left out of the pooling
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


def transformer_folder(directory: str) -> str:
    """Return the folder of the model's own files: the directory itself, or the one that modules.json names.

    Raises:
        SentenceTransformerError: the checkpoint has no model that is served.
    """
    folder = Path(directory)
    if (folder / CONFIG_FILE).is_file() or not (folder / MODULES_FILE).is_file():
        return directory
    kinds = []
    for module in _modules(folder):
        kinds.append(kind := str(module.get("type")))
        path = folder / str(module.get("path", ""))
        if kind.rpartition(".")[2] in _TRANSFORMERS and (path / CONFIG_FILE).is_file():
            return str(path)
    raise SentenceTransformerError(
        f"{folder / MODULES_FILE} names no module Transformer with a {CONFIG_FILE}: models of {', '.join(kinds)} are "
        "not supported"
    )


def folders_of_layers(directory: str) -> list[str]:
    """Return the paths, relative to the directory, of modules that have weights of their own, none for the directory
    itself; [] if there is no modules.json, or a broken one."""
    try:
        modules = _modules(Path(directory)) if Path(directory, MODULES_FILE).is_file() else []
    except SentenceTransformerError:
        return []  # what is wrong is told when the files are read
    with_weights = (module for module in modules if str(module.get("type")).rpartition(".")[2] in _WITH_WEIGHTS)
    return [path for module in with_weights if (path := str(module.get("path", "")))]


def read_sentence_transformer(directory: str) -> SentenceTransformer | None:
    """Read the settings of a checkpoint; None if it is none of sentence-transformers.

    Args:
        directory: of the model's own files.

    Raises:
        SentenceTransformerError: a file is broken, or asks for what is not supported.
    """
    folder = Path(directory)
    if not (folder / MODULES_FILE).is_file():
        folder = folder.parent
        names = [str(module.get("path", "")) for module in _modules(folder)] if _has_parts(folder) else []
        if Path(directory).name not in names:
            return None
    found: dict[str, Any] = {}
    before: list[Layer] = []  # on the tokens' states
    after: list[Layer] = []
    for module in _modules(folder):
        kind, path = _kind(module, folder), folder / str(module.get("path", ""))
        if kind in _TRANSFORMERS:
            found |= _transformer(path)
        elif kind == "Pooling":
            found |= _pooling(path / CONFIG_FILE)
        elif kind in ("Dense", "LayerNorm", "Normalize"):
            is_of_tokens, layer = _layer(kind, path)
            if is_of_tokens and found.get("poolings"):
                raise SentenceTransformerError(f"{path}: a layer on tokens behind the pooling is not supported")
            (before if is_of_tokens else after).append(layer)
        elif kind == "SpladePooling":
            found["splade"] = _splade(path / CONFIG_FILE)
        elif kind == "LogitScore":
            found["score_ids"] = _score_ids(path / CONFIG_FILE)
        elif kind == "MultiVectorMask":
            _check_mask(path / CONFIG_FILE)
        elif kind != "Dropout":  # only for training
            raise SentenceTransformerError(f"{folder / MODULES_FILE}: the module {kind!r} is not supported")
    found["takes_messages"] = found.get("takes_messages", False) and "poolings" in found  # pairs have their template
    settings = _read_object(folder / PROMPTS_FILE, missing={})
    size = settings.get("truncate_dim")
    if size is not None:
        after.append(FirstComponents(_positive(size, f"{folder / PROMPTS_FILE}: truncate_dim")))
    found["layers"], found["normalizes"] = _split_end(after)
    found["token_layers"], found["normalizes_tokens"] = _split_end(before)
    return SentenceTransformer(**found, **_prompts(settings, folder / PROMPTS_FILE))


def _has_parts(folder: Path) -> bool:
    return (folder / MODULES_FILE).is_file() and not (folder / CONFIG_FILE).is_file()


def _modules(folder: Path) -> list[dict[str, Any]]:
    modules = _read(folder / MODULES_FILE)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise SentenceTransformerError(f"{folder / MODULES_FILE} must hold a list of modules")
    for module in modules:
        path = PurePosixPath(str(module.get("path", "")))
        if path.is_absolute() or ".." in path.parts:
            raise SentenceTransformerError(f"{folder / MODULES_FILE}: the path {str(path)!r} leaves the checkpoint")
    return modules


def _kind(module: Mapping[str, Any], folder: Path) -> str:
    """Return the name of a module's class.

    Raises:
        SentenceTransformerError: it is another package's, or the checkpoint's own, and may compute anything.
    """
    name = str(module.get("type", ""))
    package, _, kind = name.rpartition(".")
    if package.partition(".")[0] not in ("", _PACKAGE):
        raise SentenceTransformerError(
            f"{folder / MODULES_FILE}: the module {name!r} is none of sentence-transformers': it is not supported. "
            "Without that file the model gives its own outputs; --pooling names the states that are read"
        )
    return kind


def _split_end(layers: list[Layer]) -> tuple[tuple[Layer, ...], bool]:
    """Return the layers without those at the end that make vectors of length one, and whether there was one."""
    kept = list(layers)
    while kept and isinstance(kept[-1], UnitLength):
        kept.pop()
    return tuple(kept), len(kept) < len(layers)


def _transformer(path: Path) -> dict[str, Any]:
    name = next((name for name in TRANSFORMER_FILES if (path / name).is_file()), TRANSFORMER_FILES[0])
    settings = _read_object(path / name, missing={})
    _check_transformer(settings, path / name)
    length = settings.get("max_seq_length")
    lengths = [] if length is None else [_positive(length, f"{path / name}: max_seq_length")]
    for key in ("tokenizer_args", "processor_kwargs"):
        length = _object(settings, key, path / name).get("model_max_length")
        lengths += [] if length is None else [_positive(length, f"{path / name}: {key}.model_max_length")]
    if not lengths:
        length = _read_object(path / TOKENIZER_CONFIG_FILE, missing={}).get("model_max_length")
        if isinstance(length, int) and not isinstance(length, bool) and 0 < length < _NO_LIMIT:
            lengths = [length]
    calls = _object(settings, "processing_kwargs", path / name)
    length = _object(calls, "text", path / name).get("max_length")
    lengths += [] if length is None else [_positive(length, f"{path / name}: processing_kwargs.text.max_length")]
    return {
        "max_seq_length": min(lengths, default=None),
        "lower_case": settings.get("do_lower_case") is True,
        "takes_messages": "message" in _object(settings, "modality_config", path / name),
    }


def _check_transformer(settings: Mapping[str, Any], file: Path) -> None:
    """Raise SentenceTransformerError for what changes an input before the model, or reads another output of it."""
    expansion = settings.get("query_expansion")
    if expansion:
        raise SentenceTransformerError(f"{file}: query_expansion, queries made longer, is not supported: {expansion}")
    modalities = _object(settings, "modality_config", file)
    text = modalities.get("text")
    if isinstance(text, dict) and text.get("method", "forward") != "forward":
        raise SentenceTransformerError(
            f"{file}: texts are read by the model's method {text['method']!r}; only 'forward' is supported"
        )


def _check_mask(path: Path) -> None:
    settings = _read_object(path, missing={})
    for name in ("skiplist_words", "keep_only_token_ids"):
        if settings.get(name):
            raise SentenceTransformerError(f"{path}: {name}, tokens without a vector, is not supported")


def _pooling(path: Path) -> dict[str, Any]:
    settings = _read_object(path)
    given = settings.get("pooling_mode")
    if given is None:
        names = [name for name in _POOLINGS if settings.get(f"pooling_mode_{name}") is True] or ["mean"]
    else:
        names = list(given) if isinstance(given, list) else [given]
    unknown = [name for name in names if name not in _POOLINGS]
    if unknown or not names:
        raise SentenceTransformerError(f"{path}: poolings must be some of {list(_POOLINGS)}, not {unknown or 'none'}")
    poolings = tuple(_POOLINGS[name] for name in names)
    pools_prompt = settings.get("include_prompt") is not False
    if not pools_prompt and "weighted_mean" in poolings:
        raise SentenceTransformerError(f"{path}: include_prompt false is not supported for a weighted mean")
    return {"poolings": poolings, "pools_prompt": pools_prompt}


def _layer(kind: str, path: Path) -> tuple[bool, Layer]:
    """Return whether a module works on tokens' states, and the module."""
    file = path / CONFIG_FILE
    settings = _read_object(file, missing={} if kind == "Normalize" else None)
    source = settings.get("module_input_name", _SENTENCE)
    target = settings.get("module_output_name") or source
    if source not in (_SENTENCE, _TOKENS) or target != source:
        raise SentenceTransformerError(f"{file}: a layer from {source!r} to {target!r} is not supported")
    made: Layer
    if kind == "Normalize":
        made = UnitLength()
    elif kind == "LayerNorm":
        made = LayerNormModule(str(path), _positive(settings.get("dimension"), f"{file}: dimension"))
    else:
        made = _dense(settings, path)
    return source == _TOKENS, made


def _dense(settings: Mapping[str, Any], path: Path) -> DenseModule:
    file = path / CONFIG_FILE
    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise SentenceTransformerError(
            f"{file}: activation_function must be one of {list(_ACTIVATIONS)}, not {activation!r}"
        )
    try:
        sizes = int(settings["in_features"]), int(settings["out_features"])
    except (KeyError, TypeError, ValueError) as error:
        raise SentenceTransformerError(f"{file}: in_features and out_features are needed") from error
    has_bias, residual = settings.get("bias") is not False, settings.get("use_residual") is True
    return DenseModule(str(path), *sizes, has_bias, _ACTIVATIONS[activation], residual)


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


def _prompts(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise SentenceTransformerError(f"{path}: prompts must be an object of texts")
    if default is not None and default not in prompts:
        raise SentenceTransformerError(f"{path}: default_prompt_name {default!r} is not among {list(prompts)}")
    function = settings.get("activation_fn")
    if function is not None and not isinstance(function, str):
        raise SentenceTransformerError(f"{path}: activation_fn must be the name of a class, not {function!r}")
    return {"prompts": prompts, "default_prompt_name": default, "last_function": function}


def _positive(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SentenceTransformerError(f"{what} must be a positive integer, not {value!r}")
    return value


def _object(settings: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """Return the object under a key; {} if there is none."""
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise SentenceTransformerError(f"{path}: {key} must be an object, not {type(value).__name__}")
    return value or {}


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
