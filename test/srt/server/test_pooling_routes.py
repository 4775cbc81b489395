"""Pooled outputs in other servers' forms: /pooling, /encode, RTP-LLM's vectors, and Ollama's."""

import base64
import json
import math
import socket
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import transformers
from scripted_core import SPECIAL, ScriptedCore, make_spoken_checkpoint, scripted

from rtp_llm.srt.entrypoints import pooled
from rtp_llm.srt.entrypoints.routes import dialect_lines
from rtp_llm.srt.managers.scoring import token_weights
from rtp_llm.srt.messages import FinishReason
from rtp_llm.srt.pooling import PooledOutputs, PoolingTask
from tiny_models import make_tiny
from tiny_server import InProcess, in_process, make_checkpoint, wait_for

pytestmark = pytest.mark.xdist_group("server-pooling")

TEXTS = ["the cat", "hello world", "a dog"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("with-tokenizer")))
    make_tiny("BertModel", folder, vocab_size=len(tokenizer), max_position_embeddings=64)
    tokenizer.save_pretrained(folder)
    with in_process(str(folder), max_sequences_per_request=8, dtype="float32") as running:
        yield running


def post(server: InProcess, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def good(server: InProcess, path: str, body: Any) -> Any:
    response = post(server, path, body)
    assert response.status_code == 200, response.text
    return response.json()


def told(response: httpx.Response) -> str:
    """The message of a refusal, in any dialect."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error if isinstance(error, str) else error["message"]


@pytest.fixture(scope="module")
def vectors(embedder: InProcess) -> list[list[float]]:
    return [item["embedding"] for item in good(embedder, "/v1/embeddings/dense", {"input": TEXTS})["data"]]


def near(found: list[list[float]], wanted: list[list[float]]) -> bool:
    return [[pytest.approx(x, abs=1e-6) for x in vector] for vector in wanted] == found


def test_pooling_gives_any_output(embedder: InProcess, vectors: list[list[float]]) -> None:
    body = good(embedder, "/pooling", {"input": TEXTS, "model": "tiny"})
    assert (body["object"], body["model"], body["id"][:5]) == ("list", "tiny", "pool-")
    assert near([item["data"] for item in body["data"]], vectors)
    assert {item["object"] for item in body["data"]} == {"pooling"} and body["usage"]["total_tokens"] > 0
    count = good(embedder, "/tokenize", {"prompt": TEXTS[0]})["count"]
    asked = {"input": TEXTS[0], "task": "token_embed"}
    [lines] = [item["data"] for item in good(embedder, "/pooling", asked)["data"]]
    assert len(lines) == count
    [text] = [item["data"] for item in good(embedder, "/pooling", asked | {"encoding_format": "base64"})["data"]]
    flat = [x for line in lines for x in line]
    assert array("f", base64.b64decode(text)).tolist() == flat  # type: ignore[arg-type]
    [raw] = [item["data"] for item in good(embedder, "/pooling", asked | {"use_activation": False})["data"]]
    assert not near(raw, lines)
    short = good(embedder, "/pooling", {"input": TEXTS[0], "dimensions": 3})["data"][0]["data"]
    assert len(short) == 3
    response = post(embedder, "/pooling", {"input": "a", "task": "score"})
    assert "this model has no output 'score': it has embed, token_embed" in told(response)
    assert response.json()["error"]["param"] == "task"


def test_encode_has_sglangs_form(embedder: InProcess, vectors: list[list[float]]) -> None:
    one = good(embedder, "/encode", {"text": TEXTS[0], "sampling_params": {}})
    assert near([one["embedding"]], vectors[:1]) and one["meta_info"]["prompt_tokens"] > 0
    several = good(embedder, "/encode", {"text": TEXTS, "rid": ["a", "b", "c"]})
    assert near([item["embedding"] for item in several], vectors)
    assert [item["meta_info"]["id"] for item in several] == ["a", "b", "c"]
    ids = good(embedder, "/tokenize", {"prompt": TEXTS[1]})["tokens"]
    assert near([good(embedder, "/encode", {"input_ids": ids})["embedding"]], vectors[1:2])
    assert len(good(embedder, "/encode", {"input_ids": [ids, ids]})) == 2
    for body, words in (
        ({}, "either text or input_ids"),
        ({"text": "a", "input_ids": [3]}, "either text or input_ids"),
        ({"text": []}, "text is empty"),
        ({"text": ["a", "b"], "rid": "one"}, "a list of 2 names"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": ["a"] * 9}, "at most 8"),
    ):
        assert words in told(post(embedder, "/encode", body))


def test_rtp_llms_vectors(embedder: InProcess, vectors: list[list[float]]) -> None:
    data = good(embedder, "/v1/embeddings/colbert", {"input": TEXTS})["data"]
    assert {item["object"] for item in data} == {"colbert_embedding"}
    counts = [good(embedder, "/tokenize", {"prompt": text})["count"] for text in TEXTS]
    assert [len(item["embedding"]) for item in data] == counts
    asked = {"left": TEXTS[:1], "right": TEXTS[1:], "return_response": True}
    body = good(embedder, "/v1/embeddings/similarity", asked)
    wanted = [[sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:]]]
    assert near(body["similarity"], wanted)
    assert near([item["embedding"] for item in body["right_response"]["data"]], vectors[1:])
    assert "left_response" not in good(embedder, "/v1/embeddings/similarity", asked | {"return_response": False})
    assert "no output 'sparse'" in told(post(embedder, "/v1/embeddings/sparse", {"input": "a"}))
    assert "at most 8" in told(post(embedder, "/v1/embeddings/similarity", {"left": ["a"], "right": ["b"] * 8}))


def test_a_tokens_largest_weight_counts() -> None:
    assert token_weights([1, 5, 7, 5, 9], [9.0, 0.5, -1.0, 0.75, 0.0], frozenset({1})) == {5: 0.75}


def test_ollamas_vectors(embedder: InProcess, vectors: list[list[float]]) -> None:
    body = good(
        embedder, "/api/embed", {"model": "tiny", "input": TEXTS, "keep_alive": "5m", "options": {"num_ctx": 9}}
    )
    assert body["model"] == "tiny" and near(body["embeddings"], vectors)
    assert body["prompt_eval_count"] > 0 and body["total_duration"] > 0
    assert near(good(embedder, "/api/embed", {"input": TEXTS[0]})["embeddings"], vectors[:1])
    assert len(good(embedder, "/api/embed", {"input": TEXTS[0], "dimensions": 4})["embeddings"][0]) == 4
    assert near([good(embedder, "/api/embeddings", {"prompt": TEXTS[1]})["embedding"]], vectors[1:2])
    for empty in ({}, {"input": []}, {"input": ""}):
        assert good(embedder, "/api/embed", empty)["embeddings"] == []
    assert good(embedder, "/api/embeddings", {"prompt": ""}) == {"embedding": []}
    long = {"input": "cat " * 99}
    assert "maximum context length" in told(post(embedder, "/api/embed", long))
    assert len(good(embedder, "/api/embed", long | {"truncate": True})["embeddings"]) == 1
    assert "num_ctx" in told(post(embedder, "/api/embed", {"input": "a", "options": {"num_ctx": 9999}}))
    assert "keep_alive" in told(post(embedder, "/api/embed", {"input": "a", "keep_alive": "soon"}))
    assert post(embedder, "/api/embed", {"model": "other", "input": "a"}).status_code == 404
    assert good(embedder, "/api/show", {})["capabilities"] == ["embedding"]


def test_the_start_lists_what_the_model_has(embedder: InProcess) -> None:
    listed = " ".join(dialect_lines(embedder.app, embedder.core.info.outputs)).split()
    assert {"/v1/embeddings", "/v1/rerank", "/v2/rerank", "/encode", "/api/embed", "/tokenize"} <= set(listed)
    assert {"/classify", "/v1/embeddings/sparse", "/v1/completions", "/generate", "/api/chat"}.isdisjoint(listed)


def test_a_large_request_goes_in_pieces(
    embedder: InProcess, vectors: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooled, "WINDOW", 2)
    data = good(embedder, "/v1/embeddings", {"input": [*TEXTS, *TEXTS]})["data"]
    assert near([item["embedding"] for item in data], vectors * 2)


def test_a_client_that_goes_ends_its_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The core answers nothing that asks for no text: so the work ends by the client's going, or never. Of query and
    three documents, three are in the core."""
    outputs = PooledOutputs((PoolingTask("embed", 3),))
    monkeypatch.setattr(pooled, "WINDOW", 3)
    monkeypatch.setattr(ScriptedCore, "info", replace(ScriptedCore.info, outputs=outputs))
    body = {"query": "the cat", "documents": ["a", "b", "c"]}
    with scripted(make_spoken_checkpoint(tmp_path, SPECIAL)) as (server, core):
        core.texts = ["never told"] * 3
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(request_of("/v1/rerank", body))
            wait_for(lambda: core.client.num_live == 3)
        wait_for(lambda: core.client.num_live == 0)
        core.texts = [FinishReason("abort", message="it broke", status_code=500)] * 3
        response = post(server, "/v1/rerank", body)
        assert response.status_code == 500 and response.json()["error"]["message"] == "it broke"


def request_of(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


def test_lengths_of_vectors(tmp_path: Path) -> None:
    """As a checkpoint without Normalize has them, unless length one is asked for, or the dialect is Ollama's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_checkpoint(tmp_path / "with-tokenizer"))
    make_tiny("BertModel", tmp_path, vocab_size=len(tokenizer), max_position_embeddings=64)
    tokenizer.save_pretrained(tmp_path)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    with in_process(str(tmp_path), dtype="float32") as running:

        def length(body: dict[str, Any], path: str = "/v1/embeddings") -> float:
            answer = good(running, path, body)
            vectors = answer.get("embeddings") or [answer.get("embedding") or answer["data"][0]["embedding"]]
            return math.hypot(*vectors[0])

        own = length({"input": TEXTS[0]})
        assert abs(own - 1) > 0.1
        assert length({"input": TEXTS[0], "use_activation": False}) == pytest.approx(own)
        for same in ({"use_activation": True}, {"normalize": True}, {"normalize": True, "dimensions": 4}):
            assert length({"input": TEXTS[0]} | same) == pytest.approx(1)
        assert length({"input": TEXTS[0]}, "/api/embed") == pytest.approx(1)
        assert length({"prompt": TEXTS[0]}, "/api/embeddings") == pytest.approx(own)
        both = {"input": "a", "normalize": True, "use_activation": True}
        assert "mean the same" in told(post(running, "/v1/embeddings", both))
