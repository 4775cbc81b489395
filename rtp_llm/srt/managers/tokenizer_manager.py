"""From a caller's prompt and options to checked requests for the core."""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtp_llm.srt.chat.pairs import PairTemplate
from rtp_llm.srt.configs.grammar_backends import LLGUIDANCE
from rtp_llm.srt.configs.own_config import config_of_unknown_type
from rtp_llm.srt.constrained.check import checked_grammar
from rtp_llm.srt.gguf.folder import is_checkpoint_folder
from rtp_llm.srt.managers.compact_tokenizer import CompactTokenizer
from rtp_llm.srt.managers.detokenizer import Completion, Detokenizer
from rtp_llm.srt.managers.end_tokens import EndToken
from rtp_llm.srt.managers.generate_options import (
    GenerateOptions,
    cache_salt,
    check_text,
    logprob_spec,
    priority,
    rids,
)
from rtp_llm.srt.managers.sentencepiece_tokenizer import follow_sentencepiece, named_symbols
from rtp_llm.srt.managers.text_encoder import LONG_TEXT, TextEncoder, TooManyTokens
from rtp_llm.srt.managers.tokenizer_files import VOCABULARIES, complaint
from rtp_llm.srt.messages import GenerateRequest
from rtp_llm.srt.multimodal.items import Modality, MultimodalInputs, MultimodalProcessorOutput
from rtp_llm.srt.multimodal.memory import MediaScope, media_scope
from rtp_llm.srt.multimodal.placement import MediaPlacer
from rtp_llm.srt.multimodal.work import Workers
from rtp_llm.srt.pooling import ONLY_TOKENS, PooledOutputs
from rtp_llm.srt.request_spec import GrammarSpec, PromptMedia, RequestSpec, ThinkingSpec
from rtp_llm.srt.sampling_params import (
    DEFAULT_MAX_NEW_TOKENS,
    ContextLengthExceeded,
    InvalidRequest,
    SamplingParams,
    check_vocabulary,
    token_ids,
)

if TYPE_CHECKING:
    from rtp_llm.srt.multimodal.base_processor import BaseMultimodalProcessor

MEDIA_FIELDS = {modality: f"{modality.value}_data" for modality in Modality}
ENCODERS = 2  # threads that encode media for the workers
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", *VOCABULARIES)


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded."""


def has_tokenizer(directory: str) -> bool:
    """Return whether a checkpoint directory holds files of a tokenizer; random test models have none."""
    return any(path for pattern in TOKENIZER_FILES for path in Path(directory).glob(pattern))


def load_tokenizer(tokenizer_path: str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Load the transformers tokenizer of a directory or hub id.

    Raises:
        TokenizerError: it is missing or broken.
    """
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # else tiktoken may use an old cached file
    try:
        tokenizer = _from_files(tokenizer_path, trust_remote_code, revision)
        is_empty = len(tokenizer) <= len(tokenizer.added_tokens_decoder)  # as some classes do without files
        if not is_empty:
            follow_sentencepiece(tokenizer)
    except Exception as error:  # of many kinds, from files of many kinds and from remote code
        raise _tokenizer_error(tokenizer_path, trust_remote_code, _first_line(error)) from error
    if is_empty:
        raise _tokenizer_error(
            tokenizer_path, trust_remote_code, "its vocabulary is empty (tokenizer.json is missing?)"
        )
    return tokenizer


def _from_files(tokenizer_path: str, trust_remote_code: bool, revision: str | None) -> Any:
    if is_checkpoint_folder(Path(tokenizer_path)):  # the file is right; some model types have a class that ignores it
        return CompactTokenizer.from_pretrained(tokenizer_path)
    from transformers import AutoTokenizer  # with tables of all classes, 7 MB

    return AutoTokenizer.from_pretrained(
        tokenizer_path,
        config=config_of_unknown_type(tokenizer_path, trust_remote_code),
        trust_remote_code=trust_remote_code,
        revision=revision or "main",
        **named_symbols(tokenizer_path),
    )


