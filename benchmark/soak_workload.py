"""The good requests of a soak: a recorded trace's lengths and shared beginnings, in questions that the model knows.

Each exchange of a conversation stands for a stretch of the trace's prompt and is decided by the block that begins it,
so that prompts that shared blocks share exchanges; the last exchange is asked for its answer.
"""

import base64
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from demo_training import skills as demo_skills
from demo_training.pictures import Picture, draw
from rtp_llm.tools.bench_serving.workloads import BenchRequest

TOKENS_PER_EXCHANGE = 25  # of the embedded model's conversations, about
MIN_OUTPUT, MAX_OUTPUT = 4, 96


@dataclass(frozen=True, slots=True)
class GoodRequest:
    """A greedy request; ``arrival_s`` from the start of the trace."""

    number: int
    arrival_s: float
    path: str
    body: dict[str, Any]
    has_image: bool

    def content(self, stream: bool) -> bytes:
        return json.dumps(self.body | {"stream": stream}).encode()


def good_requests(
    trace: Sequence[BenchRequest], image_share: float, seed: int, most_exchanges: int
) -> list[GoodRequest]:
    """One for each request of the trace, whose lengths are scaled already."""
    return [_good_request(i, request, image_share, seed, most_exchanges) for i, request in enumerate(trace)]


def _good_request(
    number: int, request: BenchRequest, image_share: float, seed: int, most_exchanges: int
) -> GoodRequest:
    rng = random.Random(f"{seed}:{number}")
    has_image = rng.random() < image_share
    turns = _told(request, seed, most_exchanges)
    turns.append(_asked(rng, has_image))
    max_tokens = max(MIN_OUTPUT, min(MAX_OUTPUT, request.output_len))
    if has_image or number % 4 < 2:
        messages = [message for turn in turns for message in _messages(turn)][:-1]
        path, body = "/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": max_tokens}
    else:
        prompt = "".join(f"<|user|>{turn.said}<|end|><|assistant|>{turn.answered}<|end|>" for turn in turns[:-1])
        prompt += f"<|user|>{turns[-1].said}<|end|><|assistant|>"
        path, body = "/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens}
        if number % 4 == 3:
            params = {"temperature": 0, "max_new_tokens": max_tokens}
            path, body = "/generate", {"text": prompt, "sampling_params": params}
    return GoodRequest(number, request.arrival_s or 0.0, path, body, has_image)


def _told(request: BenchRequest, seed: int, most: int) -> list[demo_skills.Turn]:
    """The exchanges before the question."""
    turns: list[demo_skills.Turn] = []
    start = 0
    for piece in request.pieces:  # the exchange that begins in each stretch is the block's that lies there
        if start >= len(turns) * TOKENS_PER_EXCHANGE and len(turns) < most:
            rng = random.Random(f"{seed}:block {piece.number}")
            turns.append(demo_skills.draw(rng.choice(PLAIN_SKILLS), rng, held_out=False).turns[0])
        start += piece.num_tokens
    return turns


def _asked(rng: random.Random, has_image: bool) -> demo_skills.Turn:
    skill = rng.choice(SEEING_SKILLS if has_image else PLAIN_SKILLS)
    return demo_skills.draw(skill, rng, held_out=rng.random() < 0.5).turns[0]


# Of one exchange each, in a fixed order: what the seed decides must not depend on hashes.
SEEING_SKILLS = ("shapes", "colors", "positions", "larger", "reading")
PLAIN_SKILLS = tuple(sorted(set(demo_skills.SKILLS) - set(demo_skills.SIGHTS) - {"memory", "going_on", "no_picture"}))


def _messages(turn: demo_skills.Turn) -> list[dict[str, Any]]:
    text = {"type": "text", "text": turn.said}
    content = [*map(_image_part, turn.pictures), text] if turn.pictures else turn.said
    return [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answered}]


def _image_part(picture: Picture) -> dict[str, Any]:
    file = io.BytesIO()
    draw(picture).image.save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }
