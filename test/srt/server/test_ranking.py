"""Reranking, scores and labels over HTTP and in Python, by models of pairs, embedders and classifiers."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

from rtp_llm import Engine
from rtp_llm.srt.chat.messages import ChatTemplateError
from rtp_llm.srt.chat.pairs import PAIR_TEMPLATES, PairTemplate
from rtp_llm.srt.sampling_params import InvalidRequest
from tiny_models import make_tiny
from tiny_server import InProcess, in_process, make_checkpoint

pytestmark = pytest.mark.xdist_group("server-ranking")

QUERY, DOCUMENTS = "the cat", ["hello world", "the cat sat on the mat", "a dog"]
CLASSIFIER = "BertForSequenceClassification"


def make(architecture: str, factory: pytest.TempPathFactory, **config: Any) -> str:
    """A tiny checkpoint with the tokenizer of the tiny server's, which puts nothing around texts."""
    folder = factory.mktemp("ranking")
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_checkpoint(factory.mktemp("with-tokenizer")))
    make_tiny(architecture, folder, **{"vocab_size": len(tokenizer), "max_position_embeddings": 64} | config)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    labels = {"0": "sad", "1": "glad", "2": "so so"}
    return {
        "pairs": make(CLASSIFIER, tmp_path_factory, num_labels=1, initializer_range=0.5),
        "labels": make(CLASSIFIER, tmp_path_factory, id2label=labels, initializer_range=0.5),
        "embedder": make("BertModel", tmp_path_factory),
    }


def served(folder: str, **options: Any) -> Any:
    return in_process(folder, max_sequences_per_request=8, dtype="float32", **options)


@pytest.fixture(scope="module")
def pairs(folders: dict[str, str]) -> Iterator[InProcess]:
    with served(folders["pairs"]) as running:
        yield running


@pytest.fixture(scope="module")
def embedder(folders: dict[str, str]) -> Iterator[InProcess]:
    with served(folders["embedder"]) as running:
        yield running


@pytest.fixture(scope="module")
def labels(folders: dict[str, str]) -> Iterator[InProcess]:
    with served(folders["labels"], rerank_format="sglang") as running:
        yield running