def _tokenizer_error(tokenizer_path: str, trust_remote_code: bool, reason: str) -> TokenizerError:
    """Return an error that says what is wrong with the files, if that is found, else ``reason``."""
    directory = Path(tokenizer_path)
    wrong = complaint(directory, trust_remote_code) if directory.is_dir() else None
    return TokenizerError(
        f"cannot load a tokenizer from {tokenizer_path}: {wrong or reason.rstrip('.')}. Or name another place with "
        "tokenizer_path, or use skip_tokenizer_init=True to give and get token ids"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(slots=True)
class Prompt:
    """One prompt as the caller gave it, not checked yet. Exactly one of ``text`` and ``input_ids`` is set."""

    text: Any = None
    input_ids: Any = None
    sampling_params: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    add_special_tokens: bool = True  # for a text
    media: PromptMedia | None = None  # the processed media, from ``with_media``
    options: GenerateOptions = field(default_factory=GenerateOptions)  # without the media
    default_max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS  # or the room, if less; None: all the room
    grammar: GrammarSpec | None = None  # what the endpoint wants of the text; then the parameters must ask for none
    around: str | None = None  # of the grammar that the parameters ask for, if they do: see GrammarSpec
    thinking: ThinkingSpec | None = None

    @property
    def has_media(self) -> bool:
        return any(_media_list(getattr(self, name)) for name in MEDIA_FIELDS.values())


class TokenizerManager:
    """Encodes and checks prompts; makes one request per completion. Thread-safe.

    Args:
        tokenizer: a transformers tokenizer, or None: prompts and results are ids only.
        vocab_size: the model's; ids lie below it.
        context_length: tokens the model can handle, prompt and output together.
        max_req_len: tokens of the longest request that can be served: the context, or what the cache holds if less.
        random_seed: seeds the seeds of requests without one.
        processor: of a multimodal model; None: the model takes text only.
        placer: puts media into prompts; None: in the way of most models.
        media_limits: how many media of a kind a request may have, by "image", "video", "audio".
        end_tokens: tokens that end a text.
        takes_priorities: whether requests are scheduled by their priority; otherwise only 0 is taken.
        outputs: what the model makes besides tokens, or in their place (see managers/pooled.py).
        grammar_backend: the compiler of grammars.
        pair_template: how a pair of texts becomes one, for a model that scores pairs; None: the tokenizer joins them.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        context_length: int,
        max_req_len: int,
        random_seed: int | None = None,
        processor: "BaseMultimodalProcessor | None" = None,
        media_limits: Mapping[str, int] | None = None,
        end_tokens: Sequence[EndToken] = (),
        takes_priorities: bool = False,
        placer: MediaPlacer | None = None,
        outputs: PooledOutputs | None = None,
        grammar_backend: str = LLGUIDANCE,
        pair_template: PairTemplate | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.max_req_len = max_req_len
        self.end_tokens = tuple(end_tokens)
        self.takes_priorities = takes_priorities
        self.outputs = ONLY_TOKENS if outputs is None else outputs
        self.pair_template = pair_template
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._processor = processor
        self._placer = placer or MediaPlacer()
        self._media_limits = dict(media_limits or {})
        self._grammar_backend = grammar_backend
        self._encoders = Workers(ENCODERS, "rtp-llm-media-encoder")
        self._seeds = random.Random(random_seed)
        self._encoder = None if tokenizer is None else TextEncoder(tokenizer, min(context_length, max_req_len))

    async def with_media(self, prompt: Prompt) -> Prompt:
        """Return the prompt with its media fetched, decoded and placed among its ids; without media, as it is.

        Raises:
            InvalidRequest: the model takes no such media, there are too many, or one is broken.
            MediaPlacementError: the model cannot place them.
        """
        if not prompt.has_media:
            return prompt
        self.check_media([prompt])
        assert self._processor is not None  # checked
        images, videos, sounds = map(_media_list, (prompt.image_data, prompt.video_data, prompt.audio_data))
        text = prompt.text if prompt.input_ids is None else token_ids("input_ids", prompt.input_ids)
        if prompt.input_ids is None:
            check_text("prompt", text)
        with media_scope(MediaScope(min(self.context_length, self.max_req_len))):
            output = await self._processor.process_mm_data_async(
                image_data=images,
                audio_data=sounds,
                input_text=text,
                request_obj=replace(prompt, image_data=images, video_data=videos, audio_data=sounds),
            )
            if isinstance(output, Mapping):
                output = MultimodalProcessorOutput.from_dict(output)
            inputs = MultimodalInputs.from_processor_output(output)
            ids, media = await self._encoders.run(self._placer.place, output.input_ids, inputs)
        return replace(prompt, text=None, input_ids=ids, media=media, image_data=None, video_data=None, audio_data=None)

    def check_media(self, prompts: Sequence[Prompt]) -> None:
        """Check the number of a request's media before any is fetched. Callers in this process may send many prompts at
        once, each with as many as a request may have.

        Raises:
            InvalidRequest: the model takes none, or there are more of a kind than a request may have.
        """
        for modality, name in MEDIA_FIELDS.items():
            counts = [len(_media_list(getattr(prompt, name))) for prompt in prompts]
            is_trusted = self._processor is not None and self._processor.loader.trusted
            self._check_media_count(modality, name, max(counts) if is_trusted else sum(counts))

    def _check_media_count(self, modality: Modality, name: str, count: int) -> None:
        if not count:
            return
        if self._processor is None:
            raise InvalidRequest(f"the model takes text only, but the prompt comes with {modality.value} data", name)
        limit = self._media_limits.get(modality.value)
        if limit is not None and count > limit:
            raise InvalidRequest(
                f"the request comes with {count} of kind {modality.value}, and this server takes at most {limit} in a "
                "request (--limit-mm-data-per-request)",
                name,
            )

    def requests(self, prompt: Prompt) -> list[GenerateRequest]:
        """Return the ``n`` requests of one prompt, with seeds ``seed``, ``seed + 1``, ... ``with_media`` must have
        processed its media.

        Raises:
            InvalidRequest: the prompt or an option is wrong.
        """
        if prompt.has_media:
            raise InvalidRequest("the prompt's media were not processed: with_media comes first")
        problem = self.outputs.problem(None)
        if problem is not None:
            raise InvalidRequest(problem, "model")
        params = self._with_bad_words(_sampling_params(prompt.sampling_params))
        params.validate(self.vocab_size)
        if self.tokenizer is None and params.stop:
            raise InvalidRequest("stop strings need a tokenizer, and the engine runs without one", "stop")
        ids = self._prompt_ids(prompt, wants_new=params.max_new_tokens != 0)
        spec = RequestSpec(
            replace(params, max_new_tokens=self._max_new_tokens(params, len(ids), prompt.default_max_new_tokens)),
            seed=self._seeds.getrandbits(64) if params.seed is None else params.seed % 2**64,
            logprobs=logprob_spec(prompt.options, len(ids), self.vocab_size, has_text=self.tokenizer is not None),
            media=prompt.media,
            cache_salt=cache_salt(prompt.options),
            priority=priority(prompt.options, self.takes_priorities),
            eos_token_ids=tuple(token.token_id for token in self.end_tokens),
            grammar=self._grammar(prompt, params),
            thinking=prompt.thinking,
        )
        return [
            GenerateRequest(rid, ids, replace(spec, seed=(spec.seed + i) % 2**64))
            for i, rid in enumerate(rids(prompt.options, params.n))
        ]

    def _with_bad_words(self, params: SamplingParams) -> SamplingParams:
        """Turn ``bad_words`` into token ids: each word as it is, and with a space before it, as within a text."""
        if not params.bad_words:
            return params
        if self.tokenizer is None:
            raise InvalidRequest("bad_words needs a tokenizer, and the engine runs without one", "bad_words")
        words = [list(word) for word in params.bad_words_ids]
        for text in params.bad_words:
            check_text("bad_words", text)
            for form in (text, " " + text.lstrip()):
                ids = self.encode(form, add_special_tokens=False)
                words += [ids] if ids and ids not in words else []
        return replace(params, bad_words=[], bad_words_ids=words)

    def _grammar(self, prompt: Prompt, params: SamplingParams) -> GrammarSpec | None:
        asked = checked_grammar(params, self.tokenizer, prompt.around, self._grammar_backend)
        if asked is not None and prompt.grammar is not None:
            raise InvalidRequest(
                "tool_choice asks for calls, and another field for a grammar: give one of them", "tool_choice"
            )
        return prompt.grammar or asked

    def completion(self, request: GenerateRequest, tags: tuple[str, ...] = ()) -> Completion:
        """Return the object that collects the outputs of ``request`` and makes its result. ``tags``: see Completion."""
        return Completion(request, self._detokenizer, tags)

    def encode(self, text: str, add_special_tokens: bool = True, is_prompt: bool = True) -> list[int]:
        """Return token ids as transformers does, with the tokenizer's special tokens if wanted.

        Args:
            is_prompt: a text with far too many tokens for a prompt is an error, and not encoded to its end.
        """
        if self._encoder is None:
            raise InvalidRequest(
                "a text prompt needs a tokenizer, and the engine runs without one; give input_ids", "prompt"
            )
        check_text("prompt", text)
        if is_prompt:
            self._check_length(self._encoder, text)
        return self._encoder.encode(text, add_special_tokens)

    def encode_input(
        self, text: str, pair: str | None, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> tuple[list[int], int | None]:
        """See TextEncoder.encode_input. A text with far too many tokens is an error, unless it is to be cut."""
        if self._encoder is None:
            raise InvalidRequest("a text needs a tokenizer, and the engine runs without one; give input_ids", "prompt")
        for each in (text,) if pair is None else (text, pair):
            check_text("prompt", each)
            if max_tokens is None:
                self._check_length(self._encoder, each)
        return self._encoder.encode_input(text, pair, add_special_tokens, max_tokens)

    def encode_inputs(self, texts: list[str], add_special_tokens: bool, max_tokens: int | None) -> list[list[int]]:
        """See TextEncoder.encode_inputs. There must be a tokenizer, and ``encodes_together`` be true of all texts."""
        assert self._encoder is not None
        return self._encoder.encode_inputs(texts, add_special_tokens, max_tokens)

    def encodes_together(self, text: Any) -> bool:
        """Whether the text can be encoded with others: neither wrong nor long."""
        if self._encoder is None or not isinstance(text, str) or len(text) > LONG_TEXT:
            return False
        try:
            check_text("prompt", text)
        except InvalidRequest:
            return False
        return True

    def encode_pair(
        self, query: str, document: str, instruction: str | None = None, max_tokens: int | None = None
    ) -> list[int]:
        """Return the ids of a pair in the form of ``pair_template``. A longer document is cut to ``max_tokens`` of all.

        Raises:
            InvalidRequest: the text is too long, or cutting the document is not enough.
            ChatTemplateError: the template has no place for an instruction.
        """
        assert self.pair_template is not None
        for each in (query, document, instruction or "-"):
            check_text("prompt", each)
        made = self.pair_template.text(query, document, instruction)
        ids = self.encode(made.before + document + made.after, False, is_prompt=max_tokens is None)
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        end = self.encode(made.after, False) if made.after else []
        least = len(self.encode(made.before, False)) + len(end)
        if least > max_tokens:
            raise InvalidRequest(
                f"without the document the prompt has {least} tokens, more than the {max_tokens} to which it is to be "
                "cut",
                "truncate_prompt_tokens",
            )
        return self.encode(made.before + document, False, is_prompt=False)[: max_tokens - len(end)] + end

    def _check_length(self, encoder: TextEncoder, text: str) -> None:
        try:
            encoder.check_length(text)
        except TooManyTokens:
            raise self._too_long(
                f"the prompt of {len(text)} characters has more than twice as many; {self._limit()}", "prompt"
            ) from None

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Raise InvalidRequest for an unknown id, and without a tokenizer."""
        if self._detokenizer is None:
            raise InvalidRequest("text needs a tokenizer, and the engine runs without one", "tokens")
        checked = token_ids("tokens", ids)
        check_vocabulary("tokens", checked, self.vocab_size)
        return self._detokenizer.decode(checked, skip_special_tokens)

    def _prompt_ids(self, prompt: Prompt, wants_new: bool) -> list[int]:
        if prompt.text is None:
            name, ids = "input_ids", token_ids("input_ids", prompt.input_ids)
        else:
            name, ids = "prompt", self.encode(prompt.text, prompt.add_special_tokens)
        self.check_ids(name, ids, wants_new)
        return ids

    def check_ids(self, name: str, ids: Sequence[int], wants_new: bool) -> None:
        """Raise InvalidRequest for a prompt, called ``name``, that is empty, too long, or has unknown ids.

        Args:
            wants_new: there must be room for a new token.
        """
        if not ids:
            raise InvalidRequest(f"{name} is empty: there must be at least one token to continue", name)
        check_vocabulary(name, ids, self.vocab_size)
        if len(ids) > self.context_length:
            raise self._too_long(
                f"the prompt has {len(ids)} tokens, more than the context length of {self.context_length}", name
            )
        if len(ids) + wants_new > self.max_req_len:
            room = "room for a new one" if wants_new else "room"
            raise self._too_long(f"the prompt has {len(ids)} tokens and leaves no {room}: {self._limit()}", name)

    def _max_new_tokens(self, params: SamplingParams, prompt_len: int, default: int | None) -> int:
        """Return the requested number, or else ``default`` limited by the room; the whole room if that is None."""
        room = self.max_req_len - prompt_len
        name, asked = "max_new_tokens", params.max_new_tokens
        if asked is None:
            name, asked = "min_new_tokens", max(params.min_new_tokens, room if default is None else min(default, room))
        if asked > room:
            raise self._too_long(
                f"{name} is {asked}, but the prompt of {prompt_len} tokens leaves room for {room}: {self._limit()}",
                name,
            )
        return asked

    def _too_long(self, reason: str, param: str) -> ContextLengthExceeded:
        """Return an error that begins with OpenAI's words, by which client libraries recognise it."""
        limit = min(self.context_length, self.max_req_len)
        return ContextLengthExceeded(f"This model's maximum context length is {limit} tokens: {reason}", param)

    def _limit(self) -> str:
        if self.max_req_len < self.context_length:
            return (
                f"a request may have {self.max_req_len} tokens, which is what the cache holds "
                f"(the context length is {self.context_length})"
            )
        return f"a request may have {self.max_req_len} tokens, the context length"


def _sampling_params(value: Any) -> SamplingParams:
    if value is None:
        return SamplingParams()
    if isinstance(value, SamplingParams):
        return replace(value)  # checked again, and safe from the caller's later changes
    if isinstance(value, Mapping):
        return SamplingParams.from_dict(value)
    raise InvalidRequest(
        f"sampling_params must be a dict or SamplingParams, not {type(value).__name__}", "sampling_params"
    )


def _media_list(data: Any) -> list[Any]:
    """Return a list of media from one medium or a list; None is no media."""
    if data is None:
        return []
    return list(data) if isinstance(data, (list, tuple)) else [data]
