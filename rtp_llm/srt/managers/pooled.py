"""From a caller's inputs to requests for pooled outputs, and from the core's answers to results.

    PoolingPrompt -> PooledRequests.completion -> PooledCompletion, fed by a Call -> its output

What an endpoint asks for is a task's name and PoolingOptions; everything else is as for generated text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypedDict, cast

from rtp_llm.srt.configs.sentence_transformers import SentenceTransformer
from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.managers.generate_options import GenerateOptions, cache_salt, check_text, per_prompt, priority, rids
from rtp_llm.srt.managers.tokenizer_manager import Prompt, TokenizerManager
from rtp_llm.srt.messages import GenerateRequest, TokenOutput
from rtp_llm.srt.pooling import PooledOutput, PoolingSpec
from rtp_llm.srt.request_spec import PromptMedia, RequestSpec
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams, token_ids

NO_TOKENS = SamplingParams(max_new_tokens=0)
EMBED = "embed"
MEDIA = ("image_data", "video_data")  # options that ``with_media`` takes


class PoolingOptions(TypedDict, total=False):
    """Options of an input; for a list of inputs each is one value for all, or a list of one for each. None: unset."""

    text_pair: Annotated[Any, "the second text of a pair, for models that score pairs"]
    dimensions: Annotated[Any, "of a vector, its first so many components"]
    normalize: Annotated[Any, "vectors of length one, probabilities; unset: as the checkpoint has it"]
    truncate_prompt_tokens: Annotated[Any, "cut inputs to so many tokens, -1: to as many as are taken; unset: not"]
    add_special_tokens: Annotated[Any, "those that the tokenizer puts around a text; unset: true"]
    instruction: Annotated[Any, "what a model that scores pairs by a template shall judge; unset: as it was trained"]
    prompt_name: Annotated[Any, "of a text of the checkpoint's, put before the input; unset: its default"]
    image_data: Annotated[Any, "of ``encode``, images of a model that sees, as for ``generate``"]
    video_data: Annotated[Any, "likewise videos"]
    rid: Annotated[Any, "the request's name, unique among the running ones"]
    cache_salt: Annotated[Any, "inputs share cached prefixes only with those of the same salt"]
    priority: Annotated[Any, "lower ones are scheduled earlier"]


@dataclass(slots=True)
class PoolingPrompt:
    """One input as the caller gave it, not checked yet. Exactly one of ``text`` and ``input_ids`` is set.

    ``pair_start``: of ids, where the second text begins. ``place``: how an error names it, if it is one of several.
    ``against``: see PoolingSpec. ``encoded``: the text's ids, if they are there already (``encode_together``).
    ``media``: placed among ``input_ids`` (``with_media``).
    """

    task: str
    text: Any = None
    input_ids: Any = None
    options: PoolingOptions = field(default_factory=PoolingOptions)
    pair_start: int | None = None
    place: str = ""
    against: PooledOutput | None = None
    encoded: list[int] | None = None
    media: PromptMedia | None = None

    @property
    def has_media(self) -> bool:
        return any(self.options.get(name) is not None for name in MEDIA)


class PooledCompletion(Completion):
    """The output of one request; ``output`` is there once it has finished, unless it failed."""

    def __init__(self, request: GenerateRequest) -> None:
        super().__init__(request, detokenizer=None)
        self.output: PooledOutput | None = None

    def add(self, output: TokenOutput) -> None:
        super().add(output)
        self.output = output.pooled or self.output

    def result(self) -> dict[str, Any]:
        """Return ``{"embedding", "meta_info"}`` as SGLang has it; see ``PooledOutput.value``."""
        meta = {name: value for name, value in self._meta_info().items() if name != "completion_tokens"}
        return {"embedding": None if self.output is None else self.output.value(), "meta_info": meta}


class PooledRequests:
    """Checks inputs and makes one request of each. Thread-safe.

    Args:
        manager: encodes texts, and knows the limits and the model's outputs.
        sentences: settings of sentence-transformers, if the checkpoint has some.
    """

    def __init__(self, manager: TokenizerManager, sentences: SentenceTransformer | None = None) -> None:
        self.manager = manager
        self.sentences = sentences or SentenceTransformer()
        self._num_before: dict[tuple[str, bool], int] = {}  # of ``_tokens_before``, for the checkpoint's few texts

    @property
    def special_ids(self) -> frozenset[int]:
        """The tokens that a tokenizer puts around texts, which have no weight of their own."""
        tokenizer = self.manager.tokenizer
        return frozenset(() if tokenizer is None else tokenizer.all_special_ids)

    def check_task(self, task: str, dimensions: int | None = None, param: str = "model") -> None:
        """Raise InvalidRequest, about ``param``, unless the model has the output; with so many components."""
        problem = self.manager.outputs.problem(PoolingSpec(task, dimensions))
        if problem is not None:
            raise InvalidRequest(problem, param if self.manager.outputs.find(task) is None else "dimensions")

    def check_names(self, options: Mapping[str, Any]) -> None:
        """Raise TypeError for an option that PoolingOptions does not have."""
        unknown = [name for name in options if name not in PoolingOptions.__annotations__]
        if unknown:
            raise TypeError(f"unexpected keyword argument {unknown[0]!r}; have {list(PoolingOptions.__annotations__)}")

    def completions(
        self, task: str, prompt: Any, input_ids: Any, options: Mapping[str, Any]
    ) -> tuple[list[Completion], bool]:
        """Return the completions of a call, and whether its answer is a list, as ``frontend.completions_of`` does.

        Raises:
            TypeError: there is no such option.
            InvalidRequest: names the input, if it is one of a list.
        """
        prompts, is_list = self.prompts(task, prompt, input_ids, options)
        return [self.completion(each) for each in prompts], is_list

    def prompts(
        self, task: str, prompt: Any, input_ids: Any, options: Mapping[str, Any]
    ) -> tuple[list[PoolingPrompt], bool]:
        """Return the inputs of a call, for ``completion``, and whether its answer is a list.

        Raises:
            TypeError, InvalidRequest: the call as a whole is wrong.
        """
        self.check_names(options)
        self.check_task(task)
        if (prompt is None) == (input_ids is None):
            raise InvalidRequest("give either prompt or input_ids, and not both", "prompt")
        name, given = ("text", prompt) if input_ids is None else ("input_ids", input_ids)
        is_list = isinstance(given, (list, tuple)) and (name == "text" or isinstance(next(iter(given), None), Sequence))
        values = list(given) if is_list else [given]
        columns = {
            key: per_prompt(key, option, len(values)) if is_list else [option] for key, option in options.items()
        }
        prompts: list[PoolingPrompt] = []
        for i, value in enumerate(values):
            own = cast(PoolingOptions, {key: column[i] for key, column in columns.items()})
            place = f"prompt {i}" if is_list else ""
            prompts.append(PoolingPrompt(task, **{name: value}, options=own, place=place))
        return prompts, is_list

    async def with_media(self, prompt: PoolingPrompt) -> PoolingPrompt:
        """Return the prompt with its media fetched, decoded and placed among its ids; without media, as it is.

        Raises:
            InvalidRequest, MediaPlacementError: see TokenizerManager.with_media; the input is named.
        """
        if not prompt.has_media:
            return prompt
        options = dict(prompt.options)
        media: dict[str, Any] = {name: options.pop(name, None) for name in MEDIA}
        try:
            text = prompt.text
            self._check_takes(prompt)
            if isinstance(text, str):
                text = self._prompt_text(prompt.options.get("prompt_name")) + text
            placed = await self.manager.with_media(Prompt(text=text, input_ids=prompt.input_ids, **media))
        except InvalidRequest as error:
            raise _placed(error, prompt) from None
        own = cast(PoolingOptions, options)
        return replace(prompt, text=None, input_ids=placed.input_ids, media=placed.media, options=own)

    def encode_together(self, prompts: Sequence[PoolingPrompt]) -> None:
        """Encode the texts of many prompts in a few calls of the tokenizer, which take a fraction of the time.

        Long texts, pairs, wrong ones and those with rare options are left to ``completion``.
        """
        if self.sentences.takes_messages:
            return
        try:
            before = self._prompt_text(None)
        except InvalidRequest:  # every prompt's own error
            return
        groups: dict[tuple[bool, int | None], list[PoolingPrompt]] = {}
        for prompt in prompts:
            options = prompt.options
            cut = options.get("truncate_prompt_tokens")
            is_plain = all(options.get(name) is None for name in ("text_pair", "instruction", "prompt_name"))
            if is_plain and cut in (None, -1) and self.manager.encodes_together(prompt.text):
                groups.setdefault((options.get("add_special_tokens") is not False, cut), []).append(prompt)
        for (adds, _), group in groups.items():
            if len(group) > 1:
                texts = [before + prompt.text for prompt in group]
                texts = [text.lower() for text in texts] if self.sentences.lower_case else texts
                every = self.manager.encode_inputs(texts, adds, self._most_tokens(group[0].options))
                for prompt, ids in zip(group, every, strict=True):
                    prompt.encoded = ids

    def completion(self, prompt: PoolingPrompt) -> PooledCompletion:
        """Check and encode one input.

        Raises:
            InvalidRequest: the model has no such output, or the input or an option is wrong; it names the input by
                ``prompt.place``.
        """
        try:
            return self._completion(prompt)
        except InvalidRequest as error:
            raise _placed(error, prompt) from None

    def _completion(self, prompt: PoolingPrompt) -> PooledCompletion:
        options = prompt.options
        dimensions, normalize = options.get("dimensions"), options.get("normalize")
        if dimensions is not None and (isinstance(dimensions, bool) or not isinstance(dimensions, int)):
            raise InvalidRequest(f"dimensions must be an integer, not {dimensions!r}", "dimensions")
        if normalize is not None and not isinstance(normalize, bool):
            raise InvalidRequest(f"normalize must be true or false, not {normalize!r}", "normalize")
        self.check_task(prompt.task, dimensions)
        name, ids, pair_start = self._ids(prompt)
        self.manager.check_ids(name, ids, wants_new=False)
        spec = PoolingSpec(prompt.task, dimensions, normalize, pair_start, prompt.against, self._skip(prompt, len(ids)))
        problem = self.manager.outputs.problem(spec, len(ids))
        if problem is not None:
            raise InvalidRequest(problem, name)
        shared = cast(GenerateOptions, options)
        described = RequestSpec(
            NO_TOKENS,
            seed=0,
            cache_salt=cache_salt(shared),
            priority=priority(shared, self.manager.takes_priorities),
            pooling=spec,
            media=prompt.media,
        )
        return PooledCompletion(GenerateRequest(rids(shared, 1)[0], ids, described))

    def _ids(self, prompt: PoolingPrompt) -> tuple[str, list[int], int | None]:
        """Return the name of the input's field, its ids, and where the second text begins."""
        if prompt.encoded is not None:
            return "prompt", prompt.encoded, None
        options, most = prompt.options, self._most_tokens(prompt.options)
        if prompt.has_media:
            raise InvalidRequest("media are taken by encode and by embeddings alone", "image_data")
        if prompt.media is not None and most is not None:
            raise InvalidRequest(
                "an input with media is not cut: leave out truncate_prompt_tokens", "truncate_prompt_tokens"
            )
        if prompt.text is None:
            return "input_ids", token_ids("input_ids", prompt.input_ids)[:most], prompt.pair_start
        check_text("prompt", prompt.text)
        self._check_takes(prompt)
        pair = options.get("text_pair")
        if pair is not None and self.manager.pair_template is not None:
            instruction = self._instruction(options) or self._prompt_text(options.get("prompt_name")) or None
            return "prompt", self.manager.encode_pair(prompt.text, pair, instruction, most), None
        if options.get("instruction") is not None:
            raise InvalidRequest(
                "instruction is for models that score pairs by a template (see --chat-template), and this is none",
                "instruction",
            )
        text = self._prompt_text(options.get("prompt_name")) + prompt.text
        if self.sentences.lower_case:
            text, pair = text.lower(), None if pair is None else pair.lower()
        adds = options.get("add_special_tokens") is not False
        return "prompt", *self.manager.encode_input(text, pair, adds, most)

    def _check_takes(self, prompt: PoolingPrompt) -> None:
        """Raise InvalidRequest for a text of an embedder that was saved to read each as a message."""
        if prompt.text is not None and self.sentences.takes_messages:
            raise InvalidRequest(
                "the checkpoint's texts are messages of a conversation (sentence-transformers' modality_config): give "
                "`messages` to /v1/embeddings, or the ids of what the chat template makes of them",
                "prompt",
            )

    def _instruction(self, options: PoolingOptions) -> str | None:
        instruction = options.get("instruction")
        if instruction is not None:
            check_text("instruction", instruction)
        return instruction

    def _most_tokens(self, options: PoolingOptions) -> int | None:
        asked, limit = options.get("truncate_prompt_tokens"), min(self.manager.context_length, self.manager.max_req_len)
        if asked is None:
            return None
        if isinstance(asked, bool) or not isinstance(asked, int) or not (asked == -1 or 0 < asked <= limit):
            raise InvalidRequest(
                f"truncate_prompt_tokens must be -1 or a number of tokens up to {limit}, not {asked!r}",
                "truncate_prompt_tokens",
            )
        return limit if asked == -1 else asked

    def _prompt_text(self, name: str | None) -> str:
        """Return the text of sentence-transformers' that is put before an input."""
        sentences = self.sentences
        name = sentences.default_prompt_name if name is None else name
        if not name:
            return ""
        if name not in sentences.prompts:
            raise InvalidRequest(
                f"prompt_name is {name!r}, and the checkpoint has {list(sentences.prompts) or 'none'}", "prompt_name"
            )
        return sentences.prompts[name]

    def _skip(self, prompt: PoolingPrompt, num_tokens: int) -> int:
        """Return how many of an input's first tokens its vector does not depend on by itself: those of the text that
        was put before it, where the checkpoint says so (``include_prompt``), and special ones before that.

        Raises:
            InvalidRequest: the input has no other tokens.
        """
        if self.sentences.pools_prompt or prompt.task != EMBED or prompt.text is None:
            return 0
        before = self._prompt_text(prompt.options.get("prompt_name"))
        if not before:
            return 0
        count = self._tokens_before(before, prompt.options.get("add_special_tokens") is not False)
        if count >= num_tokens:
            raise InvalidRequest(
                f"the checkpoint's text before the input has {count} tokens, and the vector is made of those behind "
                f"them; all together there are {num_tokens}",
                "prompt_name",
            )
        return count

    def _tokens_before(self, text: str, adds_special_tokens: bool) -> int:
        """Return the number of tokens of a text that others follow, with the special ones at its beginning."""
        count = self._num_before.get((text, adds_special_tokens))
        if count is None:
            given = text.lower() if self.sentences.lower_case else text
            ids, _ = self.manager.encode_input(given, None, adds_special_tokens, None)
            count = len(ids) - (bool(ids) and ids[-1] in self.special_ids)
            self._num_before[text, adds_special_tokens] = count
        return count


def _placed(error: InvalidRequest, prompt: PoolingPrompt) -> InvalidRequest:
    """Return the error with the input's place."""
    return type(error)(f"{prompt.place}: {error}", error.param) if prompt.place else error
