"""The embedded model: what is said of it holds, and it answers questions that it was never trained on."""

import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from demo import image_part
from openai import OpenAI

from demo_training import skills as demo_skills
from demo_training.pictures import SHADES, draw
from rtp_llm.srt.configs.server_args import DEMO_MODEL
from tiny_server import free_port, python_process

SEED = 20
QUESTIONS = 40
RIGHT = 36
CLAIMS = Path(__file__).resolve().parents[3] / "docs" / "demo-model.md"


def claimed() -> list[str]:
    """The skills that docs/demo-model.md says the model has: those of 95 % and more."""
    rows = re.findall(r"^\| ([a-z ]+) \|.*\| (\d+\.\d) % \|$", CLAIMS.read_text(), re.MULTILINE)
    return [name.replace(" ", "_") for name, share in rows if float(share) >= 95]


def held_out_conversations(number: int) -> list[list[demo_skills.Turn]]:
    """Return conversations of all skills in turn."""
    rng = random.Random(SEED)
    names = claimed()
    return [demo_skills.held_out_conversation(names[i % len(names)], rng) for i in range(number)]


def ask(client: OpenAI, turns: list[demo_skills.Turn]) -> str | None:
    """The model's answer to the last turn's question."""
    messages = demo_skills.as_messages(turns, lambda picture: image_part(draw(picture).image))
    done = client.chat.completions.create(model="rtp-llm-demo", messages=messages, temperature=0)
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
        f"{turns[-1].said!r}: {answer!r}, not {turns[-1].answered!r}"
        for turns, answer in zip(conversations, answers, strict=True)
        if answer != turns[-1].answered
    ]
    assert QUESTIONS - len(wrong) >= RIGHT, "\n".join(wrong)


def test_held_out_questions_never_occur_in_training() -> None:
    """Compares both questions where a sum goes on; the telling turn where something is to be remembered; of what is
    asked about pictures, what one of the pictures shows."""
    rng = random.Random(SEED)
    asked = set()
    for name in demo_skills.SKILLS:
        for _ in range(20):
            turns = demo_skills.draw(name, rng, held_out=True).turns
            if name not in demo_skills.SIGHTS:
                asked.add(tuple(turn.said for turn in (turns[:1] if name == "memory" else turns)))
    said = set()
    for _ in range(10_000):
        turns = demo_skills.conversation(rng)
        questions = [turn.said for turn in turns]
        if not any(turn.pictures for turn in turns):  # the same words about a picture are another question
            said |= {(one,) for one in questions} | set(pairwise(questions))
        assert not any(demo_skills.is_kept_back(picture.key) for turn in turns for picture in turn.pictures)
    assert not said & asked


@pytest.mark.parametrize("name", demo_skills.SKILLS)
def test_every_skill_has_both_sides(name: str) -> None:
    rng = random.Random(SEED)
    for held_out in (True, False):
        exchange = demo_skills.draw(name, rng, held_out)
        assert demo_skills.is_held_out(exchange) == held_out
        assert all(turn.said and turn.answered for turn in exchange.turns)
        kept_back = any(demo_skills.is_kept_back(picture.key) for turn in exchange.turns for picture in turn.pictures)
        assert kept_back == (held_out and name in demo_skills.SIGHTS)


def test_answers_are_right() -> None:
    """The rules that made the answers, checked from their texts by other means."""
    rng = random.Random(SEED)
    for _ in range(300):
        for name in ("addition", "subtraction"):
            sum_, result = demo_skills.draw(name, rng, held_out=False).turns[0].answered.split(" = ")
            assert eval(sum_) == int(result)
        product = demo_skills.draw("multiplication", rng, held_out=False).turns[0].answered.split("so ")[-1]
        assert eval(product.replace("x", "*").replace("=", "=="))
        turn = demo_skills.draw("sorting", rng, held_out=False).turns[0]
        numbers = [int(number) for number in turn.answered.split(", ")]
        assert numbers in (sorted(numbers), sorted(numbers, reverse=True))
        assert all(str(number) in turn.said for number in numbers)


def test_what_is_drawn_is_what_is_told() -> None:
    """Things drawn alone have pixels of their color, where they are said to be."""
    rng = random.Random(SEED)
    for _ in range(100):
        (picture,) = demo_skills.one_thing(rng)
        (thing,) = picture.things
        drawn = draw(picture)
        pixels = np.asarray(drawn.image).astype(int)
        inside = np.ones(pixels.shape[:2], bool)
        for channel, (low, high) in enumerate(SHADES[thing.color]):
            inside &= (pixels[:, :, channel] >= low) & (pixels[:, :, channel] <= high)
        rows, columns = inside.nonzero()
        row, column = divmod(thing.place, 3)
        assert int(3 * rows.mean() / inside.shape[0]) == row
        assert int(3 * columns.mean() / inside.shape[1]) == column


def test_enough_is_claimed() -> None:
    """Nearly all of what needs no picture, and five skills of seeing."""
    seeing = set(claimed()) & demo_skills.SIGHTS.keys()
    assert len(seeing) >= 5
    assert len(claimed()) - len(seeing) >= 18


def test_size() -> None:
    files = [path for path in Path(DEMO_MODEL).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert "toy" in (Path(DEMO_MODEL) / "README.md").read_text()
