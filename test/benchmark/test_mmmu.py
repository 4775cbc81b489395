"""MMMU and MMMU-Pro: data, prompts, pictures on their way, the reading and judging of answers, and the twin."""

import argparse
import base64
import json
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
import transformers
from PIL import Image
from pyarrow import parquet

from benchmark import compare_answers, make_mmmu_mini, server_chats
from benchmark.evaluation import Chat, EvaluationError, digest
from benchmark.mmmu import bench_hf, bench_rtp_llm, dataset, eval_utils, mmmu
from benchmark.mmmu_pro import bench_rtp_llm as bench_pro
from benchmark.mmmu_pro import mmmu_pro
from benchmark.transformers_answers import add_model_options
from benchmark.transformers_chats import TransformersChats
from rtp_llm.tools.bench_serving.async_http import BrokenResponse
from rtp_llm.tools.reference import load_processor
from tiny_models import make_tiny
from tiny_seeing import make_seeing

OPTIONS = {"A": "a cat", "B": "two dogs", "C": "", "D": "12 mice"}


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    assert make_mmmu_mini.main(["--output-dir", str(folder)]) == 0
    return folder


def mmmu_task(folder: Path, *flags: str) -> mmmu.PictureTask:
    return mmmu.make_task(parsed(mmmu.add_task_options, "--dataset-path", str(folder), *flags))


def pro_task(folder: Path, *flags: str) -> mmmu.PictureTask:
    return mmmu_pro.make_task(parsed(mmmu_pro.add_task_options, "--dataset-path", str(folder), *flags))


def parsed(add_options: Any, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(flags)


# Reading answers


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("The answer is (D).", "D"),
        ("(A) is wrong, so it is (B)", "B"),
        ("(B), and A or D would be wrong", "B"),  # brackets first
        ("It is B or D , no doubt", "D"),  # the last one
        ("B: two dogs", None),  # neither blanks around the letter nor six words
        ("I think that there are two dogs", "B"),
        ("first a cat came, then Two Dogs, and slept", "B"),
        ("two dogs", None),
        ("nothing of this can be said at all", None),  # though every text contains the empty option C
        ("", None),
        ("ABCD", None),
        ("(E)", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert eval_utils.read_choice(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"),
        ("Answer: A\nNo, wait.\nAnswer: (D)", "D"),
        ("Answer: A or B, rather B.", "B"),  # not the only one: read as any text
        ("Answer: DNA", None),
        ("**Answer: C**", "C"),
        ("B. two dogs", "B"),
        ("it is\nD\n", "D"),
        ("(A) because B. is wrong", "A"),
        ("there are two dogs in this picture", "B"),
        ("", None),
    ],
)
def test_letters_of_mmmu_pro(text: str, letter: str | None) -> None:
    assert eval_utils.read_choice_pro(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("12.97", ["12.97"], True),
        ("The answer is 12.974 g", ["12.97"], True),
        ("12.9", ["12.97"], False),
        ("x = 3 + 4 = 7", ["7"], True),
        ("it costs 7,243,000 dollars", ["7243000"], True),
        ("-120", ["120"], False),
        ("so it is 1.5e3", ["1500"], True),
        ("it is in Florida, near Tampa", ["Tampa", "Florida"], True),
        ("the result is 24/7", ["24/7", "3.429"], True),
        ("about 3.43", ["24/7", "3.429"], True),
        ("Transformation.", ["Transformation"], True),
        ("the answer is blue\nbut red is nice", ["blue"], True),
        ("C", ["C"], True),
        ("carbon", ["C"], False),  # a single letter stands beside a blank
        ("it is vitamin c", ["C"], True),
        ("nan", ["1"], False),
        ("9" * 400, ["1"], False),
        ("", ["1"], False),
    ],
)
def test_open_answers(text: str, answers: list[str], right: bool) -> None:
    assert eval_utils.is_right(eval_utils.read_open(text), answers) == right


