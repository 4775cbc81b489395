"""Good requests for pooled outputs, and what must be the same in all of their answers."""

import json
from typing import Any

from hostile_requests import Good
from hostile_wire import Answer

TEXTS = ["the cat", "hello world", "a dog"]
PAIRS = {"query": "the cat", "documents": TEXTS}
# All paths of pooled outputs that an embedder has.
GOODS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": TEXTS},
    "/v1/embeddings/dense": {"input": "the cat"},
    "/v1/embeddings/colbert": {"input": TEXTS},
    "/v1/embeddings/similarity": {"left": TEXTS, "right": TEXTS[:2]},
    "/v1/rerank": PAIRS,
    "/v2/rerank": PAIRS,
    "/rerank": PAIRS,
    "/v1/score": {"text_1": "the cat", "text_2": TEXTS},
    "/score": {"text_1": "the cat", "text_2": TEXTS},
    "/pooling": {"input": TEXTS, "task": "token_embed"},
    "/encode": {"text": TEXTS},
    "/api/embed": {"input": TEXTS},
    "/api/embeddings": {"prompt": "the cat"},
}
# And those that it refuses, each with a body that is right elsewhere.
REFUSED: dict[str, dict[str, Any]] = {"/classify": {"input": TEXTS}, "/v1/embeddings/sparse": {"input": TEXTS}}


def pooled_requests() -> list[Good]:
    return [Good(path, body) for path, body in GOODS.items()]


def outline_of(answer: Answer) -> str:
    """Return the answer with its numbers rounded away: names, texts, whole numbers, and how many there are of all."""
    return json.dumps(_outline(json.loads(answer.body)), sort_keys=True)


def _outline(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("id", "created", "e2e_latency", "queue_time", "total_duration", "load_duration", "index")
        return {name: _outline(part) for name, part in value.items() if name not in left_out}
    if isinstance(value, list):
        parts = [_outline(part) for part in value]
        return [len(parts), sorted({json.dumps(part, sort_keys=True) for part in parts})]
    return "a number" if isinstance(value, float) else value
