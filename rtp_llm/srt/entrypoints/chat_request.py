"""A conversation whose next answer is wanted, whatever the dialect that asks: from messages and tools to answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from starlette.types import Receive

from rtp_llm.srt.chat.messages import ChatPrompt
from rtp_llm.srt.constrained.check import check_arguments
from rtp_llm.srt.constrained.spec import MAX_GRAMMAR_CHARS, asked_grammar
from rtp_llm.srt.conversation import Template
from rtp_llm.srt.entrypoints.asgi import unless_disconnected
from rtp_llm.srt.entrypoints.chat_answer import ChatAnswer, Parser
from rtp_llm.srt.entrypoints.serving import Serving
from rtp_llm.srt.entrypoints.thinking import thinking_spec
from rtp_llm.srt.managers.generate_options import GenerateOptions
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.parser.chat_parser import ChatParser
from rtp_llm.srt.parser.choose import begins_thinking, may_open_thinking
from rtp_llm.srt.parser.content_grammar import content_grammar
from rtp_llm.srt.parser.demanded_grammar import demanded_grammar
from rtp_llm.srt.parser.free_grammar import free_grammar
from rtp_llm.srt.parser.response_template import ResponseTemplateParser
from rtp_llm.srt.parser.rules import CannotWrite
from rtp_llm.srt.parser.schemas import ToolSchemas
from rtp_llm.srt.request_spec import GrammarSpec
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams

THINKING_SWITCHES = ("enable_thinking", "thinking")  # variables by which templates turn thinking on and off
NOT_BOTH = "leave out tools, or the form of the text"
EFFORT = "reasoning_effort"  # the variable by which templates set how much a model thinks


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What is asked for.

    Args:
        messages: in OpenAI's form.
        tools: the functions that the model sees, as templates get them.
        must_call: the answer must call one of those that may be called.
        callable_names: those that may be called; None: all.
        strict: names of those whose arguments fit their schemas, wherever they are called.
        has_single_call: calls after the first are left out, and a demanded one is the only one.
        begins_turn: the prompt ends with the beginning of an answer.
        continues: the answer goes on with the last message.
        variables: further ones of the chat template.
        separates_thinking: it is told from content.
        thinking_budget: most tokens of it; None: any number.
        default_max_new_tokens: see ``Prompt``; None: the room left.
        prefix_ids: token ids before the conversation's.
    """

    messages: Sequence[Mapping[str, Any]]
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    tools: Sequence[Mapping[str, Any]] = ()
    must_call: bool = False
    callable_names: frozenset[str] | None = None
    strict: frozenset[str] = frozenset()
    has_single_call: bool = False
    begins_turn: bool = True
    continues: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    separates_thinking: bool = True
    thinking_budget: int | None = None
    default_max_new_tokens: int | None = None
    prefix_ids: Sequence[int] = ()
    options: GenerateOptions = field(default_factory=GenerateOptions)

    @property
    def callable_tools(self) -> list[Mapping[str, Any]]:
        names = self.callable_names
        return [tool for tool in self.tools if names is None or tool["function"]["name"] in names]

    @property
    def binds_calls(self) -> bool:
        """Whether calls obey a grammar, even where the content may be any."""
        return self.must_call or self.callable_names is not None or bool(self.strict)

    @property
    def may_have_media(self) -> bool:
        return any(isinstance(message.get("content"), list) for message in self.messages)

    @property
    def continued(self) -> str | None:
        """The beginning of the answer, if it goes on with the last message."""
        content = self.messages[-1].get("content")
        return (content if isinstance(content, str) else "") if self.continues else None


async def render(serving: Serving, request: ChatRequest) -> ChatPrompt:
    """Return the prompt before it is encoded. Raise InvalidRequest for what the model or its template cannot take."""
    check_takes_tools(serving, request.tools)
    return await serving.render(
        request.messages,
        add_generation_prompt=request.begins_turn,
        continue_final_message=request.continues,
        variables=request.variables,
        tools=request.tools,
    )


async def encoded_chat(serving: Serving, request: ChatRequest) -> Prompt:
    """Return the encoded prompt."""
    return await serving.encode_chat(await render(serving, request))


async def answers_to(serving: Serving, request: ChatRequest, receive: Receive) -> list[ChatAnswer] | None:
    """Return the answers, not submitted yet; None if the client has gone while media were fetched and decoded."""
    loading = _answers(serving, request)
    return await (unless_disconnected(receive, loading) if request.may_have_media else loading)


async def _answers(serving: Serving, request: ChatRequest) -> list[ChatAnswer]:
    chat = await render(serving, request)
    encoded = await serving.encode_chat(chat)
    if request.prefix_ids:
        encoded = replace(encoded, input_ids=_after(serving, request.prefix_ids, encoded.input_ids))
    params = _with_stops(request.sampling_params, chat)
    if request.must_call:  # the answer has no content, which alone this is the form of
        params = replace(params, response_format=None)
    has_form = not request.must_call and asked_grammar(params) is not None
    grammar = None
    if request.binds_calls or (request.tools and has_form):
        write = partial(_grammar_of_calls, serving, request, chat, has_form)
        grammar = await serving.off_loop(0, write, has_grammar=True)
    around = None
    if has_form:
        around = _around_form(serving, request, chat) if grammar is None else grammar
    prompt = replace(
        encoded,
        sampling_params=params,
        default_max_new_tokens=request.default_max_new_tokens,
        grammar=None if grammar is None or has_form else GrammarSpec("grammar", grammar),
        around=around,
        thinking=thinking_spec(serving, chat, request.thinking_budget, request.continued),
        options=request.options,
    )
    requests = await serving.requests(prompt)
    completions = [serving.manager.completion(item, serving.answer_tags) for item in requests]
    max_calls = 1 if request.has_single_call else None
    return [ChatAnswer(item, _parser(serving, request, chat), max_calls) for item in completions]


