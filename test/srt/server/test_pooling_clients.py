"""Clients of embeddings and rerankers, unmodified. ``pip install 'rtp-llm[test-all]'`` brings them."""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import transformers

from tiny_models import make_tiny
from tiny_server import InProcess, in_process, make_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server-pooling")]

ROOT = Path(__file__).parents[3]
TEXTS = ["the cat", "hello world", "a dog"]


def make(architecture: str, factory: pytest.TempPathFactory, **config: Any) -> str:
    folder = factory.mktemp("tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_checkpoint(factory.mktemp("with-tokenizer")))
    make_tiny(architecture, folder, vocab_size=len(tokenizer), max_position_embeddings=64, **config)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make("BertModel", tmp_path_factory)


@pytest.fixture(scope="module")
def embedder(model: str) -> Iterator[InProcess]:
    with in_process(model, dtype="float32", api_key="secret") as running:
        yield running


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    config = {"num_labels": 1, "initializer_range": 0.5}
    with in_process(make("BertForSequenceClassification", tmp_path_factory, **config), dtype="float32") as running:
        yield running


@pytest.fixture(scope="module")
def vectors(embedder: InProcess) -> list[Any]:
    response = httpx.post(
        f"{embedder.url}/v1/embeddings", json={"input": TEXTS}, headers={"authorization": "Bearer secret"}, timeout=60
    )
    return [pytest.approx(item["embedding"], abs=1e-6) for item in response.json()["data"]]


@pytest.fixture
def connections() -> Iterator[httpx.Client]:
    """What clients connect by that do not close their connections."""
    with httpx.Client(timeout=60) as client:
        yield client


def test_langchain(embedder: InProcess, vectors: list[Any], connections: httpx.Client) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.OpenAIEmbeddings(
        model="tiny",
        base_url=f"{embedder.url}/v1",
        api_key="secret",
        http_client=connections,
        check_embedding_ctx_length=False,  # it would send ids of another model's tokenizer
    )
    assert model.embed_documents(TEXTS) == vectors
    assert model.embed_query(TEXTS[1]) == vectors[1]


def test_llama_index(embedder: InProcess, vectors: list[Any], connections: httpx.Client) -> None:
    openai_like = pytest.importorskip("llama_index.embeddings.openai_like")
    model = openai_like.OpenAILikeEmbedding(
        model_name="tiny",
        api_base=f"{embedder.url}/v1",
        api_key="secret",
        embed_batch_size=2,
        http_client=connections,
    )
    assert model.get_text_embedding_batch(TEXTS) == vectors
    assert model.get_query_embedding(TEXTS[2]) == vectors[2]


def test_ollama(embedder: InProcess, vectors: list[Any]) -> None:
    ollama = pytest.importorskip("ollama")
    with ollama.Client(embedder.url, headers={"authorization": "Bearer secret"}, timeout=60) as client:
        found = client.embed("tiny", TEXTS, truncate=True, keep_alive="5m")
        assert found.embeddings == vectors and found.prompt_eval_count > 0
        assert client.embed("tiny", TEXTS[0], dimensions=5).embeddings[0] == pytest.approx(
            [x / math.hypot(*vectors[0].expected[:5]) for x in vectors[0].expected[:5]], abs=1e-6
        )
        assert client.embeddings("tiny", TEXTS[1]).embedding == vectors[1]
        assert client.show("tiny").capabilities == ["embedding"]


def test_cohere(reranker: InProcess, connections: httpx.Client) -> None:
    cohere = pytest.importorskip("cohere")
    asked: dict[str, Any] = {"model": "tiny", "query": TEXTS[0], "documents": TEXTS}
    server: dict[str, Any] = {"base_url": reranker.url, "httpx_client": connections}
    newer = cohere.ClientV2("none", **server).rerank(**asked, top_n=2)
    scores = [item.relevance_score for item in newer.results]
    assert len(scores) == 2 and scores == sorted(scores, reverse=True)
    older = cohere.Client("none", **server).rerank(**asked, return_documents=True)
    assert [item.document.text for item in older.results] == [TEXTS[item.index] for item in older.results]
    assert [item.relevance_score for item in older.results][:2] == pytest.approx(scores, abs=1e-6)
    objects = [{"text": text, "id": f"doc-{i}"} for i, text in enumerate(TEXTS)]
    whole = cohere.Client("none", **server).rerank(**asked | {"documents": objects}, return_documents=True)
    assert [item.document.dict()["id"] for item in whole.results] == [f"doc-{item.index}" for item in older.results]
    long = [f"{text} {'the cat sat on the mat ' * 20}" for text in TEXTS]
    cut = cohere.ClientV2("none", **server).rerank(**asked | {"documents": long}, max_tokens_per_doc=8)
    assert len(cut.results) == 3
    with pytest.raises(cohere.BadRequestError, match="at least 1"):
        cohere.ClientV2("none", **server).rerank(model="tiny", query="a", documents=[])


def test_jinas_form(reranker: InProcess) -> None:
    """As Jina's documentation has it: a POST with a key; results hold the texts."""
    body = {"model": "tiny", "query": TEXTS[0], "documents": [{"text": text} for text in TEXTS], "top_n": 3}
    headers = {"authorization": "Bearer jina_x"}
    answer = httpx.post(f"{reranker.url}/v1/rerank", json=body, headers=headers, timeout=60).json()
    assert {"model", "usage", "results"} <= set(answer)
    assert sorted(item["document"]["text"] for item in answer["results"]) == sorted(TEXTS)


def test_mteb(embedder: InProcess) -> None:
    """One task, of generated sentences."""
    pytest.importorskip("mteb")
    script = Path(__file__).parents[2] / "helpers" / "mteb_task.py"
    command = [sys.executable, str(script), f"{embedder.url}/v1", "secret"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) > 0.5


def test_faiss(model: str, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    (sentences := tmp_path / "sentences.txt").write_text("\n".join([*TEXTS, "cat dog mat"]))
    script = ROOT / "examples" / "faiss_search" / "search.py"
    command = [sys.executable, str(script), model, str(sentences), TEXTS[1]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[0] == f"1.000 {TEXTS[1]}"
