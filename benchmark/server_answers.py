"""Answers from a server with OpenAI's /v1/completions: ours, or any other."""

import argparse
import asyncio
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

from benchmark.evaluation import EvaluationError, Reply, positive
from rtp_llm.tools.bench_serving.async_http import BadAddress, BrokenResponse, HttpClient, RequestFailed
from rtp_llm.tools.bench_serving.workloads import WorkloadError, load_tokenizer

CHARS_PER_TOKEN = 4  # the estimate where nobody counts


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Which server, how it is asked, and who counts the tokens of prompts."""
    add_address_options(parser)
    add_counting_options(parser)


def add_address_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="the server's address, with or without /v1, instead of --host and --port")
    parser.add_argument("--host", help="the server's host (127.0.0.1)")
    parser.add_argument("--port", type=positive, help="the server's port (30000)")
    parser.add_argument("--model", help="the model's name; unset: the first that the server lists")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--parallel", "--concurrency", type=positive, default=64, help="most requests at once")
    parser.add_argument("--request-timeout", type=float, default=3600.0, help="seconds until a request fails")


def add_counting_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        help="directory, file or hub id of a tokenizer.json that counts tokens; unset: the server's /tokenize, or "
        f"{CHARS_PER_TOKEN} characters for a token where it has none",
    )
    parser.add_argument(
        "--context-length", type=positive, help="tokens, prompt and answer together; unset: what /tokenize tells, if so"
    )


class ServerAnswers:
    """An Answerer (see benchmark/evaluation.py) over HTTP, with at most ``args.parallel`` requests at once.

    Raises:
        EvaluationError: there is no such server, it lists no model, or there is no such tokenizer.
    """

    backend = "server"

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        try:
            self._client = HttpClient(_root_url(args), args.api_key, args.request_timeout, keep_connections=False)
            self._tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
        except (BadAddress, WorkloadError) as error:
            raise EvaluationError(str(error)) from None

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner()
        try:
            self._runner.run(self._meet())
        except (RequestFailed, EvaluationError) as error:
            self.__exit__()
            raise EvaluationError(f"{_root_url(self._args)}: {error}") from None
        return self

    def __exit__(self, *exception: Any) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    async def _meet(self) -> None:
        """Finds out what is served, how long its context is, and who counts tokens."""
        self._gate = asyncio.Semaphore(self._args.parallel)
        self.model = self._args.model or await self._served_model()
        self.context_len = self._args.context_length
        try:
            _, max_model_len = await self._tokenize("x")
        except RequestFailed as error:
            self._server_counts = False
            self.counting = f"estimate, {CHARS_PER_TOKEN} characters each, as the server has no /tokenize ({error})"
        else:
            self._server_counts = True
            self.counting = "the server's /tokenize"
            self.context_len = self.context_len or max_model_len
        if self._tokenizer is not None:
            self.counting = self._args.tokenizer

    async def _served_model(self) -> str:
        try:
            return str((await self._client.request_json("GET", "/v1/models"))["data"][0]["id"])
        except (LookupError, TypeError):
            raise EvaluationError("the server lists no model; name one with --model") from None

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        if self._tokenizer is not None:
            return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(prompts))]
        if not self._server_counts:
            return [math.ceil(len(prompt) / CHARS_PER_TOKEN) for prompt in prompts]
        try:
            return self._runner.run(self._count(prompts))
        except RequestFailed as error:
            raise EvaluationError(f"the server's /tokenize: {error}") from None

    async def _count(self, prompts: Sequence[str]) -> list[int]:
        async def count(prompt: str) -> int:
            async with self._gate:
                return (await self._tokenize(prompt))[0]

        return await asyncio.gather(*map(count, prompts))

    async def _tokenize(self, prompt: str) -> tuple[int, int | None]:
        """(tokens of a prompt, the context's length if it is told), asked as vLLM, SGLang and our server have it."""
        body = json.dumps({"model": self.model, "prompt": prompt}).encode()
        answer = await self._client.request_json("POST", "/tokenize", body)
        if not isinstance(answer, dict) or not isinstance(answer.get("count"), int):
            raise BrokenResponse("/tokenize tells no count of tokens")
        max_model_len = answer.get("max_model_len")
        return answer["count"], max_model_len if isinstance(max_model_len, int) else None

    def answer(
        self, prompts: Sequence[str], max_new_tokens: int, stop: tuple[str, ...], on_done: Callable[[], None]
    ) -> list[Reply]:
        bodies = [self._body(prompt, max_new_tokens, stop) for prompt in prompts]

        async def all_of_them() -> list[Reply]:
            return await asyncio.gather(*(self._reply(body, on_done) for body in bodies))

        return self._runner.run(all_of_them())

    def _body(self, prompt: str, max_new_tokens: int, stop: tuple[str, ...]) -> bytes:
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": max_new_tokens, "temperature": 0}
        if stop:
            body["stop"] = stop
        return json.dumps(body).encode()

    async def _reply(self, body: bytes, on_done: Callable[[], None]) -> Reply:
        async with self._gate:
            try:
                reply = read_completion(await self._client.request_json("POST", "/v1/completions", body))
            except RequestFailed as error:
                reply = Reply(error=str(error))
        on_done()
        return reply


def read_completion(answer: Any) -> Reply:
    """The reply in an answer of /v1/completions. Raises BrokenResponse if it is none."""
    try:
        text = answer["choices"][0]["text"]
        num_tokens = (answer.get("usage") or {}).get("completion_tokens")
    except (LookupError, TypeError, AttributeError):
        raise BrokenResponse("/v1/completions sent no completion") from None
    if not isinstance(text, str):
        raise BrokenResponse(f"a completion's text must be a string, not {text!r}")
    return Reply(text, num_tokens if isinstance(num_tokens, int) else None)


def _root_url(args: argparse.Namespace) -> str:
    if args.url and (args.host or args.port):
        raise EvaluationError("give either --url or --host and --port")
    url = args.url or f"http://{args.host or '127.0.0.1'}:{args.port or 30000}"
    return url.rstrip("/").removesuffix("/v1")
