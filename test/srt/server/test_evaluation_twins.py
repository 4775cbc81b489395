"""The evaluations through our server and through transformers: the same prompts, and the same answers."""

import argparse
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from benchmark import compare_answers, make_mmmu_mini
from benchmark.evaluation import Reply
from benchmark.gsm8k import bench_hf as gsm8k_hf
from benchmark.gsm8k import bench_rtp_llm as gsm8k_server
from benchmark.mmlu import bench_hf as mmlu_hf
from benchmark.mmlu import bench_rtp_llm as mmlu_server
from benchmark.mmmu import bench_hf as mmmu_hf
from benchmark.mmmu import bench_rtp_llm as mmmu_server
from benchmark.server_answers import ServerAnswers, add_server_options
from benchmark.transformers_answers import Continuation, TransformersAnswers, add_transformers_options
from benchmark.transformers_chats import _decoded as decoded_for_transformers
from rtp_llm.srt.multimodal.media import decode_image
from tiny_seeing import make_seeing
from tiny_server import CONTEXT_LENGTH, InProcess, in_process, words

ANIMALS = ["cat", "dog", "mat", "world", "hello"]


@pytest.fixture
def gsm8k_data(tmp_path: Path) -> list[str]:
    """Seven questions after two examples. One fits with fewer examples only, one not at all."""
    rows = [{"question": f"the {a} and {i}?", "answer": f"it is {i}\n#### {i}"} for i, a in enumerate(ANIMALS)]
    rows += [{"question": words(150, seed), "answer": f"#### {seed}"} for seed in range(2)]
    rows += [{"question": words(size), "answer": "#### 1"} for size in (425, 600)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data-path", str(path), "--num-shots", "2", "--max-new-tokens", "24"]


@pytest.fixture
def mmlu_data(tmp_path: Path) -> list[str]:
    for part, num_rows in (("dev", 2), ("test", 6)):
        (tmp_path / part).mkdir()
        for name in ("cats", "dogs"):
            rows = [f"{words(5, i)} {name},{','.join(ANIMALS[:4])},{i % 4}\n" for i in range(num_rows)]
            (tmp_path / part / f"{name}_{part}.csv").write_text("".join(rows))
    return ["--data-path", str(tmp_path), "--ntrain", "2", "--max-new-tokens", "3", "--num-questions", "10"]


def run_twins(server_main: Any, hf_main: Any, data: list[str], url: str, model: str, folder: Path) -> list[Any]:
    """Runs both, checks that all is equal, and returns the server's rows."""
    ours, theirs = folder / "ours.jsonl", folder / "theirs.jsonl"
    common = [*data, "--result-filename", str(folder / "result.jsonl")]
    assert server_main([*common, "--url", url, "--answers", str(ours)]) == 0
    assert hf_main([*common, "--model-path", model, "--device", "cpu", "--answers", str(theirs)]) == 0
    assert compare_answers.main([str(ours), str(theirs)]) == 0
    records = [json.loads(line) for line in (folder / "result.jsonl").read_text().splitlines()]
    assert [record["backend"] for record in records] == ["server", "transformers"]
    for key in ("task", "context_len", "accuracy", "invalid", "answered", "skipped", "fewer_shots", "subjects"):
        assert records[0][key] == records[1][key], key
    return [json.loads(line) for line in ours.read_text().splitlines()]


def test_gsm8k(server: InProcess, tiny_checkpoint: str, tmp_path: Path, gsm8k_data: list[str]) -> None:
    rows = run_twins(gsm8k_server.main, gsm8k_hf.main, gsm8k_data, server.url, tiny_checkpoint, tmp_path)
    assert [row["status"] for row in rows] == ["answered"] * 6 + ["skipped"]
    assert [row["num_shots"] for row in rows] == [2, 2, 2, 2, 2, 1, None]
    assert len({row["text"] for row in rows}) > 3


def test_mmlu(
    server: InProcess, tiny_checkpoint: str, tmp_path: Path, mmlu_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_twins(mmlu_server.main, mmlu_hf.main, mmlu_data, server.url, tiny_checkpoint, tmp_path)
    assert [row["subject"] for row in rows] == ["cats"] * 5 + ["dogs"] * 5
    assert len({row["text"] for row in rows}) > 1
    output = capsys.readouterr().out
    assert "subject" in output and "dogs" in output and "Average accuracy: " in output


def test_mmmu(tmp_path: Path) -> None:
    """Messages with pictures: ours over HTTP, and the reference, say the same to each."""
    model, data = make_seeing(tmp_path / "model"), tmp_path / "mini"
    assert make_mmmu_mini.main(["--output-dir", str(data), "--num-subjects", "2", "--num-questions", "3"]) == 0
    flags = ["--dataset-path", str(data / "MMMU"), "--max-new-tokens", "6"]
    with in_process(model, dtype="float32") as running:
        rows = run_twins(mmmu_server.main, mmmu_hf.main, flags, running.url, model, tmp_path)
    assert [row["status"] for row in rows] == ["answered"] * 6
    assert len({row["text"] for row in rows}) > 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white_for_both(mode: str) -> None:
    picture = Image.new("RGBA", (8, 6), (200, 30, 40, 0))
    picture.putpixel((1, 1), (200, 30, 40, 255))
    file = BytesIO()
    picture.convert(mode).save(file, "PNG", **({"transparency": 0} if mode == "P" else {}))
    found = decoded_for_transformers(file.getvalue())
    assert found.mode == "RGB" and 255 in {max(pixel) for pixel in [found.getpixel((0, 0)), found.getpixel((7, 5))]}
    assert found.tobytes() == decode_image(file.getvalue()).tobytes()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_end_alike(server: InProcess, tiny_checkpoint: str, batch_size: int) -> None:
    """By a stop string and by length; above one at a time with padding."""
    prompts = [words(3 + 2 * i, i) for i in range(4)]
    with (
        ServerAnswers(parsed(add_server_options, "--url", server.url)) as ours,
        transformers_answers(tiny_checkpoint, "--batch-size", str(batch_size)) as theirs,
    ):
        assert ours.count_tokens(prompts) == theirs.count_tokens(prompts)
        assert ours.context_len == theirs.context_len == CONTEXT_LENGTH
        free = theirs.answer(prompts, 12, (), lambda: None)
        stop = (free[0].text[4:7], free[1].text[8:9])
        stopped = theirs.answer(prompts, 12, stop, lambda: None)
        assert texts(ours.answer(prompts, 12, (), lambda: None)) == texts(free)
        assert texts(ours.answer(prompts, 12, stop, lambda: None)) == texts(stopped)
    assert texts(stopped) != texts(free)
    assert not [text for text in texts(stopped) for string in stop if string in text]


def test_an_answer_ends_before_the_end_of_sequence_token(tiny_checkpoint: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    prompt_ids, ids = tokenizer("the cat").input_ids, tokenizer(" sat on the mat").input_ids
    end_id = tokenizer.convert_tokens_to_ids("<|end|>")
    answer = Continuation(tokenizer, prompt_ids, [end_id], ("mat",))
    assert not answer.meets_stop([end_id, *ids])
    assert answer.reply([*ids[:2], end_id, *ids[2:]]) == Reply(tokenizer.decode(ids[:2]), 3)
    assert answer.meets_stop(ids) and answer.reply([*ids, 5, 6]) == Reply(" sat on the ", len(ids))


def parsed(add_options: Callable[[argparse.ArgumentParser], None], *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(flags)


def transformers_answers(model: str, *flags: str) -> TransformersAnswers:
    return TransformersAnswers(parsed(add_transformers_options, "--model-path", model, "--device", "cpu", *flags))


def texts(replies: list[Reply]) -> list[str]:
    assert [reply.error for reply in replies] == [None] * len(replies)
    return [reply.text for reply in replies]


def test_what_the_server_refuses_is_no_wrong_answer(
    server: InProcess, tmp_path: Path, gsm8k_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A context length that the server does not have."""
    answers = tmp_path / "answers.jsonl"
    flags = [*gsm8k_data, "--result-filename", str(tmp_path / "result.jsonl"), "--answers", str(answers)]
    assert gsm8k_server.main([*flags, "--url", server.url, "--context-length", "100000"]) == 1
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["answered"] * 5 + ["failed"] * 2
    assert "context length" in rows[-1]["error"]
    assert "2 requests failed" in capsys.readouterr().out
