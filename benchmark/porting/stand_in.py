"""Another class of transformers in place of an architecture that it has none for, where both compute the same.

A tiny random checkpoint of the other class is made. The same numbers, under the names and in the layout that the
architecture's published checkpoints have, and beside a config.json with the fields of those, are what a ported file
loads. The other class answers from its own checkpoint.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from regroup import Tensors
from rtp_llm.tools.tiny_checkpoint import make_tiny_checkpoint

Fields = Mapping[str, Any]
Change = Callable[[Tensors, Fields], Tensors]
SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEAD_DIM = SIZES["hidden_size"] // SIZES["num_attention_heads"]


def as_they_are(tensors: Tensors, published: Fields) -> Tensors:
    return tensors


@dataclass(frozen=True)
class StandIn:
    """What stands in for an architecture.

    Args:
        like: transformers' class, without ``ForCausalLM`` or what stands in ``head``.
        why: why it computes the same, in a line; ``source``: where that is published.
        published: a small config.json of the architecture, with the fields that published ones have, as the
            checkpoint's own configuration class writes them.
        fields: returns the configuration of transformers' class, of ``published``.
        weights: returns the architecture's tensors, of those of transformers' class.
        prepared: returns the tensors of transformers' class such as the architecture can have, of random ones.
    """

    like: str
    why: str
    source: str
    published: Fields
    fields: Callable[[Fields], dict[str, Any]]
    weights: Change = as_they_are
    prepared: Change = as_they_are
    head: str = "ForCausalLM"

    @property
    def class_name(self) -> str:
        return f"{self.like}{self.head}"

    def make(self, architecture: str, reference: Path, target: Path) -> None:
        """Write both tiny checkpoints: of transformers' class, and of the architecture.

        Raises:
            NotMadeError: transformers does not take the configuration.
        """
        make_tiny_checkpoint(self.class_name, reference, overrides=self.fields(self.published))
        made = self.prepared(load_file(reference / WEIGHTS), self.published)
        _save(made, reference)
        target.mkdir(exist_ok=True)
        config = {"architectures": [architecture], "torch_dtype": "float32", **self.published}
        (target / "config.json").write_text(json.dumps(config, indent=1))
        _save(self.weights(made, self.published), target)


WEIGHTS = "model.safetensors"


def _save(tensors: Tensors, directory: Path) -> None:
    separate = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(separate, directory / WEIGHTS, metadata={"format": "pt"})


def kept(published: Fields, *others: str) -> dict[str, Any]:
    """Return the fields that have one name everywhere, and ``others``."""
    names = (*SIZES, "rms_norm_eps", "tie_word_embeddings", *others)
    return {name: published[name] for name in names if published.get(name) is not None}


def rope(published: Fields, **more: Any) -> dict[str, Any]:
    """Return ``rope_parameters`` of ``rope_theta`` and ``rope_scaling``."""
    scaling = published.get("rope_scaling") or {}
    return {"rope_type": "default", "rope_theta": published.get("rope_theta", 10000.0), **scaling, **more}