def test_what_open_answers_are_read_as_can_be_written_down() -> None:
    assert eval_utils.read_open("It is 2.") == [2.0]
    assert eval_utils.read_open("It is two.\n2 = 1 + 1") == ["two.", "1 + 1", 1.0]
    assert json.loads(json.dumps(eval_utils.read_open("inf, nan, 1e999 and 5")))[-1] == 5.0


def test_the_real_answers(data_dir: Path) -> None:
    """Each of the 900 is right where a text gives it, and wrong where it gives something else."""
    answers = json.loads((data_dir / "eval/mmmu/answer_dict_val.json").read_text())
    assert len(answers) == 900
    options = {letter: f"option {letter}" for letter in "ABCDEFGHI"}
    for name, row in answers.items():
        truth = row["ground_truth"]
        if row["question_type"] == "multiple-choice":
            assert eval_utils.read_choice(f"I believe that it is ({truth}).", options) == truth, name
            continue
        truths = [truth] if isinstance(truth, str) else truth
        for one in truths:
            assert eval_utils.is_right(eval_utils.read_open(f"The answer is {one}"), truths), name
        assert not eval_utils.is_right(eval_utils.read_open("The answer is 31337"), truths), name


def test_thoughts_are_no_answer() -> None:
    everything, after_so = re.compile("(?s)(.*)"), re.compile(r"so: (\w)")
    assert mmmu.answer_part(everything, "<think>(A)\n(B)</think>\n\n(C)\nindeed") == "(C)\nindeed"
    assert mmmu.answer_part(after_so, "A B so: D, or A") == "D"
    assert mmmu.answer_part(after_so, "just B") == "just B"