def post(server: InProcess, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def good(server: InProcess, path: str, body: Any) -> Any:
    response = post(server, path, body)
    assert response.status_code == 200, response.text
    return response.json()


def error(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def opened(folder: str) -> Engine:
    return Engine(model_path=folder, device="cpu", dtype="float32", max_total_tokens=2048)


def by_index(results: Any) -> list[float]:
    return [item["relevance_score"] for item in sorted(results, key=lambda item: item["index"])]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_documents_are_sorted(pairs: InProcess, path: str) -> None:
    body = good(pairs, path, {"model": "tiny", "query": QUERY, "documents": DOCUMENTS})
    assert body["id"].startswith("rerank-") and body["model"] == "tiny"
    scores = [item["relevance_score"] for item in body["results"]]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3 and all(0 < score < 1 for score in scores)
    texts = [item["document"]["text"] for item in body["results"] if "document" in item]
    assert texts == ([] if path == "/v2/rerank" else [DOCUMENTS[item["index"]] for item in body["results"]])
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0
    asked = {"query": {"text": QUERY}, "documents": [{"text": text} for text in DOCUMENTS], "top_n": 2}
    best = good(pairs, path, asked | {"return_documents": False})["results"]
    assert best == [{key: item[key] for key in ("index", "relevance_score")} for item in body["results"][:2]]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_documents_are_objects_that_come_back_whole(pairs: InProcess, path: str) -> None:
    documents = [{"text": text, "id": i, "meta": {"title": "a"}} for i, text in enumerate(DOCUMENTS)]
    asked = {"query": QUERY, "documents": [*documents, "sat"], "return_documents": True}
    found = {item["index"]: item["document"] for item in good(pairs, path, asked)["results"]}
    assert found == {**dict(enumerate(documents)), 3: {"text": "sat"}}
    assert "documents.0" in error(post(pairs, path, asked | {"documents": [{"title": "a"}]}))["message"]


def test_so_many_tokens_of_each_document_are_read(pairs: InProcess) -> None:
    asked = {"query": QUERY, "documents": ["hello world the cat sat on the mat " * 20, "a dog", "hello world"]}
    count = good(pairs, "/tokenize", {"prompt": "hello world", "add_special_tokens": False})["count"]
    answer = good(pairs, "/v1/rerank", asked | {"max_tokens_per_doc": count})
    scores = {item["index"]: item["relevance_score"] for item in answer["results"]}
    assert scores[0] == pytest.approx(scores[2], abs=1e-6)
    assert answer["results"][0]["document"]["text"] in asked["documents"]  # as they were given
    assert "maximum context length" in error(post(pairs, "/v1/rerank", asked | {"max_tokens_per_doc": 0}))["message"]
    assert error(post(pairs, "/v1/rerank", asked | {"max_tokens_per_doc": -1}))["param"] == "max_tokens_per_doc"
    many = {"query": "a", "documents": ["b"] * 9, "max_tokens_per_doc": 4}
    assert "at most 8" in error(post(pairs, "/v1/rerank", many))["message"]


def test_scores_are_those_of_pairs(pairs: InProcess, folders: dict[str, str]) -> None:
    reranked = good(pairs, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS})
    wanted = by_index(reranked["results"])
    for names in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        body = good(pairs, "/v1/score", {names[0]: QUERY, names[1]: DOCUMENTS})
        assert (body["object"], body["usage"]) == ("list", reranked["usage"])
        assert [(item["index"], item["object"]) for item in body["data"]] == [(i, "score") for i in range(3)]
        assert [item["score"] for item in body["data"]] == pytest.approx(wanted, abs=1e-6)
    raw = good(pairs, "/score", {"text_1": [QUERY] * 3, "text_2": DOCUMENTS, "use_activation": False})["data"]
    assert [1 / (1 + math.exp(-item["score"])) for item in raw] == pytest.approx(wanted, abs=1e-6)
    with opened(folders["pairs"]) as engine:
        assert engine.score(QUERY, DOCUMENTS) == pytest.approx(wanted, abs=1e-6)
        assert engine.score(QUERY, DOCUMENTS[1]) == pytest.approx(wanted[1], abs=1e-6)
        found = engine.rerank(QUERY, DOCUMENTS, top_n=2)
        assert [item["index"] for item in found] == [item["index"] for item in reranked["results"][:2]]
        assert [item["document"] for item in found] == [DOCUMENTS[item["index"]] for item in found]
        for options, words in (({"top_n": 0}, "top_n"), ({"priority": 3}, "priority"), ({"rid": ""}, "rid")):
            with pytest.raises(InvalidRequest, match=words):
                engine.rerank(QUERY, DOCUMENTS[:1], **options)
        with pytest.raises(InvalidRequest, match="documents 1 must be a text, not int"):
            engine.rerank(QUERY, ["a", 3])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="colour"):
            engine.score("a", "b", colour=1)  # type: ignore[call-arg]


def test_an_embedder_compares_vectors(embedder: InProcess, folders: dict[str, str]) -> None:
    data = good(embedder, "/v1/embeddings", {"input": [QUERY, *DOCUMENTS]})["data"]
    query, *others = (item["embedding"] for item in data)
    wanted = [sum(a * b for a, b in zip(query, other, strict=True)) for other in others]
    found = good(embedder, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS})
    assert by_index(found["results"]) == pytest.approx(wanted, abs=1e-5)
    pairs = good(embedder, "/v1/score", {"text_1": DOCUMENTS, "text_2": DOCUMENTS})["data"]
    assert [item["score"] for item in pairs] == pytest.approx([1, 1, 1], abs=1e-5)
    failed = error(post(embedder, "/v1/score", {"text_1": "a", "text_2": "b", "use_activation": False}))
    assert failed["param"] == "use_activation" and "cosine" in failed["message"]
    assert "'classify'" in error(post(embedder, "/classify", {"input": "a"}))["message"]


