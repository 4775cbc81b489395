"""Requests of every kind, each made from a seed and its number alone: number 17 of seed 3 is always the same."""

import gzip
import json
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import hostile_heads as heads
import hostile_values as values
from hostile_heavy import HEAVY
from hostile_media import bombs, data_uri, forbidden_sources, good_png, png
from hostile_values import Pairs, Raw, Schemas, encode
from hostile_wire import CloseWriting, HangUp, Pause, Plan, ReadSome, Send, Step, request

ALIASES = {
    "/chat/completions": "/v1/chat/completions",
    "/chat/completions/input_tokens": "/v1/chat/completions/input_tokens",
    "/completions": "/v1/completions",
    "/v1/tokenize": "/tokenize",
    "/v1/detokenize": "/detokenize",
    "/v1/health": "/health",
    "/models": "/v1/models",
    "/ready": "/health",
    "/ping": "/health",
    "/get_model_info": "/model_info",
    "/get_server_info": "/server_info",
}


@dataclass(frozen=True, slots=True)
class Good:
    """A request whose answer is known. ``body`` is greedy; the text of its first choice is the answer."""

    path: str
    body: dict[str, Any]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def key(self) -> str:
        return json.dumps([self.path, self.body], sort_keys=True)

    @property
    def question(self) -> str:
        """What must lead to the same answer: the same request, streamed or not."""
        return json.dumps([self.path, {k: v for k, v in self.body.items() if k != "stream"}], sort_keys=True)


@dataclass(frozen=True, slots=True)
class Case:
    number: int
    kind: str
    plan: Plan
    good: tuple[Good, ...] = ()  # what its answers must be right for, in their order
    may_abort: bool = False  # it may end requests of others


def good_requests() -> list[Good]:
    """Short, greedy, of all endpoints that generate; each also streamed."""
    image = {"type": "image_url", "image_url": {"url": data_uri(good_png(Random(5)))}}
    chats: list[Any] = [
        "What is 17 + 25?",
        "Spell planet.",
        [image, {"type": "text", "text": "What is in the picture?"}],
    ]
    whole = [
        Good("/v1/chat/completions", {"messages": [{"role": "user", "content": c}], "temperature": 0, "max_tokens": 24})
        for c in chats
    ]
    short = {"options": {"temperature": 0, "num_predict": 12}, "stream": False}
    whole += [
        Good("/api/chat", {"messages": [{"role": "user", "content": chats[0]}], **short}),
        Good("/api/generate", {"prompt": chats[1], **short}),
    ]
    for prompt in ("<|user|>What comes after 399?<|end|><|assistant|>", "one two three"):
        options = {"temperature": 0, "ignore_eos": True}
        whole += [
            Good("/v1/completions", {"prompt": prompt, "max_tokens": 12} | options),
            Good("/generate", {"text": prompt, "sampling_params": {"max_new_tokens": 12} | options}),
        ]
    return [*whole, *(Good(good.path, good.body | {"stream": True}) for good in whole)]


class Generator:
    """Cases by their numbers.

    Args:
        document: the server's /openapi.json.
        canary_port: where something listens on this machine that no request may lead the server to.
        goods: right requests; None: those of ``good_requests``, to a server of the embedded model. If they are given,
            bodies are only sent to their paths and those of ``refused``.
        refused: paths -> bodies that the server refuses whatever is in them.
    """

    def __init__(
        self,
        document: dict[str, Any],
        seed: int,
        canary_port: int,
        goods: Sequence[Good] | None = None,
        refused: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self._schemas = Schemas(document)
        self._seed = seed
        self._forbidden = forbidden_sources(canary_port)
        self._good = good_requests() if goods is None else list(goods)
        self._bodies = {good.path: good.body for good in goods or ()} | dict(refused or {})
        self._operations: list[tuple[str, str, dict[str, Any] | None]] = []
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                content = operation.get("requestBody", {}).get("content", {})
                self._operations.append((method.upper(), path, content.get("application/json", {}).get("schema")))
        aliased = [
            (m, alias, schema) for alias, path in ALIASES.items() for m, p, schema in self._operations if p == path
        ]
        self._operations += aliased
        self._with_body = [
            (path, schema)
            for _, path, schema in self._operations
            if schema is not None and (path in self._bodies or not self._bodies)
        ]
        self.kinds: dict[str, tuple[int, Callable[[Random], Plan | tuple[Plan, tuple[Good, ...]]]]] = {
            "good": (14, self._good_case),
            "pipelined": (3, self._pipelined),
            "fields": (26, self._fields),
            "mutated": (10, self._mutated),
            "garbage": (7, self._garbage),
            "content type": (4, self._content_type),
            "framing": (8, self._framing),
            "headers": (6, self._headers),
            "paths": (7, self._paths),
            "hang-up": (6, self._hang_up),
            "media": (4, self._media),
            "sources": (3, self._sources),
            "template": (2, self._template),
            "no body": (4, self._no_body),
        }

    def case(self, number: int) -> Case:
        """Return the case of a number; numbers below 0 are those of HEAVY, in order."""
        if number < 0:
            name = list(HEAVY)[-1 - number]
            return Case(number, name, HEAVY[name]())
        draw = Random(f"{self._seed}:{number}")
        weights = [weight for weight, _ in self.kinds.values()]
        kind = draw.choices(list(self.kinds), weights)[0]
        made = self.kinds[kind][1](draw)
        plan, good = made if isinstance(made, tuple) else (made, ())
        return Case(number, kind, plan, good, may_abort=b"abort_all" in plan.sent)

    # Whole and right

    def _good_case(self, draw: Random) -> tuple[Plan, tuple[Good, ...]]:
        good = draw.choice(self._good)
        return Plan((Send(_as_request(good)),)), (good,)

    def _pipelined(self, draw: Random) -> tuple[Plan, tuple[Good, ...]]:
        """Several at once on one connection; the last one closes it."""
        goods = tuple(draw.choice(self._good) for _ in range(draw.randrange(2, 5)))
        kept = [_as_request(good, {"Connection": "keep-alive"}) for good in goods[:-1]]
        data = b"".join([*kept, _as_request(goods[-1])])
        cut = draw.randrange(len(data))
        return Plan((Send(data[:cut]), Send(data[cut:])), ("POST",) * len(goods)), goods

    # Bodies

    def _minimal(self, path: str, draw: Random) -> dict[str, Any]:
        """A body that is right, and asks for little."""
        if path in self._bodies:
            return dict(self._bodies[path])
        match ALIASES.get(path, path):
            case "/v1/chat/completions":
                return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": draw.randrange(1, 6)}
            case "/v1/completions":
                return {"prompt": draw.choice(("hi", ["a", "b"], [5, 6, 7])), "max_tokens": draw.randrange(1, 6)}
            case "/api/chat":
                options = {"num_predict": draw.randrange(1, 6)}
                return {"messages": [{"role": "user", "content": "hi"}], "options": options}
            case "/api/generate":
                return {"prompt": "hi", "options": {"num_predict": draw.randrange(1, 6)}}
            case "/generate":
                return {"text": "hi", "sampling_params": {"max_new_tokens": draw.randrange(1, 6)}}
            case "/completion":
                return {"prompt": draw.choice(("hi", ["a", "b"], [5, 6, "x"])), "n_predict": draw.randrange(1, 6)}
            case "/infill":
                return {"input_prefix": "def f(", "input_suffix": "):", "n_predict": draw.randrange(1, 6)}
            case "/apply-template" | "/v1/chat/completions/input_tokens":
                return {"messages": [{"role": "user", "content": "hi"}]}
            case "/tokenize":
                return {"prompt": "the cat"}
            case "/detokenize":
                return {"tokens": [5, 6, 7]}
            case "/v1/rerank" | "/v2/rerank":
                return {"query": "hi", "documents": ["a", "b"]}
            case "/v1/score":
                return {"text_1": "hi", "text_2": ["a", "b"]}
            case "/v1/embeddings" | "/classify" | "/pooling" | "/v1/embeddings/sparse" | "/v1/embeddings/colbert":
                return {"input": draw.choice(("hi", ["a", "b"], [5, 6, 7]))}
            case "/v1/embeddings/similarity":
                return {"left": ["hi"], "right": ["a", "b"]}
            case "/encode":
                return {"text": "hi"}
            case "/api/embed":
                return {"input": "hi"}
            case "/api/embeddings":
                return {"prompt": "hi"}
            case "/abort_request":
                return {"rid": draw.choice(("a", "b", "nobody"))}
        return {}

    def _fields(self, draw: Random) -> Plan:
        """Some fields with values that their type allows, some with others, one perhaps unknown."""
        path, schema = draw.choice(self._with_body)
        body = self._minimal(path, draw) | self._bounded(
            self._schemas.object(self._schemas.resolved(schema), draw), draw
        )
        fields = list(self._schemas.resolved(schema).get("properties", {}))
        for _ in range(draw.choice((0, 0, 1, 1, 1, 3))):
            body[draw.choice(fields)] = values.anything(draw)
        if draw.random() < 0.1:
            body[
                draw.choice(("x", "", "__proto__", "messages\0", "tools", "response_format", "\ud800", "n" * 10_000))
            ] = values.anything(draw)
        return _post(path, encode(body))

    def _bounded(self, body: dict[str, Any], draw: Random) -> dict[str, Any]:
        """Leaves out most of what would keep the server busy for long, and aborting all most of the time."""
        for name in ("n", "n_cmpl", "n_predict", "max_tokens", "max_completion_tokens", "min_tokens", "best_of"):
            if isinstance(body.get(name), int) and body[name] > 8 and draw.random() < 0.9:
                del body[name]
        options = body.get("options")
        if isinstance(options, dict) and draw.random() < 0.9:
            options["num_predict"] = draw.randrange(1, 6)
        if draw.random() < 0.9:
            body.pop("abort_all", None)
        return body

    def _mutated(self, draw: Random) -> Plan:
        """A right body with one place, however deep, changed."""
        path, schema = draw.choice(self._with_body)
        body: Any = self._minimal(path, draw)
        if draw.random() < 0.4:
            body |= self._bounded(self._schemas.object(self._schemas.resolved(schema), draw), draw)
        for _ in range(draw.choice((1, 1, 2))):
            body = _changed(body, draw)
        return _post(path, encode(body))

    def _garbage(self, draw: Random) -> Plan:
        path, _ = draw.choice(self._with_body)
        whole = encode(self._minimal(path, draw))
        make: Callable[[], bytes] = draw.choice(
            (
                lambda: whole[: draw.randrange(len(whole))],
                lambda: whole + draw.choice((b"x", b"{}", b"\0", b"]", whole)),
                lambda: b"\xef\xbb\xbf" + whole,
                lambda: whole.decode().encode(draw.choice(("utf-16", "utf-32", "utf-16-be"))),
                lambda: gzip.compress(whole, mtime=0),
                lambda: bytes(draw.randrange(256) for _ in range(draw.randrange(1, 300))),
                lambda: _flipped(whole, draw),
                lambda: encode(values.anything(draw, big=0.05)),
                lambda: b"",
                lambda: b" " * draw.choice((1, 1000, 1_000_000)) + whole,
                lambda: b'{"' + b'a":1,"' * 50_000 + b'b":1}',
                lambda: b"1" * draw.choice((4300, 4301, 100_000)),
                lambda: b'"' + b"\\u0000" * 50_000 + b'"',
            )
        )
        extra = {"Content-Encoding": draw.choice(("gzip", "br", "identity", "x"))} if draw.random() < 0.1 else {}
        return _post(path, make(), extra)

    def _content_type(self, draw: Random) -> Plan:
        path, _ = draw.choice(self._with_body)
        kind = draw.choice(heads.CONTENT_TYPES)
        body = draw.choice((encode(self._minimal(path, draw)), b"prompt=a&max_tokens=1", b"--x\r\n\r\na\r\n--x--"))
        return Plan((Send(request("POST", path, body, content_type=kind or None)),))

    def _template(self, draw: Random) -> Plan:
        """Variables of the chat template, whatever it makes of them."""
        names = (
            "suffix",
            "rounds",
            "names",
            "enable_thinking",
            "messages",
            "self",
            "tools",
            "range",
            "raise_exception",
            "x",
            "\ud800",
            "",
        )
        variables = Pairs(tuple((draw.choice(names), self._variable(draw)) for _ in range(draw.randrange(1, 4))))
        path = draw.choice(("/v1/chat/completions", "/tokenize"))
        body = {"messages": [{"role": "user", "content": draw.choice(("hi", "{{ 7 * 7 }}", "{% raw %}"))}]}
        body |= {"chat_template_kwargs": variables} | ({"max_tokens": 2} if "chat" in path else {})
        return _post(path, encode(body))

    def _variable(self, draw: Random) -> Any:
        long = Raw(b"[" + b",".join([b'"a"'] * 4000) + b"]")
        return draw.choice((values.anything(draw), draw.choice((10**5, 10**6, 2**62, -1, 1e300)), long, "{{ self }}",
        "a" * 100_000,
                            {"__class__": {"__mro__": []}}, [[[]]], {"items": 1, "keys": 2, "strip": 3}))  # fmt: skip

    def _media(self, draw: Random) -> Plan:
        name = draw.choice(list(_bombs()))
        data, kind = _bombs()[name], draw.choice(("image", "image", "image", "video"))
        if draw.random() < 0.1:
            data = png(64, 64, bytes(draw.randrange(256) for _ in range(draw.randrange(2000))))
        source: Any = data_uri(data, draw.choice((f"{kind}/png", "application/x", "", "image/webp;charset=x")))
        if draw.random() < 0.1:
            source = source.partition(",")[2]  # base64 alone
        return _with_media(draw, kind, source, draw.choice((1, 1, 1, 2, 30)))

    def _sources(self, draw: Random) -> Plan:
        source = draw.choice(self._forbidden) if draw.random() < 0.85 else values.anything(draw)
        return _with_media(draw, draw.choice(("image", "video")), source, draw.choice((1, 1, 3)))

    # Framing, headers, paths

    def _framing(self, draw: Random) -> Plan:
        path, _ = draw.choice(self._with_body)
        whole, must = heads.framing(path, encode(self._minimal(path, draw)), draw)
        steps: list[Step] = [Send(whole)]
        if draw.random() < 0.3:
            cut = draw.randrange(len(whole))
            steps = [Send(whole[:cut]), Pause(0.01), Send(whole[cut:])]
        return Plan((*steps, *([] if must else [CloseWriting()])), must_answer=must)

    def _headers(self, draw: Random) -> Plan:
        path, _ = draw.choice(self._with_body)
        whole = heads.headers(path, encode(self._minimal(path, draw)), draw)
        return Plan((Send(whole), CloseWriting()), must_answer=False)

    def _paths(self, draw: Random) -> Plan:
        known = [path for _, path, _ in self._operations]
        path = draw.choice(heads.UNKNOWN_PATHS if draw.random() < 0.6 else known).replace(
            "{model}", self._model_name(draw)
        )
        method = draw.choice(heads.METHODS)
        body = draw.choice((None, b"{}", b"x"))
        is_plain = path.isascii() and path.startswith("/") and len(path) < 50_000
        must = is_plain and method.isupper() and method != "CONNECT"
        steps = [Send(request(method, path, body)), *([] if must else [CloseWriting()])]
        return Plan(tuple(steps), (method,), must_answer=must)

    def _no_body(self, draw: Random) -> Plan:
        """What the document names, as it names it."""
        found = [(method, path) for method, path, schema in self._operations if schema is None]
        method, path = draw.choice(found)
        target = path.replace("{model}", self._model_name(draw))
        return Plan((Send(request(method, target, draw.choice((None, None, b"", b"{}")))),), (method,))

    def _model_name(self, draw: Random) -> str:
        name = draw.choice(("rtp-llm-demo", values.text(draw).replace("\ud83d", "").replace("\ud800", "")))
        return urllib.parse.quote(name.encode("utf-8", "replace"), safe="")[:3000]

    # Hang-ups

    def _hang_up(self, draw: Random) -> Plan:
        good = draw.choice(self._good)
        body = good.body | draw.choice(({}, {"stream": True}))
        if self._bodies:  # what its client asked for must not keep the server busy
            body = {name: value * 40 if isinstance(value, list) else value for name, value in good.body.items()}
        elif "/v1" in good.path:
            body |= {"max_tokens": 200, "ignore_eos": True}
        elif "/api" in good.path:
            body |= {"options": {"temperature": 0, "num_predict": 200}}
        else:
            body |= {"sampling_params": good.body["sampling_params"] | {"max_new_tokens": 200}}
        whole = _as_request(Good(good.path, body))
        cut = draw.choice((draw.randrange(len(whole)), len(whole), len(whole), whole.index(b"\r\n\r\n") + 4))
        steps: list[Step] = [Send(whole[:cut])]
        if cut == len(whole):
            steps.append(draw.choice((Pause(0.0), Pause(0.02), ReadSome(draw.choice((1, 300, 3000))))))
        return Plan((*steps, HangUp(reset=draw.random() < 0.5)), (), must_answer=False)


@cache
def _bombs() -> dict[str, bytes]:
    return bombs()


def _as_request(good: Good, headers: dict[str, str] | None = None) -> bytes:
    return request("POST", good.path, json.dumps(good.body).encode(), headers)


def _post(path: str, body: bytes, headers: dict[str, str] | None = None) -> Plan:
    return Plan((Send(request("POST", path, body, headers)),))


def _with_media(draw: Random, kind: str, source: Any, count: int) -> Plan:
    if draw.random() < 0.25:
        placeholder = f"<|vision_start|><|{kind}_pad|><|vision_end|>"
        body = {"text": placeholder * count, "sampling_params": {"max_new_tokens": 2}, f"{kind}_data": [source] * count}
        return _post("/generate", encode(body))
    url = {"url": source} if draw.random() < 0.8 else source
    if isinstance(url, dict) and draw.random() < 0.3:
        url[draw.choice(("detail", "fps", "max_frames", "min_frames", "x"))] = values.scalar(draw)
    part = {"type": f"{kind}_url", f"{kind}_url": url}
    messages = [{"role": "user", "content": [part] * count + [{"type": "text", "text": "What is in the picture?"}]}]
    path = draw.choice(("/v1/chat/completions",) * 3 + ("/tokenize",))
    return _post(path, encode({"messages": messages} | ({"max_tokens": 2} if "chat" in path else {})))


def _flipped(data: bytes, draw: Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        flipped[draw.randrange(len(flipped))] = draw.randrange(256)
    return bytes(flipped)


def _changed(value: Any, draw: Random) -> Any:
    """The value with something in it replaced, doubled, removed or wrapped."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(list(value))
        match draw.randrange(8):
            case 0:
                return Pairs((*value.items(), (name, values.anything(draw))))
            case 1:
                return {k: v for k, v in value.items() if k != name}
            case 2:
                return value | {values.text(draw): value[name]}
        return value | {name: _changed(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        match draw.randrange(6):
            case 0:
                return value * draw.choice((0, 2, 3, 100))
            case 1:
                return [*value, values.anything(draw)]
        return [*value[:at], _changed(value[at], draw), *value[at + 1 :]]
    return draw.choice((values.anything(draw), [value], {"a": value}, None))
