"""Tokenizers of checkpoints that bring a sentencepiece model only (``tokenizer.model``): the same ids.

transformers makes such a tokenizer from the pieces, by the rules of the class that tokenizer_config.json names. If
it names none, the space before the text is lost; and no class reads how the model treats white space, or its kind.
So the rules are taken from the model here.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_GENERAL_CLASSES = ("TokenizersBackend", "LlamaTokenizer")  # other classes have ids and rules of their own
_SPACE = "▁"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of pieces
_UNIGRAM, _BPE = 1, 2  # kinds of models
_NEVER = -1e6  # the score of pieces that never match text


def follow_sentencepiece(tokenizer: Any) -> None:
    """Make a tokenizer loaded by transformers encode exactly as its sentencepiece model does.

    Do nothing if the ids are not that model's: there is a tokenizer.json, or a class with rules of its own.
    """
    path = Path(getattr(tokenizer, "vocab_file", None) or "")
    if type(tokenizer).__name__ not in _GENERAL_CLASSES or path.suffix != ".model":
        return
    proto = None if (path.parent / "tokenizer.json").exists() else read_model(path)
    if proto is None or proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        return
    backend: Tokenizer = tokenizer.backend_tokenizer
    names = {token_id: token for token, token_id in backend.get_vocab(with_added_tokens=False).items()}
    pieces = [(names.get(i, piece.piece), piece.score, piece.type) for i, piece in enumerate(proto.pieces)]
    settings = _settings(path.parent)  # the object does not separate defaults from settings
    has_prefix = proto.normalizer_spec.add_dummy_prefix and settings.get("add_prefix_space") is not False
    backend.model = _model(proto.trainer_spec, pieces)
    _set_spaces(backend, proto.normalizer_spec, has_prefix, only_first=settings.get("legacy") is False)
    backend.decoder = _decoder(has_prefix)
    _add_symbols(backend, pieces)


def named_symbols(directory: str) -> dict[str, str]:
    """Return the special tokens that tokenizer_config.json leaves empty, as conversions of 2023 did.

    transformers fails on an empty name; the sentencepiece model has the right one.
    """
    settings = _settings(Path(directory))
    empty = [key for key in ("bos_token", "eos_token", "unk_token") if settings.get(key) == ""]
    path = Path(directory) / "tokenizer.model"
    proto = read_model(path) if empty and path.is_file() else None
    return {} if proto is None else {key: getattr(proto.trainer_spec, key.replace("token", "piece")) for key in empty}


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_model(path: Path) -> Any:
    """Return the sentencepiece ModelProto of a file; None if it holds something else, or nothing."""
    messages: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's DecodeError, whose module depends on its version
        return None
    return proto if proto.pieces else None


def _model(spec: Any, pieces: list[tuple[str, float, int]]) -> Any:
    if spec.model_type == _UNIGRAM:
        vocab = [(name, score if kind in (_NORMAL, _USER_DEFINED) else _NEVER) for name, score, kind in pieces]
        return models.Unigram(vocab, spec.unk_id, spec.byte_fallback)
    return models.BPE(
        {name: i for i, (name, *_) in enumerate(pieces)},
        merges_of(pieces),
        unk_token=pieces[spec.unk_id][0] if 0 <= spec.unk_id < len(pieces) else None,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def merges_of(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that form another, best score of the result first, as sentencepiece merges."""
    ids = {name: i for i, (name, _, kind) in enumerate(pieces) if kind in (_NORMAL, _USER_DEFINED)}
    pairs = []
    for name, i in ids.items():
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in ids and right in ids:
                pairs.append((-pieces[i][1], ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(pairs)]


def _set_spaces(backend: Tokenizer, spec: Any, has_prefix: bool, only_first: bool) -> None:
    """Set how text is normalised before it is cut into pieces.

    ``only_first``: the prefix stands before the first of the parts that special tokens separate, not before each.
    """
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")]
    if has_prefix and not only_first:
        steps.append(normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    scheme = "first" if has_prefix and only_first else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)


def _decoder(has_prefix: bool) -> Any:
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)


def _add_symbols(backend: Tokenizer, pieces: list[tuple[str, float, int]]) -> None:
    """Add symbols that are one token wherever they stand; those with spaces are merged like other pieces."""
    known = {str(token) for token in backend.get_added_tokens_decoder().values()}
    for name, _, kind in pieces:
        if name in known or _SPACE in name:
            continue
        if kind == _CONTROL:
            backend.add_special_tokens([AddedToken(name, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(name, normalized=False, special=False)])