def test_an_embedder_puts_its_texts_before_queries_and_documents(folders: dict[str, str], tmp_path: Path) -> None:
    for file in Path(folders["embedder"]).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    prompts = {"prompts": {"query": "hello ", "passage": "dog "}}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with opened(str(tmp_path)) as engine:
        plain = engine.score("hello " + QUERY, ["dog " + text for text in DOCUMENTS])
        assert isinstance(plain, list)
        assert by_index(engine.rerank(QUERY, DOCUMENTS)) == pytest.approx(plain, abs=1e-5)
        assert engine.score(QUERY, DOCUMENTS) != pytest.approx(plain, abs=1e-4)


def test_labels_have_names(labels: InProcess, folders: dict[str, str]) -> None:
    body = good(labels, "/classify", {"input": DOCUMENTS})
    assert (body["object"], body["model"], body["id"][:9]) == ("list", "tiny", "classify-")
    for i, item in enumerate(body["data"]):
        assert item["index"] == i and item["num_classes"] == len(item["probs"]) == 3
        assert sum(item["probs"]) == pytest.approx(1, abs=1e-5)
        assert item["label"] == ["sad", "glad", "so so"][item["probs"].index(max(item["probs"]))]
    ids = good(labels, "/tokenize", {"prompt": DOCUMENTS[2]})["tokens"]
    assert good(labels, "/v1/classify", {"input": ids})["data"][0]["probs"] == pytest.approx(body["data"][2]["probs"])
    raw = good(labels, "/classify", {"input": DOCUMENTS[0], "use_activation": False})["data"][0]["probs"]
    total = sum(map(math.exp, raw))
    assert [math.exp(x) / total for x in raw] == pytest.approx(body["data"][0]["probs"], abs=1e-5)
    with opened(folders["labels"]) as engine:
        one, several = engine.classify(DOCUMENTS[0]), engine.classify(DOCUMENTS)
        assert isinstance(one, dict) and isinstance(several, list)
        assert one["label"] == body["data"][0]["label"]
        assert [item["probs"] for item in several][2] == pytest.approx(body["data"][2]["probs"], abs=1e-6)


def test_a_model_without_scores_says_which_have_them(labels: InProcess, server: InProcess) -> None:
    for running in (labels, server):
        for path, body in (
            ("/v1/rerank", {"query": "a", "documents": ["b"]}),
            ("/score", {"text_1": "a", "text_2": "b"}),
        ):
            failed = error(post(running, path, body))
            assert failed["param"] == "model" and "a ...ForSequenceClassification of one label" in failed["message"]
    assert "--convert" in error(post(server, "/classify", {"input": "a"}))["message"]


def test_sglangs_plain_list(folders: dict[str, str]) -> None:
    with served(folders["embedder"], rerank_format="sglang") as running:
        found = good(running, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": 2})
        assert [item["document"] for item in found] == [DOCUMENTS[item["index"]] for item in found]
        assert found[0]["score"] >= found[1]["score"] and len(found) == 2
        counts = [len(good(running, "/tokenize", {"prompt": text})["tokens"]) for text in DOCUMENTS]
        assert [item["meta_info"]["prompt_tokens"] for item in found] == [counts[item["index"]] for item in found]
        assert "results" in good(running, "/v2/rerank", {"query": QUERY, "documents": DOCUMENTS})


@pytest.mark.parametrize(
    ("path", "body", "words", "param"),
    [
        ("/v1/rerank", {"query": "a", "documents": []}, "at least 1", "documents"),
        ("/v1/rerank", {"query": "a"}, "documents", "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"] * 9}, "at most 8", "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b", "cat " * 99]}, "documents 1: This model's", "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n", "top_n"),
        ("/v1/rerank", {"query": "a", "documents": [3]}, "documents", "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "instruction": "c"}, "by a template", "instruction"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "instruction": "c", "instruct": "c"}, "one of them", "instr"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "colour": 1}, "colour", "colour"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "priority": 3}, "priority", "priority"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "truncate_prompt_tokens": 65}, "up to 64", None),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"] * 3}, "text_1 has 2 texts and text_2 3", "text_1"),
        ("/v1/score", {"text_1": "a"}, "give two fields", "text_1"),
        ("/v1/score", {"queries": "a", "text_2": "b"}, "give two fields", "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2 is empty", "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "label_token_ids": [3]}, "not supported", "label_token_ids"),
        ("/classify", {"input": []}, "input is empty", "input"),
        ("/classify", {"input": ["a", [99999]]}, "input 1: ", "input"),
    ],
)
def test_errors_name_what_is_wrong(pairs: InProcess, path: str, body: Any, words: str, param: str | None) -> None:
    failed = error(post(pairs, path, body))
    assert words in failed["message"]
    assert param is None or (failed["param"] or "").startswith(param)


