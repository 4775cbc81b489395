"""``rtp-llm embed``: from a file of texts to a file of vectors."""

import io
import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from rtp_llm import Engine
from rtp_llm.cli import main
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.tools import embed
from rtp_llm.tools.embed import JsonlWriter, NpyWriter, Text, embed_texts, read_texts
from tiny_models import make_tiny
from tiny_server import make_checkpoint


class FakeEngine:
    """Embeds a text as its length and its first character; knows how many texts it was given at once."""

    def __init__(self) -> None:
        self.most = 0
        self.was_aborted = False

    def encode(self, prompt: list[str], **options: Any) -> list[dict[str, Any]]:
        self.most = max(self.most, len(prompt))
        for i, text in enumerate(prompt):
            if text == "bad":
                raise InvalidRequest(f"prompt {i}: it is bad", "prompt")
        failed = {"finish_reason": {"message": "it broke"}}
        return [
            {"embedding": None if text == "broken" else array("f", [len(text), ord(text[0])]), "meta_info": failed}
            for text in prompt
        ]

    def abort(self) -> None:
        self.was_aborted = True


def texts(count: int) -> list[str]:
    return [f"{i} " + "x" * (i % 7) for i in range(count)]


def lines_of(*values: Any) -> io.BytesIO:
    return io.BytesIO(b"".join(json.dumps(value).encode() + b"\n" for value in values))


@pytest.mark.parametrize("count", [1, 9, 10, 1234])
def test_vectors_come_in_order(count: int) -> None:
    engine, file, done = FakeEngine(), io.BytesIO(), []
    writer = NpyWriter(file)
    source = iter([Text(i, text) for i, text in enumerate(texts(count), 1)])
    assert embed_texts(engine, source, writer, 10, {}, done.append) == count == sum(done)
    writer.close()
    file.seek(0)
    found = np.load(file)
    assert found.dtype == np.float32 and engine.most == min(10, count)
    assert found.tolist() == [[len(text), ord(text[0])] for text in texts(count)]


def test_lines_of_json_keep_their_ids() -> None:
    file = io.BytesIO()
    source = read_texts(lines_of("plain", {"id": "a", "body": "with id", "more": 1}), True, "body")
    embed_texts(FakeEngine(), source, JsonlWriter(file), 10, {})
    assert [json.loads(line) for line in file.getvalue().splitlines()] == [
        {"index": 0, "embedding": [5.0, ord("p")]},
        {"index": 1, "id": "a", "embedding": [7.0, ord("w")]},
    ]


def test_lines_of_text_are_taken_as_they_are() -> None:
    source = io.BytesIO("é \r\n{}\n last".encode())
    assert [item.text for item in read_texts(source, False, "text")] == ["é ", "{}", " last"]


@pytest.mark.parametrize(
    ("line", "words"),
    [(b"{", "line 2 is not JSON"), (b"3", "line 2 must be"), (b'{"x": "y"}', "a text in 'text'"), (b"\xff", "UTF-8")],
)
def test_a_wrong_line_is_named(line: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        list(read_texts(io.BytesIO(b'"a"\n' + line), True, "text"))


@pytest.mark.parametrize(("text", "kind"), [("bad", InvalidRequest), ("broken", RuntimeError)])
def test_a_text_that_fails_is_named_and_ends_the_rest(text: str, kind: type[Exception]) -> None:
    engine = FakeEngine()
    source = iter([Text(number, text if number == 14 else "good") for number in range(1, 40)])
    with pytest.raises(kind, match="line 14: it "):
        embed_texts(engine, source, JsonlWriter(io.BytesIO()), 10, {})
    assert engine.was_aborted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("with-tokenizer")))
    make_tiny("BertModel", folder, vocab_size=len(tokenizer), max_position_embeddings=64)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_command(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source := tmp_path / "in.txt").write_text("the cat\na dog\n" + "cat " * 99 + "\n")
    output = tmp_path / "out.npy"
    command = ["embed", str(source), "-o", str(output), "--model-path", model, "--device", "cpu", "--dtype", "float32"]
    assert main(command) == 2
    assert "line 3: This model's maximum context length is 64" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt"]
    assert main([*command, "--truncate"]) == 0
    assert "3 vectors in" in capsys.readouterr().err
    found = np.load(output)
    with Engine(model_path=model, device="cpu", dtype="float32") as engine:
        wanted = [result["embedding"] for result in engine.encode(["the cat", "a dog"])]
    np.testing.assert_allclose(found[:2], wanted, atol=1e-6)
    assert len(found) == 3


def test_wrong_flags_are_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "in.txt", "-o", "out.csv"]) == 2
    assert "must end in .npy or .jsonl" in capsys.readouterr().err
    assert main(["embed", "in.txt", "-o", "out.npy", "--batch-size", "0"]) == 2
    assert "--batch-size" in capsys.readouterr().err
    assert main(["embed", "no-such-file.txt", "-o", "out.npy"]) == 2
    assert "no-such-file.txt" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    """A hundred thousand vectors of 384 components would be 150 MB; a few batches are in memory at once."""
    import tracemalloc

    wide = array("f", bytes(4 * 384))

    class Wide(FakeEngine):
        def encode(self, prompt: list[str], **options: Any) -> list[dict[str, Any]]:
            return [{"embedding": array("f", wide), "meta_info": {}} for _ in prompt]

    source = (Text(number, "a") for number in range(1, 100_001))
    tracemalloc.start()
    with (tmp_path / "out.npy").open("wb") as file:
        writer = NpyWriter(file)
        assert embed.embed_texts(Wide(), source, writer, 512, {}) == 100_000
        writer.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.load(tmp_path / "out.npy", mmap_mode="r").shape == (100_000, 384)
    assert peak < 16 << 20