@pytest.mark.parametrize(("text", "message"), [("(", "no regular expression"), (".*", "has no group")])
def test_expressions_that_read_nothing(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(mmmu.add_task_options, "--response-answer-regex", text)
    assert message in capsys.readouterr().err


# Prompts


@pytest.mark.parametrize(
    ("text", "pictures", "parts"),
    [
        ("a <image 2> b <image 1>", {1: b"x", 2: b"y"}, ("a ", b"y", " b ", b"x")),
        ("<image 1><image 1>", {1: b"x"}, (b"x", b"x")),
        ("nothing", {1: b"x", 2: b"y"}, (b"x", b"y", "nothing")),
        ("a <image 2> b", {1: b"x"}, (b"x", "a <image 2> b")),
        ("a", {}, ("a",)),
    ],
)
def test_pictures_stand_where_they_are_mentioned(text: str, pictures: dict[int, bytes], parts: tuple) -> None:
    assert dataset.placed(text, pictures) == Chat(parts)


def test_prompts_differ_by_their_pictures() -> None:
    chats = [("a", b"x"), ("a", b"y"), (b"x", "a"), ("ab", b"x"), ("a",), (b"a",)]
    assert len({digest(Chat(parts)) for parts in chats}) == len(chats)


def test_prompts(mini: Path) -> None:
    questions = mmmu_task(mini / "MMMU").questions
    assert len(questions) == 36 and len({question.name for question in questions}) == 36
    chosen = next(q for q in questions if q.options and "Which number" in q.text)
    before, picture, after = chosen.chat.parts
    assert before == "Which number is written in " and Image.open(BytesIO(picture)).format == "PNG"
    assert re.fullmatch(
        r"\?\n\n\(A\) \d\d\n\(B\) \d\d\n\(C\) \d\d\n\(D\) \d\d\n\n"
        "Answer with the option's letter from the given choices directly.",
        after,
    )
    free = next(q for q in questions if not q.options)
    assert free.chat.parts[-1].endswith("?\n\nAnswer the question using a single word or phrase.")
    assert free.is_right(eval_utils.read_open(f"It is {free.label[0]}")) and not free.is_right(["no", 0.0])
    among_pictures = next(q for q in questions if q.text.startswith("Which of the pictures"))
    assert [type(part) for part in among_pictures.chat.parts] == [str, bytes] * 4 + [str]
    assert [part for part in among_pictures.chat.parts if isinstance(part, str)][1:4] == ["\n(B) ", "\n(C) ", "\n(D) "]


def test_prompts_of_a_format_file(mini: Path, tmp_path: Path) -> None:
    file = tmp_path / "format.yaml"
    file.write_text('task_instructions: ["Look."]\nshort_ans_example_format: ["{x} {} {y}"]\n')
    questions = mmmu_task(mini / "MMMU", "--prompt-format-file", str(file)).questions
    assert all(question.text.startswith("Look.\n\n") for question in questions)
    free = next(q for q in questions if not q.options)
    assert re.fullmatch(r"Look\.\n\n\{x\} .*\? \{y\}", free.text)
    for content, message in [("other: x", "no other entries"), ("multi_choice_example_format: '{}'", "2 times {}")]:
        file.write_text(content)
        with pytest.raises(EvaluationError, match=message):
            mmmu.read_formats(file)


def test_prompts_of_mmmu_pro(mini: Path) -> None:
    ten, four = (pro_task(mini / "MMMU_Pro", "--setting", s).questions for s in ("standard-10", "standard-4"))
    assert len(ten) == len(four) == 36
    numbers = [next(q for q in of if "Which number" in q.text) for of in (ten, four)]
    assert [list(question.options) for question in numbers] == [list("ABCDEFGHIJ"), list("ABCD")]
    after = numbers[1].chat.parts[-1]
    assert re.fullmatch(
        r"\?\nA\. \d\d\nB\. \d\d\nC\. \d\d\nD\. \d\d\nAnswer with the option letter from the given choices directly\.",
        after,
    )
    vision = pro_task(mini / "MMMU_Pro", "--setting", "vision", "--mode", "cot")
    assert vision.name == "mmmu_pro_vision_cot"
    assert {q.chat.parts[1] for q in vision.questions} == {mmmu_pro.INSTRUCTIONS["cot", True]}
    assert all(q.label in q.options and q.subject in q.name for q in vision.questions)


def test_the_same_options_draw_the_same_questions(mini: Path, tmp_path: Path) -> None:
    def prompts(folder: Path) -> list[str]:
        return [digest(question.chat) for question in mmmu_task(folder / "MMMU").questions]

    for seed in ("0", "1"):
        assert make_mmmu_mini.main(["--output-dir", str(tmp_path / seed), "--seed", seed]) == 0
    assert prompts(tmp_path / "0") == prompts(mini) != prompts(tmp_path / "1")


def test_drawn_questions_have_one_right_answer(mini: Path) -> None:
    for setting in ("standard-10", "standard-4", "vision"):
        for question in pro_task(mini / "MMMU_Pro", "--setting", setting).questions:
            assert len(set(question.options.values())) == len(question.options) > 1


def test_files_say_what_their_columns_are(mini: Path) -> None:
    schema = parquet.read_schema(next(mini.glob("MMMU/*/*.parquet")))
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert set(features) == set(schema.names)
    assert features["image_7"] == {"_type": "Image"} and features["question_type"]["dtype"] == "string"


def test_questions_with_large_pictures_are_left_out(mini: Path) -> None:
    every, some = mmmu_task(mini / "MMMU"), mmmu_task(mini / "MMMU", "--image-pixels-limit", str(140 * 140))
    assert {mmmu.largest_picture(question) for question in every.questions} == {112**2, 140**2, 168**2}
    assert {mmmu.largest_picture(question) for question in some.questions} == {112**2, 140**2}
    num_left_out = len(every.questions) - len(some.questions)
    assert every.left_out == {} and some.left_out == {"a picture has more than 19600 pixels": num_left_out}


# Data that is not what it should be


def write(folder: Path, **changes: Any) -> Path:
    """A data set of one question, with other values in its row."""
    row = {"id": "x_1", "question": "?", "options": "['a', 'b']", "answer": "A", "question_type": "multiple-choice"}
    path = folder / "Art" / "validation-00000-of-00001.parquet"
    make_mmmu_mini.write_rows(path, [row | changes], tuple(row), ("image_1",))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": "__import__('os').system('exit 3')"}, "must have id, question, options"),
        ({"options": "'ab'"}, "must have id, question, options"),
        ({"options": "['a']"}, "must have 2 to 26 options, not 1"),
        ({"answer": "C"}, "must be one of its 2 letters, not 'C'"),
        ({"answer": "AB"}, "must be one of its 2 letters, not 'AB'"),
        ({"answer": "?"}, "must be one of its 2 letters"),  # as in the test split
        ({"image_1": {"bytes": None, "path": "x.png"}}, "must have id, question, options"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        mmmu_task(write(tmp_path, **changes))


def test_open_questions_may_have_several_answers(tmp_path: Path) -> None:
    (question,) = mmmu_task(write(tmp_path, question_type="open", options="[]", answer="['1/2', '0.5']")).questions
    assert question.label == ["1/2", "0.5"] and question.options == {}
    (question,) = mmmu_task(write(tmp_path, question_type="open", options="[]", answer="42")).questions
    assert question.label == ["42"]


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match=r"no validation-\*.parquet in .*make_mmmu_mini.py"):
        mmmu_task(tmp_path)
    with pytest.raises(EvaluationError, match=r"no test-\*.parquet in .*vision"):
        pro_task(tmp_path, "--setting", "vision")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EvaluationError, match=r"no/such/folder is no folder here.*make_mmmu_mini.py"):
        mmmu_task(Path("no/such/folder"))
    path = tmp_path / "Art" / "validation-0.parquet"
    path.parent.mkdir()
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(EvaluationError, match=r"cannot read .*validation-0\.parquet"):
        mmmu_task(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EvaluationError, match="pip install pyarrow"):
        mmmu_task(tmp_path)
    assert make_mmmu_mini.main(["--output-dir", str(tmp_path)]) == 2