# One model with vectors, vectors of tokens, and weights of tokens


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make("XLMRobertaModel", tmp_path_factory, max_position_embeddings=96, pad_token_id=1, hidden_size=32)
    generator = torch.Generator().manual_seed(5)
    for name, width in (("sparse_linear.pt", 1), ("colbert_linear.pt", 6)):
        weights = {"weight": torch.randn(width, 32, generator=generator), "bias": torch.zeros(width)}
        torch.save(weights, Path(folder) / name)
    return folder


def test_texts_are_compared_by_the_output_that_is_asked_for(m3: str) -> None:
    with opened(m3) as engine:
        assert engine.tasks == ["embed", "token_embed", "sparse"]
        query, *documents = (
            torch.stack([torch.tensor(line) for line in item["embedding"]])
            for item in engine.encode([QUERY, *DOCUMENTS], task="token_embed")
        )
        max_sim = [float((query @ document.T).amax(1).sum()) for document in documents]
        assert engine.score(QUERY, DOCUMENTS, score_by="token_embed") == pytest.approx(max_sim, abs=1e-5)
        pairs = engine.score(DOCUMENTS, DOCUMENTS, score_by="token_embed")
        counts = [len(document) for document in documents]
        assert pairs == pytest.approx(counts, abs=1e-4)  # each token fits itself best
        cosines = engine.score(QUERY, DOCUMENTS)
        assert cosines == engine.score(QUERY, DOCUMENTS, score_by="embed") != pytest.approx(max_sim, abs=1e-3)
        overlaps = engine.score(QUERY, DOCUMENTS, score_by="sparse")
        with pytest.raises(InvalidRequest, match="that the model has, not by 'score'"):
            engine.score(QUERY, DOCUMENTS, score_by="score")
    with served(m3) as running:
        body = {"query": QUERY, "documents": DOCUMENTS}
        for name, wanted in (("token_embed", max_sim), ("sparse", overlaps), ("embed", cosines)):
            found = good(running, "/v1/rerank", body | {"score_by": name})
            assert by_index(found["results"]) == pytest.approx(wanted, abs=1e-5)
        data = good(running, "/v1/embeddings/colbert", {"input": QUERY})["data"]
        assert torch.tensor(data[0]["embedding"]).shape == query.shape
        data = good(running, "/v1/embeddings/sparse", {"input": [QUERY, *DOCUMENTS], "return_decoded": False})["data"]
        weights, *others = (item["embedding"] for item in data)
        products = [sum(weight * other.get(token, 0.0) for token, weight in weights.items()) for other in others]
        assert overlaps == pytest.approx(products, abs=1e-5)
        assert "score_by" in error(post(running, "/score", {"text_1": "a", "text_2": "b", "score_by": "x"}))["param"]


