"""The tokenizer of a tokenizer.json in the memory that its tables take.

The library's own reader makes a tree of the file, between whose freed nodes the vocabulary's texts stay: for 262,144
tokens 25 to 35 MiB that the system does not get back. Here the texts are copied from Python's objects, which are freed
whole.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

_OPTIONS = (  # of a BPE model, as the file and the library both call them
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip


def read_compactly(path: Path) -> Tokenizer:
    """Return what ``Tokenizer.from_file`` returns.

    Raises:
        ValueError, LookupError, TypeError: the file is not a tokenizer's.
    """
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content["model"]["type"] != "BPE":
        return Tokenizer.from_file(str(path))
    model, added = _bpe(content["model"]), content["added_tokens"]
    content["model"] |= {"vocab": {}, "merges": []}
    content["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.model = model
    ids = [token.pop("id") for token in added]
    tokenizer.add_tokens([AddedToken(**token) for token in added])
    if [tokenizer.token_to_id(token["content"]) for token in added] != ids:
        raise ValueError(f"{path}: ids of added tokens are neither the vocabulary's nor follow it")
    return tokenizer


def _bpe(model: dict[str, Any]) -> Any:
    merges = model["merges"]
    for i, pair in enumerate(merges):  # one by one, since all of them twice would take tens of MB
        merges[i] = tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
    return models.BPE(model["vocab"], merges, **{name: model[name] for name in _OPTIONS if model.get(name) is not None})


class CompactTokenizer(PreTrainedTokenizerFast):
    """transformers' tokenizer around ``read_compactly``."""

    def __init__(self, *args: Any, tokenizer_file: str, **kwargs: Any) -> None:
        self._tokenizer = read_compactly(Path(tokenizer_file))
        super().__init__(*args, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leave the reading to the constructor."""
        return kwargs
