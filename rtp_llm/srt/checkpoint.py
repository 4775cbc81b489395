"""Readers of a checkpoint's parts besides weights: configuration, tokenizer, media processor and chat template.

Engines, and tools without an engine, read them here, from ServerArgs.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rtp_llm.srt.chat.pairs import PAIR_TEMPLATES, PairTemplate, is_for_pairs
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.conversation import ChatTemplate, ChatTemplateError, Template, load_chat_template
from rtp_llm.srt.managers.end_tokens import EndToken, find_end_tokens
from rtp_llm.srt.managers.tokenizer_manager import Prompt, TokenizerManager, has_tokenizer, load_tokenizer
from rtp_llm.srt.models.registry import ModelRegistry, UnknownArchitectureError
from rtp_llm.srt.multimodal.media_store import MediaStore
from rtp_llm.srt.multimodal.placement import MediaPlacer

logger = logging.getLogger(__name__)
CLASSIFIER = "ForSequenceClassification"  # how architectures end that may score pairs


def read_model_config(args: ServerArgs) -> ModelConfig:
    """Read the checkpoint's configuration, and import the model file of a multimodal or external model: it may register
    a conversation or a processor that this process needs."""
    config = ModelConfig.from_server_args(args)
    if config.is_multimodal or any(ModelRegistry.is_external(name) for name in config.architectures):
        with suppress(UnknownArchitectureError):  # raised when the model is built, unless transformers can run it
            ModelRegistry.resolve_model_cls(config.architectures)
    return config


def read_tokenizer(args: ServerArgs, config: ModelConfig) -> Any:
    """Load the tokenizer; return None with ``skip_tokenizer_init``, and, with a warning, if there is none: ids still
    work."""
    if args.skip_tokenizer_init:
        return None
    if args.tokenizer_path is None and not has_tokenizer(config.model_path):
        logger.warning("%s has no tokenizer: only token ids are taken and given", config.model_path)
        return None
    if args.tokenizer_path is None:
        return load_tokenizer(config.model_path, args.trust_remote_code)
    return load_tokenizer(args.tokenizer_path, args.trust_remote_code, args.revision)


def read_processor(args: ServerArgs, config: ModelConfig, tokenizer: Any, trusted: bool = False) -> Any:
    """Make the processor of media of a multimodal model; None for a model that takes text only, or that runs without a
    tokenizer and has no processor.

    Args:
        trusted: callers are this process's own code, which may read any file.
    """
    if not config.is_multimodal:
        return None
    from rtp_llm.srt.managers.multimodal_processor import make_processor  # decoders of media, only needed here

    try:
        model_cls = ModelRegistry.resolve_model_cls(config.architectures)[0]
    except UnknownArchitectureError:
        return None  # it runs through transformers, which takes text only, or not at all
    return make_processor(args, config, model_cls, tokenizer, trusted)


def read_placer(config: ModelConfig, workers_are_here: bool = True) -> MediaPlacer:
    """Make the object that places media in the prompts of the model.

    Args:
        workers_are_here: workers run in this process; those in others are sent the path of a file of media.
    """
    store = None if workers_are_here else MediaStore()
    if not config.is_multimodal:
        return MediaPlacer(store=store)
    try:
        model_cls = ModelRegistry.resolve_model_cls(config.architectures)[0]
    except UnknownArchitectureError:
        return MediaPlacer(store=store)
    from rtp_llm.srt.model_traits import ModelTraits  # torch, only needed here
    from rtp_llm.srt.multimodal.items import pad_placeholders

    if ModelTraits.of(model_cls).pad_input_ids in (None, pad_placeholders):
        return MediaPlacer(store=store)

    def build() -> Any:
        from rtp_llm.srt.models.weightless import build_without_weights  # layers, only needed by some models

        return build_without_weights(model_cls, config)

    return MediaPlacer(build, store)


def prompts_with_images(
    args: ServerArgs, config: ModelConfig, tokenizer: Any, texts: Sequence[str], images: Sequence[Any]
) -> list[Prompt]:
    """Make prompts (ids and media) of texts that have all special tokens and the placeholders for the images: for tools
    that work without a frontend.

    Raises:
        InvalidRequest: the images do not fit a text, or the model.
    """
    processor = read_processor(args, config, tokenizer, trusted=True)
    context_length = config.context_length
    manager = TokenizerManager(
        tokenizer,
        config.vocab_size,
        context_length,
        context_length,
        processor=processor,
        placer=read_placer(config),
    )

    async def with_images() -> list[Prompt]:
        prompts = [Prompt(text=text, image_data=list(images), add_special_tokens=False) for text in texts]
        return [await manager.with_media(prompt) for prompt in prompts]

    return asyncio.run(with_images())


def read_chat_template(args: ServerArgs, config: ModelConfig, tokenizer: Any) -> Template | None:
    """Load the chat template, which makes prompts of messages; None if there is none."""
    asked = None if args.chat_template in PAIR_TEMPLATES else args.chat_template
    return load_chat_template(tokenizer, asked, args.model_path, config.model_path, config.is_multimodal)


def read_pair_template(args: ServerArgs, config: ModelConfig, tokenizer: Any) -> PairTemplate | None:
    """Make the template by which a query and a document become one text, for a model that scores pairs: the one that
    was asked for, the checkpoint's own if it is for pairs, or that of models with the same tokens. None: there is none.

    Raises:
        ChatTemplateError: the one that was asked for is no template for pairs.
    """
    scores = config.score_tokens is not None or any(name.endswith(CLASSIFIER) for name in config.architectures)
    if tokenizer is None or not scores:
        return None
    special_tokens = getattr(tokenizer, "special_tokens_map", {})
    if args.chat_template in PAIR_TEMPLATES:
        return PairTemplate(PAIR_TEMPLATES[args.chat_template], special_tokens)
    template = read_chat_template(args, config, tokenizer)
    source = template.source if isinstance(template, ChatTemplate) else ""
    if args.chat_template is not None or is_for_pairs(source):
        return PairTemplate(source, special_tokens)
    name = None if config.score_tokens is None else config.score_tokens.template
    if name is None and config.score_tokens is not None:
        logger.warning(
            "no template for pairs is known for this model: the tokenizer joins two texts. Give one by --chat-template "
            "FILE.jinja, or one of %s",
            ", ".join(PAIR_TEMPLATES),
        )
    return None if name is None else PairTemplate(PAIR_TEMPLATES[name], special_tokens)


def read_end_tokens(args: ServerArgs, config: ModelConfig, tokenizer: Any) -> tuple[EndToken, ...]:
    """Find the tokens that end a text, from the configuration, the tokenizer and the chat template. A checkpoint's own
    template that cannot be used is ignored; one that was requested is an error."""
    template = None
    try:
        template = read_chat_template(args, config, tokenizer)
    except ChatTemplateError as error:
        if args.chat_template not in (None, *PAIR_TEMPLATES):
            raise
        logger.warning("the model's chat template is not usable: %s", error)
    return find_end_tokens(config.eos_token_ids, config.vocab_size, tokenizer, template)