def test_weights_of_the_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make("BertForMaskedLM", tmp_path_factory)
    with served(folder, pooling="splade") as running:
        data = good(running, "/v1/embeddings/sparse", {"input": [QUERY, "a dog"], "return_decoded": False})["data"]
        query, document = (item["embedding"] for item in data)
        [raw] = good(running, "/pooling", {"input": QUERY, "task": "sparse"})["data"]
        above = {str(token): weight for token, weight in enumerate(raw["data"]) if weight > 0}
        assert query == pytest.approx(above, abs=1e-5)
        scored = good(running, "/score", {"text_1": QUERY, "text_2": "a dog"})["data"][0]["score"]
        wanted = sum(weight * document.get(token, 0.0) for token, weight in query.items())
        assert scored == pytest.approx(wanted, rel=1e-5)
        words = good(running, "/v1/embeddings/sparse", {"input": "a dog"})["data"][0]["embedding"]
        assert max(words.values()) == max(document.values())


# Decoders that score pairs by two tokens


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make("Qwen3ForCausalLM", tmp_path_factory, max_position_embeddings=512, classifier_from_token=["n", "y"])


def judged(folder: str, text: str) -> float:
    """What transformers says: the probability of "y" of both tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
    return float(logits[tokenizer.convert_tokens_to_ids(["n", "y"])].softmax(-1)[1])


def test_a_language_model_judges_pairs_in_its_form(decoder: str) -> None:
    form = PairTemplate(PAIR_TEMPLATES["qwen3-reranker"])

    def wanted(document: str, instruction: str | None = None) -> float:
        made = form.text(QUERY, document, instruction)
        return judged(decoder, made.before + document + made.after)

    with served(decoder, chat_template="qwen3-reranker") as running:
        found = good(running, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS})
        assert by_index(found["results"]) == pytest.approx([wanted(text) for text in DOCUMENTS], abs=1e-5)
        body = {"text_1": QUERY, "text_2": DOCUMENTS[0]}
        for name in ("instruction", "instruct"):
            scored = good(running, "/score", body | {name: "sort"})["data"][0]["score"]
            assert scored == pytest.approx(wanted(DOCUMENTS[0], "sort"), abs=1e-5)
        raw = good(running, "/score", body | {"use_activation": False})["data"][0]["score"]
        assert 1 / (1 + math.exp(-raw)) == pytest.approx(wanted(DOCUMENTS[0]), abs=1e-5)
        assert "choices" in good(running, "/v1/completions", {"prompt": "a", "max_tokens": 2})  # it makes text, too
        long = {"query": QUERY, "documents": ["cat " * 999]}
        assert "maximum context length" in error(post(running, "/v1/rerank", long))["message"]
        cut = good(running, "/v1/rerank", long | {"truncate_prompt_tokens": -1})
        assert cut["usage"]["prompt_tokens"] == 512
        told = error(post(running, "/v1/rerank", long | {"truncate_prompt_tokens": 9}))
        assert "without the document" in told["message"] and told["param"] == "truncate_prompt_tokens"


def test_templates_of_rerankers(decoder: str, tmp_path: Path) -> None:
    file = tmp_path / "form.jinja"
    file.write_text("Q:{{ messages[0].content }} D:{{ messages[1].content }}")
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_total_tokens": 2048}
    with Engine(model_path=decoder, chat_template=str(file), **options) as engine:
        assert engine.score("a", "b") == pytest.approx(judged(decoder, "Q:a D:b"), abs=1e-5)
        with pytest.raises(InvalidRequest, match="no place for an instruction"):
            engine.score("a", "b", instruction="c")
    with Engine(model_path=decoder, **options) as engine:  # its own chat template is none for pairs
        assert engine.score("a ", "b") == pytest.approx(judged(decoder, "a b"), abs=1e-5)
    file.write_text("{{ messages[0].content }}")
    with pytest.raises(ChatTemplateError, match="no template for pairs"):
        Engine(model_path=decoder, chat_template=str(file), **options)


def test_long_documents_are_cut_only_if_that_is_asked(pairs: InProcess) -> None:
    body = {"query": "a", "documents": ["b", "cat " * 99], "truncate_prompt_tokens": -1}
    assert good(pairs, "/v1/rerank", body)["usage"]["prompt_tokens"] <= 64 + 8