def _after(serving: Serving, prefix_ids: Sequence[int], ids: list[int]) -> list[int]:
    """Return both, without the token that begins texts where they meet."""
    begins = ids[:1] == [serving.manager.tokenizer.bos_token_id]
    return [*prefix_ids, *(ids[1:] if begins else ids)]


def _with_stops(params: SamplingParams, chat: ChatPrompt) -> SamplingParams:
    """Add the stop strings and ids of the conversation's format."""
    stop = list(dict.fromkeys([*params.stop, *chat.stop]))
    return replace(params, stop=stop, stop_token_ids=sorted({*params.stop_token_ids, *chat.stop_token_ids}))


def _parser(serving: Serving, request: ChatRequest, chat: ChatPrompt) -> Parser | None:
    """Return a parser for one answer; None: all of it is content."""
    separates = request.separates_thinking
    if serving.response_template is not None:
        return ResponseTemplateParser(serving.response_template, chat.text, list(request.tools) or None, separates)
    form = serving.answer_format
    if form.is_plain:
        return None
    begins = separates and begins_thinking(form, chat.text, request.continued)
    return ChatParser(form, ToolSchemas(request.tools) if request.tools else None, begins, separates)


def _grammar_of_calls(serving: Serving, request: ChatRequest, chat: ChatPrompt, has_form: bool) -> str:
    """Return the grammar of answers that call what is demanded, or of free ones whose calls obey schemas.

    The core compiles it; what is found there ends the request with a 400.

    Args:
        has_form: content is of a form, and calls stand in its place: the grammar is one around the content's.
    """
    is_chosen = request.must_call or request.callable_names is not None
    asked = "tool_choice" if is_chosen else "strict" if request.strict else "tools"
    tools = request.callable_tools
    bound = [tool for tool in tools if request.must_call or tool["function"]["name"] in request.strict]
    for tool in bound:
        try:
            check_arguments(tool["function"]["parameters"])
        except InvalidRequest as error:
            raise InvalidRequest(f"{asked}: the parameters of {tool['function']['name']}: {error}", "tools") from None
    try:
        thinks = begins_thinking(serving.answer_format, chat.text, request.continued)
        text = _written_grammar(serving, request, thinks, has_form)
    except (CannotWrite, RecursionError) as error:
        reason = error if isinstance(error, CannotWrite) else "a schema is nested too deeply"
        raise InvalidRequest(
            f"{asked}: there is no grammar of these tools' calls in the form of this model ({reason}): "
            + ("leave it out, or choose 'auto'" if is_chosen else "leave it out" if not has_form else NOT_BOTH),
            "tool_choice" if is_chosen else "tools",
        ) from None
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(
            f"{asked}: the grammar of these {len(tools)} tools has {len(text)} characters; at most "
            f"{MAX_GRAMMAR_CHARS} are taken: give fewer",
            "tools",
        )
    return text


def _written_grammar(serving: Serving, request: ChatRequest, thinks: bool, has_form: bool) -> str:
    if serving.response_template is not None:
        raise CannotWrite("its tokenizer's response_template describes it")
    form, token_ids, tools = serving.answer_format, serving.special_token_ids, request.callable_tools
    if request.must_call:
        return demanded_grammar(form, tools, token_ids, thinks, request.has_single_call)
    if not request.separates_thinking:  # then calls are looked for in it
        form, thinks = replace(form, thinking=None), False
    if has_form:
        return content_grammar(form, tools, request.strict, token_ids, thinks, request.has_single_call)
    return free_grammar(form, tools, request.strict, token_ids, thinks, request.has_single_call)


def _around_form(serving: Serving, request: ChatRequest, chat: ChatPrompt) -> str | None:
    """Return the grammar around that of the content, of an answer that may think first; None: all of it is content."""
    form = serving.answer_format
    if not request.separates_thinking or serving.response_template is not None:
        return None
    thinks = begins_thinking(form, chat.text, request.continued)
    may_think = thinks or (request.continued is None and may_open_thinking(form, chat.text))
    return content_grammar(form, (), frozenset(), serving.special_token_ids, thinks, True) if may_think else None


def check_takes_tools(serving: Serving, tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise InvalidRequest if there are tools and the model's calls could not be told from text."""
    if tools and serving.response_template is None and not serving.answer_format.has_calls:
        raise InvalidRequest(
            "the form of this model's tool calls is not known from its chat template: start the server with "
            "--tool-call-parser, or leave out tools",
            "tools",
        )


def thinking_variables(template: Template | None, thinks: bool | None, effort: str | None) -> dict[str, Any]:
    """Return the variables by which a template turns thinking on or off, and sets how much, as far as it has them.

    Args:
        thinks, effort: what is wanted; None: nothing.
    """
    known = frozenset() if template is None else template.variables
    asked: dict[str, Any] = {} if thinks is None else {name: thinks for name in THINKING_SWITCHES if name in known}
    return asked if effort is None or EFFORT not in known else asked | {EFFORT: effort}
