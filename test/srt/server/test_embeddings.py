"""/v1/embeddings over HTTP: inputs of all forms, limits, errors, and OpenAI's own client."""

import base64
import math
from array import array
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import transformers

from tiny_models import make_tiny
from tiny_server import InProcess, in_process, make_checkpoint

pytestmark = pytest.mark.xdist_group("server-embeddings")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """A tiny BERT, with the tokenizer of the tiny server's checkpoint."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("with-tokenizer")))
    make_tiny("BertModel", folder, vocab_size=len(tokenizer), max_position_embeddings=64)
    tokenizer.save_pretrained(folder)
    with in_process(str(folder), max_sequences_per_request=8, dtype="float32") as running:
        yield running


def post(server: InProcess, body: Any, path: str = "/v1/embeddings") -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    assert {item["object"] for item in data} == {"embedding"}
    return [item["embedding"] for item in data]


def error(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_texts_ids_and_lists_of_both(embedder: InProcess) -> None:
    texts = ["the cat sat", "a dog"]
    of_texts = vectors(post(embedder, {"input": texts}))
    assert vectors(post(embedder, {"input": texts[0]}))[0] == pytest.approx(of_texts[0], abs=1e-6)
    for text, vector in zip(texts, of_texts, strict=True):
        ids = httpx.post(f"{embedder.url}/tokenize", json={"prompt": text}, timeout=60).json()["tokens"]
        assert vectors(post(embedder, {"input": ids}))[0] == pytest.approx(vector, abs=1e-6)
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)
    mixed = vectors(post(embedder, {"input": [ids, texts[0]]}))
    assert mixed[0] == pytest.approx(of_texts[1], abs=1e-6) and mixed[1] == pytest.approx(of_texts[0], abs=1e-6)


def test_texts_of_one_request_are_those_of_single_ones(embedder: InProcess) -> None:
    texts = ["the cat sat", "größer 東京", "a", "the cat " * 40, "a dog sat"]
    for options in ({"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": 4}, {"add_special_tokens": False}):
        some = texts[:3] if "add_special_tokens" in options else texts
        together = vectors(post(embedder, {"input": some, **options}))
        for text, vector in zip(some, together, strict=True):
            assert vectors(post(embedder, {"input": text, **options}))[0] == pytest.approx(vector, abs=1e-6)
    failed = error(post(embedder, {"input": texts}))
    assert failed["message"].startswith("input 3: ") and "64" in failed["message"]


def test_the_answer_has_openais_form(embedder: InProcess) -> None:
    body = post(embedder, {"input": [[5, 6, 7], [8, 9]], "model": "tiny", "user": "somebody"}).json()
    assert list(body) == ["object", "data", "model", "usage"]
    assert (body["object"], body["model"]) == ("list", "tiny")
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert post(embedder, {"input": "a"}, "/embeddings").status_code == 200


def test_base64_and_dimensions(embedder: InProcess) -> None:
    [whole] = vectors(post(embedder, {"input": "the cat"}))
    [text] = vectors(post(embedder, {"input": "the cat", "encoding_format": "base64"}))
    assert array("f", base64.b64decode(text)).tolist() == whole  # type: ignore[arg-type]
    [short] = vectors(post(embedder, {"input": "the cat", "dimensions": 4}))
    length = math.hypot(*whole[:4])
    assert short == pytest.approx([x / length for x in whole[:4]], abs=1e-6)
    failed = error(post(embedder, {"input": "the cat", "dimensions": 4000}))
    assert failed["param"] == "dimensions" and "the size of the model's vectors" in failed["message"]


def test_inputs_are_cut_only_if_that_is_asked(embedder: InProcess) -> None:
    ids = [5 + i % 50 for i in range(100)]
    failed = error(post(embedder, {"input": ids}))
    assert failed["code"] == "context_length_exceeded" and failed["param"] == "input"
    assert "maximum context length is 64 tokens" in failed["message"]
    [cut] = vectors(post(embedder, {"input": ids, "truncate_prompt_tokens": -1}))
    assert cut == pytest.approx(vectors(post(embedder, {"input": ids[:64]}))[0], abs=1e-6)
    [shorter] = vectors(post(embedder, {"input": "the cat sat on the mat", "truncate_prompt_tokens": 2}))
    assert shorter != pytest.approx(vectors(post(embedder, {"input": "the cat sat on the mat"}))[0], abs=1e-3)
    assert error(post(embedder, {"input": ids, "truncate_prompt_tokens": 65}))["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": []}, "input is empty"),
        ({"input": ""}, "input is empty"),
        ({"input": ["a", ""]}, "input 1: "),
        ({"input": [[3], []]}, "input 1: "),
        ({"input": [99999]}, "99999"),
        ({"input": ["a", 3]}, "input mixes ids with texts"),
        ({"input": ["a"] * 9}, "at most 8"),
        ({"input": "a", "model": "other"}, "other"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "colour": 1}, "colour"),
        ({"input": "a", "prompt_name": "query"}, "prompt_name is 'query', and the checkpoint has none"),
        ({"input": "a", "priority": 3}, "priority"),
    ],
)
def test_errors_name_what_is_wrong(embedder: InProcess, body: dict[str, Any], words: str) -> None:
    response = post(embedder, body)
    assert response.status_code == (404 if "model" in body else 400)
    assert words in response.text


def test_an_embedder_generates_nothing_and_says_so(embedder: InProcess) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", chat)):
        failed = error(post(embedder, body, path))
        assert "this model makes no text: its outputs are embed, token_embed" in failed["message"]
    assert httpx.get(f"{embedder.url}/health_generate", timeout=60).status_code == 200
    info = httpx.get(f"{embedder.url}/model_info", timeout=60).json()
    assert info["is_generation"] is False and info["tasks"] == ["embed", "token_embed"]


def test_a_generating_model_says_how_it_would_embed(server: InProcess) -> None:
    failed = error(post(server, {"input": "a"}))
    assert "no output 'embed'" in failed["message"] and "--convert" in failed["message"]


@pytest.mark.slow
def test_openais_client(embedder: InProcess) -> None:
    with openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0) as client:
        texts = ["the cat", "a dog"]
        answer = client.embeddings.create(input=texts, model="tiny")  # asks for base64
        plain = client.embeddings.create(input=texts, model="tiny", encoding_format="float", dimensions=7)
        assert [len(item.embedding) for item in plain.data] == [7, 7]
        assert [item.embedding for item in answer.data] == vectors(post(embedder, {"input": texts}))
        assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
        with pytest.raises(openai.BadRequestError, match="the size of the model's vectors"):
            client.embeddings.create(input="a", model="tiny", dimensions=5000)