def test_a_picture_that_is_none_is_told_only_where_it_is_looked_at(tmp_path: Path) -> None:
    folder = write(tmp_path, image_1={"bytes": b"no picture", "path": None})
    assert len(mmmu_task(folder).questions) == 1
    with pytest.raises(EvaluationError, match="a picture of question x_1 cannot be read"):
        mmmu_task(folder, "--image-pixels-limit", "100")


# A server's answers


class ChatServer(BaseHTTPRequestHandler):
    """Answers each chat as ``replies`` says: a text, None for null, or an error of status 400."""

    replies: ClassVar[dict[str, Any]] = {}
    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        reply = self.replies[digest(chat_of(body))]
        if isinstance(reply, ValueError):
            self._send(400, {"error": {"message": str(reply)}})
        else:
            answer = {"message": {"role": "assistant", "content": reply}}
            self._send(200, {"choices": [answer], "usage": {"completion_tokens": 3}})

    def _send(self, status: int, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *what: Any) -> None:
        pass


def chat_of(body: dict[str, Any]) -> Chat:
    """The texts and pictures that a request brings."""
    (message,) = body["messages"]
    assert message["role"] == "user"
    parts: list[str | bytes] = []
    for part in message["content"]:
        if part["type"] == "text":
            parts.append(part["text"])
        else:
            head, _, data = part["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            parts.append(base64.b64decode(data, validate=True))
    return Chat(tuple(parts))


@pytest.fixture
def chat_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), ChatServer)
    ChatServer.bodies = []
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def outputs(folder: Path) -> list[str]:
    return ["--result-filename", str(folder / "result.jsonl"), "--answers", str(folder / "answers.jsonl")]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_against_any_server(
    mini: Path, chat_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = mmmu_task(mini / "MMMU").questions
    right = {digest(q.chat): f"<think>?</think>({q.label})" if q.options else q.label[0] for q in questions}
    choices = [digest(q.chat) for q in questions if q.options]
    free = next(digest(q.chat) for q in questions if not q.options)
    oddities = {choices[0]: None, choices[1]: ValueError("no pictures today"), free: " "}
    ChatServer.replies = right | oddities
    flags = ["--dataset-path", str(mini / "MMMU"), "--url", chat_server, "--extra-request-body", '{"top_k": 1}']
    assert bench_rtp_llm.main([*flags, *outputs(tmp_path)]) == 1
    (record,) = rows_of(tmp_path / "result.jsonl")
    assert (record["answered"], record["failed"], record["skipped"], record["guessed"]) == (35, 1, 0, 1)
    assert record["invalid"] == 2 / 35 and record["output_tokens"] == 35 * 3
    rows = {row["prompt_sha256"]: row for row in rows_of(tmp_path / "answers.jsonl")}
    guessed = rows[choices[0]]
    assert guessed["answer"] is None and guessed["guess"] in "ABCD"
    assert guessed["right"] == (guessed["guess"] == guessed["label"])
    assert not rows[free]["right"] and rows[free]["answer"] is None and "guess" not in rows[free]
    assert all(row["right"] for key, row in rows.items() if key not in oddities)
    assert record["correct"] == 33 + guessed["right"]
    assert sum(group["answered"] for group in record["groups"].values()) == 35
    body = ChatServer.bodies[0]
    assert {key: body[key] for key in body if key != "messages"} == {
        "model": "fake", "max_tokens": 30, "temperature": 0, "top_k": 1
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "Overall-Science" in printed and "Overall accuracy: " in printed and "no pictures today" in printed
    assert "1 answers could not be read; a guess drawn by the seed" in printed


def test_guesses_depend_on_the_seed_and_nothing_else(mini: Path) -> None:
    def guesses(*flags: str) -> dict[str, str]:
        task = mmmu_task(mini / "MMMU", *flags)
        return {question.name: task.guess(question) for question in task.questions if question.options}

    every, some = guesses(), guesses("--num-questions", "9")
    assert some.items() < every.items()
    assert guesses("--seed", "2") != every == guesses("--seed", "1")
    assert len(set(every.values())) == 4


def test_mmmu_pro_against_any_server(mini: Path, chat_server: str, tmp_path: Path) -> None:
    flags = ["--dataset-path", str(mini / "MMMU_Pro"), "--setting", "vision", "--limit", "8"]
    questions = pro_task(mini / "MMMU_Pro", *flags[2:]).questions
    ChatServer.replies = {digest(q.chat): f"A, or rather\nAnswer: {q.label}" for q in questions}
    assert bench_pro.main([*flags, "--url", chat_server, *outputs(tmp_path)]) == 0
    (record,) = rows_of(tmp_path / "result.jsonl")
    assert (record["task"], record["accuracy"], record["answered"]) == ("mmmu_pro_vision_direct", 1.0, 8)
    assert len(record["subjects"]) == 6  # spread


@pytest.mark.parametrize("answer", [None, {}, {"choices": [{"text": "x"}]}, {"choices": [{"message": {"content": 3}}]}])
def test_what_is_no_chat_completion(answer: Any) -> None:
    with pytest.raises(BrokenResponse):
        server_chats.read_chat_completion(answer)


@pytest.mark.parametrize(
    ("form", "name"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")]
)
def test_kinds_of_pictures(form: str, name: str) -> None:
    content = BytesIO()
    Image.new("RGB", (3, 2)).save(content, form)
    part = server_chats.content_part(content.getvalue())
    assert part["image_url"]["url"].startswith(f"data:image/{name};base64,")


# The twin


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random checkpoint of the Qwen2-VL architecture, with all that a processor needs."""
    return make_seeing(tmp_path_factory.mktemp("seeing"))


@cache
def twin(checkpoint: str, *flags: str) -> TransformersChats:
    return TransformersChats(parsed(add_model_options, "--model-path", checkpoint, "--device", "cpu", *flags))


def test_the_twin_sees_every_picture_in_its_place(mini: Path, seeing: str) -> None:
    question = next(q for q in mmmu_task(mini / "MMMU").questions if q.text.startswith("Which of the pictures"))
    answers = twin(seeing)
    inputs = answers._inputs(question.chat)
    image_id = answers._model.config.image_token_id
    assert (inputs["input_ids"] == image_id).sum() == inputs["image_grid_thw"].prod(-1).sum() // 4
    assert len(inputs["image_grid_thw"]) == 4
    text = answers._processor.tokenizer.decode(inputs["input_ids"][0])
    texts = re.split(r"(?:<\|image_pad\|>)+", text.replace("<|vision_start|>", "").replace("<|vision_end|>", ""))
    assert texts[0].startswith("user:Which of the pictures") and texts[1:4] == ["\n(B) ", "\n(C) ", "\n(D) "]
    assert texts[4].endswith("directly.\nassistant:")


def test_the_twin_answers_greedily(mini: Path, seeing: str) -> None:
    """Token by token from the model's forward, without any cache."""
    chat = mmmu_task(mini / "MMMU").questions[0].chat
    answers = twin(seeing)
    inputs = answers._inputs(chat)
    ids = inputs["input_ids"]
    said: list[int] = []
    for _ in range(5):
        length = ids.shape[1] + len(said)
        row = torch.cat([ids, torch.tensor([said], dtype=torch.long)], dim=1)
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, length - ids.shape[1]))
        pictures = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
        with torch.inference_mode():
            said.append(int(answers._model(row, mm_token_type_ids=kinds, **pictures).logits[0, -1].argmax()))
    (reply,) = answers.answer([chat], 5, (), lambda: None)
    assert reply.error is None and reply.num_tokens == 5
    assert reply.text == answers._processor.tokenizer.decode(said, skip_special_tokens=True)


def test_a_run_of_the_twin(mini: Path, seeing: str, tmp_path: Path) -> None:
    flags = ["--dataset-path", str(mini / "MMMU"), "--limit", "4", "--max-new-tokens", "3", *outputs(tmp_path)]
    assert bench_hf.main([*flags, "--model-path", seeing, "--device", "cpu"]) == 0
    rows = rows_of(tmp_path / "answers.jsonl")
    assert [row["status"] for row in rows] == ["answered"] * 4
    expected = [digest(question.chat) for question in mmmu_task(mini / "MMMU", "--limit", "4").questions]
    assert [row["prompt_sha256"] for row in rows] == expected
    assert compare_answers.main([str(tmp_path / "answers.jsonl")] * 2) == 0


def test_what_the_twin_cannot_answer(seeing: str, tmp_path: Path) -> None:
    answers = twin(seeing, "--context-length", "40")
    picture = BytesIO()
    Image.new("RGB", (60, 60)).save(picture, "PNG")
    chats = [Chat(("a" * 100,)), Chat((b"no picture", "b")), Chat((picture.getvalue(), "c"))]
    done: list[None] = []
    replies = answers.answer(chats, 4, (), lambda: done.append(None))
    assert "exceed the context length of 40" in replies[0].error and "UnidentifiedImageError" in replies[1].error
    assert replies[2].error is None and len(done) == 3
    with pytest.raises(EvaluationError, match=r"\(LlamaForCausalLM\) takes no pictures"):
        twin(make_tiny("LlamaForCausalLM", tmp_path))


def test_processors_without_their_part_for_videos(seeing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchvision is missing, as transformers wants it for videos."""

    def missing(*args: Any, **kwargs: Any) -> None:
        raise ImportError("torchvision")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)
    processor = load_processor(seeing)
    assert type(processor).__name__ == "Qwen2VLProcessor"
    sizes: Sequence[tuple[int, int]] = [(84, 56), (56, 112)]
    pictures = [Image.new("RGB", size) for size in sizes]
    inputs = processor(text=["<|image_pad|> and <|image_pad|>"], images=pictures, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 8, 4]]
