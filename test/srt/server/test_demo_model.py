"""The embedded model: what is said of it holds, and it answers questions that it was never trained on."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

import demo_skills
from rtp_llm.srt.configs.server_args import DEMO_MODEL
from tiny_server import free_port, python_process

SEED = 20
QUESTIONS = 20
RIGHT = 18
EVERY_DAY = ("addition", "subtraction", "sorting", "spelling", "days", "facts", "memory", "comparing")


def held_out_conversations(number: int) -> list[list[demo_skills.Turn]]:
    """One of each skill, and of some skills two."""
    rng = random.Random(SEED)
    names = [*demo_skills.SKILLS, *EVERY_DAY][:number]
    return [demo_skills.held_out_conversation(name, rng) for name in names]


def ask(client: OpenAI, turns: list[demo_skills.Turn]) -> str | None:
    """The model's answer to the last turn's question."""
    messages: list[Any] = []
    for said, answered in turns:
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
    done = client.chat.completions.create(model="rtp-llm-demo", messages=messages[:-1], temperature=0)
    assert done.choices[0].finish_reason == "stop"
    return done.choices[0].message.content


def test_held_out_questions_over_http(tmp_path: Path) -> None:
    """``rtp-llm serve`` without any model named."""
    port = free_port()
    with python_process(tmp_path, ["-m", "rtp_llm", "serve", "--port", str(port)], port) as server:
        server.wait_ready()
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        conversations = held_out_conversations(QUESTIONS)
        answers = [ask(client, turns) for turns in conversations]
    wrong = [
        f"{turns[-1][0]!r}: {answer!r}, not {turns[-1][1]!r}"
        for turns, answer in zip(conversations, answers, strict=True)
        if answer != turns[-1][1]
    ]
    assert QUESTIONS - len(wrong) >= RIGHT, "\n".join(wrong)


def test_held_out_questions_never_occur_in_training() -> None:
    """Of what continues a sum, both questions together; of what is to be remembered, the turn that tells it."""
    rng = random.Random(SEED)
    asked = set()
    for name in demo_skills.SKILLS:
        for _ in range(20):
            turns = demo_skills.draw(name, rng, held_out=True).turns
            asked.add(tuple(said for said, _ in (turns[:1] if name == "memory" else turns)))
    said = set()
    for _ in range(10_000):
        questions = [turn[0] for turn in demo_skills.conversation(rng)]
        said |= {(one,) for one in questions} | set(pairwise(questions))
    assert not said & asked


@pytest.mark.parametrize("name", demo_skills.SKILLS)
def test_every_skill_has_both_sides(name: str) -> None:
    rng = random.Random(SEED)
    for held_out in (True, False):
        exchange = demo_skills.draw(name, rng, held_out)
        assert demo_skills.is_held_out(exchange) == held_out
        assert all(said and answered for said, answered in exchange.turns)


def test_answers_are_right() -> None:
    """The rules that made the answers, checked from their texts by other means."""
    rng = random.Random(SEED)
    for _ in range(300):
        for name in ("addition", "subtraction"):
            sum_, result = demo_skills.draw(name, rng, held_out=False).turns[0][1].split(" = ")
            assert eval(sum_) == int(result)
        product = demo_skills.draw("multiplication", rng, held_out=False).turns[0][1].split("so ")[-1]
        assert eval(product.replace("x", "*").replace("=", "=="))
        question, answer = demo_skills.draw("sorting", rng, held_out=False).turns[0]
        numbers = [int(number) for number in answer.split(", ")]
        assert numbers in (sorted(numbers), sorted(numbers, reverse=True))
        assert all(str(number) in question for number in numbers)


def test_size() -> None:
    files = [path for path in Path(DEMO_MODEL).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert "toy" in (Path(DEMO_MODEL) / "README.md").read_text()
