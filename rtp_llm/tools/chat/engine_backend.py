"""The chat backend of an engine in this process."""

import argparse
import asyncio
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

import rtp_llm
from rtp_llm.srt.configs.options import ServerArgsError
from rtp_llm.srt.configs.server_args import DEMO_MODEL, ServerArgs
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams
from rtp_llm.tools.chat.conversation import ChatBackend, ContextFull, Message, Piece, Usage

MIN_ROOM = 64  # tokens for an answer; with less room the oldest turns are dropped

LoadingBar = Callable[[], AbstractContextManager[Callable[[int, int], None] | None]]


@contextmanager
def engine_backend(
    args: argparse.Namespace, sampling: dict[str, Any], loading_bar: LoadingBar
) -> Iterator[ChatBackend]:
    from rtp_llm.srt.chat.messages import MediaRules  # slow to import, and not needed for --url
    from rtp_llm.srt.checkpoint import read_chat_template
    from rtp_llm.srt.conversation import NO_CHAT_TEMPLATE

    if args.model_path is None:
        args.model_path = DEMO_MODEL
    if args.api_key is not None:
        raise ServerArgsError("--api-key is for a server; give its --url too")
    server_args = ServerArgs.from_cli_args(args)
    if server_args.skip_tokenizer_init:
        raise InvalidRequest("chat works on text: it cannot run with --skip-tokenizer-init")
    announce_demo(server_args)
    with loading_bar() as on_progress:
        engine = rtp_llm.Engine(server_args=server_args, on_progress=on_progress)
    with engine:
        if engine.tokenizer is None:
            raise InvalidRequest(f"{server_args.model_path} has no tokenizer; name one with --tokenizer-path")
        template = read_chat_template(server_args, engine.model_config, engine.tokenizer)
        if template is None:
            raise InvalidRequest(NO_CHAT_TEMPLATE)
        kinds = frozenset({"image"} if engine.model_config.is_multimodal else ())
        media = MediaRules(kinds, server_args.media_limits)
        yield EngineBackend(engine, template, media, engine.model_config.generation_defaults | sampling)


def announce_demo(server_args: ServerArgs) -> None:
    """Print to stderr that the embedded model answers, if it does, so that it is not taken for a large one."""
    if server_args.is_demo:
        print("No model named: this is the embedded demo model, a toy. Your own: --model-path DIR", file=sys.stderr)


class EngineBackend:
    """Generates with an engine in this process. Answers may fill the context unless ``sampling`` limits them."""

    def __init__(self, engine: Any, template: Any, media: Any, sampling: dict[str, Any]) -> None:
        self._engine = engine
        self._template = template
        self._media = media
        self._sampling = sampling

    def __call__(self, messages: list[Message]) -> Generator[Piece | Usage, None, None]:
        prompt = self._template.prompt(messages, media=self._media)
        ids = self._engine.tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens, verbose=False)[
            "input_ids"
        ]
        media = {"image_data": prompt.image_data} if prompt.image_data else {}
        prompt_len = self._len_with_images(ids, prompt.image_data) if media else len(ids)
        ends = {name: [*self._sampling.get(name, ()), *getattr(prompt, name)] for name in ("stop", "stop_token_ids")}
        params = SamplingParams.from_dict(self._sampling | ends | {"max_new_tokens": self._max_new_tokens(prompt_len)})
        with closing(self._engine.generate(input_ids=ids, sampling_params=params, stream=True, **media)) as results:
            num_sent = 0
            for result in results:
                yield Piece(result["text"][num_sent:])
                num_sent = len(result["text"])
        meta = result["meta_info"]
        reason = meta["finish_reason"]
        if reason["type"] == "abort":
            raise InvalidRequest(f"the request was ended: {reason['message']}")
        yield Usage(reason["type"], meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"])

    def _len_with_images(self, ids: list[int], image_data: list[Any]) -> int:
        """Return the prompt's tokens with those of its images, whose number depends on their size."""
        from rtp_llm.srt.managers.tokenizer_manager import Prompt  # slow to import, and not needed for --url

        prompt = Prompt(input_ids=ids, image_data=image_data)
        return len(asyncio.run(self._engine.tokenizer_manager.with_media(prompt)).input_ids)

    def _max_new_tokens(self, prompt_len: int) -> int:
        asked = self._sampling.get("max_new_tokens")
        limit = self._engine.info["max_req_len"]
        room = limit - prompt_len
        if room < (min(MIN_ROOM, limit // 2) if asked is None else asked):
            wanted = "an answer" if asked is None else f"an answer of {asked}"
            raise ContextFull(
                f"the conversation has {prompt_len} tokens, which leaves no room for {wanted}: the limit is {limit}"
            )
        return room if asked is None else asked
