"""Which of transformers' classes run as encoders by its own code, and the check that they can."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from rtp_llm.srt.layers.fallback.masks import UnservableModelError
from rtp_llm.srt.layers.fallback.proof import TOLERANCE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBED, CLASSIFY, TOKEN_CLASSIFY = "embed", "classify", "token_classify"
_TEXT_ENCODERS = ("T5EncoderModel", "UMT5EncoderModel", "MT5EncoderModel")  # in no table of classes
CHECKED_LENS = (12, 9, 12, 1)
LONGEST_TRIED = 1024  # tokens of the input that is tried, if a model has learned positions
POSITIONS = ("wpe", "embed_positions", "position_embedding", "position_embeddings")  # names of learned positions
# Arguments of what a model reads besides texts, or keeps of earlier ones -> what that is.
UNSERVED = {
    "mems": "keeps states of earlier inputs",
    "past_buckets_states": "keeps states of earlier inputs",
    "bbox": "reads where words stand on a page",
    "pixel_values": "reads images beside the text",
    "visual_embeds": "reads images beside the text",
    "input_features": "reads sound beside the text",
    "input_shape_ids": "reads shapes and sounds of characters",
    "xpath_tags_seq": "reads where text stands in a document",
    "decoder_input_ids": "has an encoder and a decoder",
}


def encoder_kind(names: Sequence[str]) -> tuple[str, str] | None:
    """Return the first of these names that is a class of transformers without text as its output, and its output; None
    if there is none."""
    for name in names:
        for kind, known in _KINDS.items():
            if name in known:
                return name, kind
    return None


def _names(*tables: Mapping[str, Any]) -> Iterator[str]:
    for table in tables:
        for value in table.values():
            yield from (value,) if isinstance(value, str) else value


_GENERATING = set(_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
_KINDS = {
    EMBED: {*_names(MODEL_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES), *_TEXT_ENCODERS} - _GENERATING,
    CLASSIFY: set(_names(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)),
    TOKEN_CLASSIFY: set(_names(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES)),
}


def build_encoder(config: "PretrainedConfig", name: str) -> PreTrainedModel:
    """Build transformers' class on the default device, in the default dtype.

    Raises:
        UnservableModelError: it reads something else than one text's ids, or keeps something between inputs.
    """
    config.dtype = torch.get_default_dtype()
    model: PreTrainedModel = getattr(transformers, name)(config)
    arguments = inspect.signature(model.forward).parameters
    if model.main_input_name != "input_ids" or "input_ids" not in arguments:
        raise UnservableModelError(f"{name} reads {model.main_input_name}, and no ids of text")
    for argument, meaning in UNSERVED.items():
        if argument in arguments:
            raise UnservableModelError(f"{name} {meaning} ({argument}), which is not done here")
    if hasattr(config, "type_vocab_sizes"):
        raise UnservableModelError(
            f"{name} reads cells of tables by several types of each token (type_vocab_sizes), which is not done here"
        )
    return model


def is_decoder(model_type: str) -> bool:
    """Return whether models of a type make text alone."""
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def max_positions(model: nn.Module) -> int | None:
    """Return how many tokens have a learned position; None: positions are not learned.

    A table of positions with a padding index (RoBERTa, 2019) begins behind that, one with an offset (BART, 2019) there.
    """
    counts = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] in POSITIONS and isinstance(weight, torch.Tensor) and weight.dim() == 2:
            padding, offset = getattr(module, "padding_idx", None), getattr(module, "offset", None)
            first = offset if isinstance(offset, int) else 0 if padding is None else padding + 1
            counts.append(len(weight) - first)
        places = getattr(module, "position_ids", None)
        if isinstance(places, torch.Tensor):
            counts.append(places.shape[-1])
    return min(counts, default=None)


class EncoderRun:
    """Runs a model on rows of several lengths: those of one length together, none padded.

    Args:
        kind: EMBED, CLASSIFY or TOKEN_CLASSIFY.
    """

    def __init__(self, model: PreTrainedModel, kind: str) -> None:
        self.kind = kind
        self.model = model.base_model if kind == EMBED else model
        arguments = inspect.signature(self.model.forward).parameters
        self._takes = {name for name in ("attention_mask", "token_type_ids", "use_cache") if name in arguments}

    def __call__(self, input_ids: torch.Tensor, lengths: Sequence[int], types: torch.Tensor | None) -> torch.Tensor:
        """Return a line for each token [T, size]: its hidden state, its logits, or those of its whole row.

        Args:
            input_ids: [T], of all rows.
            types: [T], of tokens of pairs, or None.
        """
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        of_length = torch.tensor(lengths)
        found: torch.Tensor | None = None
        for length in sorted(set(lengths)):
            tokens = (starts[of_length == length, None] + torch.arange(length)).to(input_ids.device)
            lines = self._rows(input_ids[tokens], None if types is None else types[tokens])
            if found is None:
                found = lines.new_empty(len(input_ids), lines.shape[-1])
            found[tokens.flatten()] = lines.flatten(0, 1)
        assert found is not None
        return found

    def _rows(self, ids: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        """[n, length] -> [n, length, size]."""
        given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        if types is not None:
            given["token_type_ids"] = types
        output = self.model(input_ids=ids, **{name: given[name] for name in given if name in self._takes})
        if self.kind == EMBED:
            lines = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        else:
            lines = output.logits[:, None].expand(-1, ids.shape[1], -1) if self.kind == CLASSIFY else output.logits
        if lines.dim() != 3 or lines.shape[:2] != ids.shape:
            raise UnservableModelError(
                f"{type(self.model).__name__} makes an output of shape {list(lines.shape)} of inputs of shape "
                f"{list(ids.shape)}: no line for each token"
            )
        return lines

    def check(self, config: "PretrainedConfig", longest: int | None) -> None:
        """Make sure that what a row gets does not depend on the others of a step, nor on earlier ones.

        Raises:
            UnservableModelError: it does, or the model cannot compute plain ids.
        """
        device = next(self.model.parameters()).device
        sequences = _sequences(config, CHECKED_LENS, device)
        name = type(self.model).__name__
        try:
            alone = torch.cat([self(ids, [len(ids)], None) for ids in sequences]).float()
            together = self(torch.cat(sequences), CHECKED_LENS, None).float()
            if longest is not None and longest <= LONGEST_TRIED:
                [ids] = _sequences(config, (longest,), device)
                self(ids, (longest,), None)
        except UnservableModelError:
            raise
        except Exception as error:  # whatever transformers' code raises on inputs that it does not take
            reason = " ".join(str(error).split())[:300]
            raise UnservableModelError(
                f"{name} cannot compute plain texts' ids: {type(error).__name__}: {reason}"
            ) from error
        size = alone.norm(dim=-1).clamp(min=1e-6)
        worst = float(((together - alone).norm(dim=-1) / size).max().nan_to_num(torch.inf))
        if not worst <= TOLERANCE[self.model.dtype]:
            raise UnservableModelError(
                f"{name}: what it computes for inputs together differs by {worst:.2g} of its size from what it does "
                "for each alone: something in it depends on other inputs"
            )


def _sequences(config: "PretrainedConfig", lengths: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """Return sequences of random ids, none of them special."""
    config = config.get_text_config()
    special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "cls", "sep", "mask")}
    ids = [i for i in range(min(config.vocab_size, 4096)) if i not in special]
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(len(ids), (sum(lengths),), generator=generator, device="cpu")
    return list(torch.tensor(ids, device="cpu")[drawn].to(device).split(list(lengths)))
