"""A checkpoint's location and configuration, read before its weights."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedConfig

from rtp_llm.srt.configs.architectures import architecture_of, with_other_names
from rtp_llm.srt.configs.config_json import DTYPE_ALIASES
from rtp_llm.srt.configs.generation_config import (
    GENERATION_CONFIG_FILE,
    generation_defaults,
    read_generation_config,
    usable_token_ids,
)
from rtp_llm.srt.configs.hf_config import (
    CONFIG_ERRORS,
    ModelConfigError,
    architecture_names,
    load_hf_config,
    parse_overrides,
    read_config_json,
)
from rtp_llm.srt.configs.model_path import CONFIG_FILE, ModelNotFoundError, first_line, resolve_model_path
from rtp_llm.srt.configs.score_tokens import ScoreTokens, ScoreTokensError, score_tokens
from rtp_llm.srt.configs.sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerError,
    read_sentence_transformer,
)
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.models.registry import ModelImportError

logger = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_CONTEXT_LENGTH = 2048  # if a configuration names no length

multimodal_model_archs: set[str] = {
    "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
}
"""Architectures that take media; ``register_multimodal_model`` adds to them."""

_CONTEXT_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "model_max_length",
)
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, of the format itself


def register_multimodal_model(architecture: str) -> None:
    """Register an architecture as one that takes media. A model's file may call it at import.

    Needed only if the configuration has no part for the language model (``text_config``).
    """
    multimodal_model_archs.add(architecture)


def is_multimodal_model(architectures: str | Iterable[str]) -> bool:
    """Return whether any of these architecture names is in ``multimodal_model_archs``."""
    names = {architectures} if isinstance(architectures, str) else set(architectures)
    return not names.isdisjoint(multimodal_model_archs)


@dataclass(frozen=True)
class ModelConfig:
    """A checkpoint's configuration, resolved. A model's constructor gets ``hf_config``."""

    model_path: str  # the local directory
    hf_config: PreTrainedConfig
    hf_text_config: PreTrainedConfig  # the language model's part; hf_config itself for a text model
    architectures: list[str]
    dtype: str  # one of DTYPES
    context_length: int  # tokens, prompt and output together
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int  # 0 without attention, or if layers differ
    eos_token_ids: tuple[int, ...]  # of config.json and generation_config.json together
    bos_token_id: int | None
    generation_defaults: dict[str, float | int] = field(default_factory=dict)  # SamplingParams fields
    enable_multimodal: bool = True
    convert: str = "auto"  # see ServerArgs, as for ``pooling``
    pooling: str | None = None
    sentence_transformer: SentenceTransformer | None = None  # None: the checkpoint is none of sentence-transformers
    score_tokens: ScoreTokens | None = None  # whose logits score a pair of texts, if the model generates

    @property
    def is_multimodal(self) -> bool:
        """Whether media are taken: the architecture is registered for it, or its configuration has a text part."""
        is_part = self.hf_config is not self.hf_text_config
        return self.enable_multimodal and (is_multimodal_model(self.architectures) or is_part)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        context_length: int | None = None,
        json_model_override_args: str | Mapping[str, Any] = "{}",
        download_dir: str | None = None,
        load_format: str = "auto",
        enable_multimodal: bool = True,
        by_transformers: bool = False,
        with_tokenizer: bool = True,
        convert: str = "auto",
        pooling: str | None = None,
    ) -> Self:
        """Read a checkpoint's configuration.

        Args:
            model_path: a directory, a GGUF, or a hub id (see ``resolve_model_path``).
            dtype: one of DTYPES, or ``auto``: config.json's, else the weights' own, else float32.
                float32 stays float32 (other engines make it float16).
            context_length: instead of the model's own; a longer one is allowed, with a warning.
            json_model_override_args: a JSON object whose values take effect as if they stood in config.json: a key
                replaces what was there, but an object under a key ``*_config`` is merged into the one there.
            enable_multimodal: whether a multimodal model is served with media.
            by_transformers: whether only transformers' configuration classes are taken, not one of a model file.
            with_tokenizer: whether a GGUF's own tokenizer is needed.
            convert, pooling: see ServerArgs.

        Raises:
            ModelNotFoundError: no such model, or no config.json in it.
            ModelConfigError: the configuration cannot be used.
            GGUFError: a GGUF is damaged, or not supported.
            ModelImportError: the file of the architecture's class, which may name a configuration class, is broken.
        """
        directory = resolve_model_path(
            model_path, revision, download_dir, load_format, trust_remote_code, with_tokenizer
        )
        overrides = parse_overrides(json_model_override_args)
        try:
            hf_config = load_hf_config(directory, overrides, trust_remote_code, by_transformers)
            config = cls._resolved(directory, hf_config, dtype, context_length, enable_multimodal)
            scored_by = score_tokens(hf_config, config.sentence_transformer, convert)
            return replace(config, convert=convert, pooling=pooling, score_tokens=scored_by)
        except (ModelConfigError, ModelNotFoundError, ModelImportError):
            raise
        except ScoreTokensError as error:
            raise ModelConfigError(f"{directory}/{CONFIG_FILE}: {error}") from error
        except CONFIG_ERRORS as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise ModelConfigError(f"{directory}/{CONFIG_FILE} cannot be used: {what}") from error

    @classmethod
    def from_server_args(cls, args: ServerArgs) -> Self:
        """Read the configuration of the checkpoint that an engine runs, as ``from_pretrained`` does."""
        return cls.from_pretrained(
            args.model_path,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            dtype=args.dtype,
            context_length=args.context_length,
            json_model_override_args=args.json_model_override_args,
            download_dir=args.download_dir,
            load_format=args.load_format,
            enable_multimodal=args.enable_multimodal and args.model_impl != "transformers",  # takes text only
            by_transformers=args.model_impl == "transformers",
            with_tokenizer=_needs_tokenizer(args),
            convert=args.convert,
            pooling=args.pooling,
        )

    @classmethod
    def _resolved(
        cls,
        directory: str,
        hf_config: Any,
        dtype: str,
        context_length: int | None,
        enable_multimodal: bool,
    ) -> Self:
        text_config = hf_config.get_text_config()
        vocab_size = _size(text_config, "vocab_size")
        generation = read_generation_config(directory)
        ids = _token_ids(hf_config, text_config, generation, vocab_size, directory)
        sentences = _sentence_transformer(directory)
        longest = None if sentences is None else sentences.max_seq_length
        return cls(
            model_path=directory,
            hf_config=hf_config,
            hf_text_config=text_config,
            architectures=_architectures(hf_config, directory),
            dtype=_resolve_dtype(dtype, hf_config, directory),
            context_length=_resolve_context_length(context_length, text_config, longest),
            vocab_size=vocab_size,
            hidden_size=_size(text_config, "hidden_size"),
            num_layers=_size(text_config, "num_hidden_layers"),
            num_heads=_num_heads(text_config),
            eos_token_ids=_union_of_ids(*ids["eos_token_id"]),
            bos_token_id=next(iter(_union_of_ids(*ids["bos_token_id"])), None),
            generation_defaults=generation_defaults(generation, directory),
            enable_multimodal=enable_multimodal,
            sentence_transformer=sentences,
        )


def _sentence_transformer(directory: str) -> SentenceTransformer | None:
    try:
        return read_sentence_transformer(directory)
    except SentenceTransformerError as error:
        raise ModelConfigError(str(error)) from error


def _needs_tokenizer(args: ServerArgs) -> bool:
    return args.tokenizer_path is None and not args.skip_tokenizer_init


def read_architectures(args: ServerArgs) -> list[str]:
    """Return the names under ``architectures`` of the checkpoint that an engine runs, before its configuration is read.

    Raises:
        ModelNotFoundError, ModelConfigError: as ``ModelConfig.from_pretrained``.
    """
    directory = resolve_model_path(
        args.model_path,
        args.revision,
        args.download_dir,
        args.load_format,
        args.trust_remote_code,
        _needs_tokenizer(args),
    )
    return architecture_names(read_config_json(directory, parse_overrides(args.json_model_override_args)))


def _architectures(hf_config: PreTrainedConfig, directory: str) -> list[str]:
    """Return the file's architectures with their other names; if none, transformers' class for the model type.

    ``hf_config`` names them likewise then.
    """
    names = hf_config.architectures
    if not names:
        name = architecture_of(hf_config.model_type)
        if name is None:
            raise ModelConfigError(
                f"{directory}/{CONFIG_FILE} names no `architectures`, and transformers has no class that generates "
                f"text for its `model_type` {hf_config.model_type!r}, so its model class is unknown"
            )
        logger.warning("%s/%s names no `architectures`; taken to be %s", directory, CONFIG_FILE, name)
        names = [name]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelConfigError(f"`architectures` in {directory}/{CONFIG_FILE} must be a list of names, not {names!r}")
    architectures = with_other_names(names)
    if architectures != hf_config.architectures:
        hf_config.architectures = architectures
    return architectures


def _attribute(name: str, hf_config: PreTrainedConfig, text_config: PreTrainedConfig) -> Any:
    value = getattr(text_config, name, None)
    return getattr(hf_config, name, None) if value is None else value


def _size(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelConfigError(f"the model's configuration must give `{name}` as a positive integer, not {value!r}")
    return value


def _num_heads(config: PreTrainedConfig) -> int:
    try:
        return getattr(config, "num_attention_heads", None) or 0
    except RuntimeError:  # transformers raises it if layers have different numbers
        return 0


def _token_ids(
    hf_config: PreTrainedConfig,
    text_config: PreTrainedConfig,
    generation: Mapping[str, Any],
    vocab_size: int,
    directory: str,
) -> dict[str, list[int | list[int] | None]]:
    """Return key -> valid ids of config.json and generation_config.json, in this order."""
    return {
        key: [
            usable_token_ids(value, vocab_size, f"`{key}` in {directory}/{file}")
            for file, value in (
                (CONFIG_FILE, _attribute(key, hf_config, text_config)),
                (GENERATION_CONFIG_FILE, generation.get(key)),
            )
        ]
        for key in ("eos_token_id", "bos_token_id")
    }


def _union_of_ids(*values: int | list[int] | None) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for value in values:
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None:
                ids[token_id] = None
    return tuple(ids)


def _resolve_dtype(asked: str, hf_config: PreTrainedConfig, directory: str) -> str:
    if asked != "auto":
        return _dtype_name(asked, f"dtype {asked!r} is unknown")
    found = _attribute("dtype", hf_config, hf_config.get_text_config())
    if found is None:
        return _stored_dtype(directory) or "float32"
    name = str(found).removeprefix("torch.")
    return _dtype_name(name, f"{directory}/{CONFIG_FILE} asks for dtype {name!r}, which the engine does not compute in")


def _dtype_name(name: str, complaint: str) -> str:
    name = DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise ModelConfigError(f"{complaint}; have {', '.join(DTYPES)} (or auto)")
    return name


def _stored_dtype(directory: str) -> str | None:
    """Return the one of DTYPES of most weights in the first safetensors file; None if there is none, or the file cannot
    be read. Quantized weights, packed into other types, do not count.

    A safetensors file begins with the length of its JSON header (8 bytes, little endian), then the header.
    """
    for path in sorted(Path(directory).glob("*.safetensors"))[:1]:
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _MAX_SAFETENSORS_HEADER)))
            sizes: Counter[str] = Counter()
            for name, tensor in header.items():
                if name != "__metadata__" and tensor["dtype"] in _SAFETENSORS_DTYPES:
                    sizes[tensor["dtype"]] += prod(tensor["shape"])
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError):
            return None  # the loader reports what is wrong
        return _SAFETENSORS_DTYPES[sizes.most_common(1)[0][0]] if sizes else None
    return None


def _resolve_context_length(asked: int | None, config: PreTrainedConfig, longest: int | None = None) -> int:
    """``longest``: the most tokens that sentence-transformers takes."""
    own = derived_context_length(config)
    if asked is None and longest is not None:
        return longest if own is None else min(own, longest)
    if asked is None:
        if own is None:
            logger.warning("the model's configuration names no context length; using %d", DEFAULT_CONTEXT_LENGTH)
        return own or DEFAULT_CONTEXT_LENGTH
    if isinstance(asked, bool) or not isinstance(asked, int) or asked <= 0:
        raise ModelConfigError(f"context_length must be a positive number of tokens, not {asked!r}")
    if own is not None and asked > own:
        logger.warning("context length %d is longer than the model's own %d; answers may be poor", asked, own)
    return asked


def derived_context_length(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence of a (text) configuration, RoPE scaling included; None if it names none.

    ``max_position_embeddings`` already includes the scaling where ``original_max_position_embeddings`` stands beside
    it, except for YaRN, whose checkpoints are written both ways. Per-layer RoPE parameters never extend it.
    """
    named = [getattr(config, key, None) for key in _CONTEXT_LENGTH_KEYS]
    lengths = [length for length in named if isinstance(length, int) and length > 0]
    if not lengths:
        return None
    length = min(lengths)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type")
    factor = rope.get("factor") or 1.0
    original = rope.get("original_max_position_embeddings")
    if kind == "yarn":
        return max(length, int((original or length) * factor))
    if kind in ("linear", "dynamic") and original is None:
        return int(length * factor)
    return length
