"""What the embedded model is trained with: conversations and pictures, drawn without end, as batches."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from demo_training import pictures as demo_pictures
from demo_training import skills as demo_skills
from demo_training.network import Batch
from demo_training.pictures import Picture
from demo_training.skills import Turn

VOCAB_SIZE = 832
CONTEXT_LENGTH = 1024
SPECIAL = (
    "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
END_OF_TEXT, SYSTEM, USER, ASSISTANT, END, *VISION_SPECIAL = SPECIAL
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = VISION_SPECIAL
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('The demo model knows the roles system, user and assistant, not ' + message.role) }}"
    "{%- endif -%}"
    "{{ '<|' + message.role + '|>' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'video' or 'video' in part or 'video_url' in part -%}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in part -%}{{ part.text }}"
    "{%- else -%}{{ raise_exception('The demo model takes text, images and videos, not ' + part.type) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

IGNORED = -100  # the label of a token that is not learned
SKILLS = list(demo_skills.SKILLS)


def extend_tokenizer(text: PreTrainedTokenizerFast, seed: int, conversations: int = 4000) -> PreTrainedTokenizerFast:
    """The text model's tokenizer with tokens for pictures, and with further merges of the wordings of questions about
    them. The merges come after its own, so that nearly all of its text stays cut as it was learned."""
    rng = random.Random(seed)
    backend = json.loads(text.backend_tokenizer.to_str())
    vocab, merges = backend["model"]["vocab"], backend["model"]["merges"]
    number = len(vocab)
    added = [dict(backend["added_tokens"][0], id=number + i, content=name) for i, name in enumerate(VISION_SPECIAL)]
    vocab.update((token["content"], token["id"]) for token in added)
    backend["added_tokens"] += added
    names = list(demo_skills.SIGHTS)
    texts = [
        part
        for _ in range(conversations)
        for turn in demo_skills.draw(rng.choice(names), rng, held_out=False).turns
        for part in turn[:2]
    ]
    cut = text.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = Counter(
        tuple(token.value for token in text.backend_tokenizer.model.tokenize(word))
        for part in texts
        for word, _ in cut(part)
    )
    while len(vocab) < VOCAB_SIZE:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(list(best))
        vocab.setdefault("".join(best), len(vocab))
        words = Counter({merged(word, best): count for word, count in words.items()})
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[token for token in SPECIAL if token not in (END, END_OF_TEXT)],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    parts: list[str] = []
    for part in word:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return tuple(parts)


def image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(min_pixels=demo_pictures.MIN_PIXELS, max_pixels=demo_pictures.MAX_PIXELS)


class Row:
    """A conversation as tokens, built from its start to its end."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.answers: list[int] = []
        self.skills: list[str] = []
        self.positions: list[np.ndarray] = []
        self.patches: list[np.ndarray] = []
        self.grids: list[tuple[int, int]] = []
        self.seen: list[np.ndarray] = []
        self._next = 0  # position of the next token

    def say(self, ids: list[int], skill: str | None = None) -> None:
        """Adds text; that of a skill is an answer, which is learned."""
        self.ids += ids
        self.labels += [IGNORED] * len(ids) if skill is None else ids
        self.answers += [-1 if skill is None else len(self.skills)] * len(ids)
        if skill is not None:
            self.skills.append(skill)
        self.positions.append(np.broadcast_to(np.arange(self._next, self._next + len(ids)), (3, len(ids))))
        self._next += len(ids)

    def show(self, picture: Picture, start: int, pad: int, end: int) -> None:
        """Adds a picture: so many placeholders, at positions that count rows and columns."""
        drawn = demo_pictures.draw(picture)
        patches, grid = demo_pictures.patches(drawn.image)
        rows, columns = (side // demo_pictures.MERGE for side in grid)
        self.say([start])
        self.ids += [pad] * (rows * columns)
        self.labels += [IGNORED] * (rows * columns)
        self.answers += [-1] * (rows * columns)
        self.positions.append(np.indices((1, rows, columns)).reshape(3, -1) + self._next)
        self._next += max(rows, columns)
        self.say([end])
        self.patches.append(patches)
        self.grids.append(grid)
        self.seen.append(demo_pictures.shown(drawn.parts, grid))


class Encoder:
    """Conversations to rows of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.special = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))

    def __call__(self, turns: list[Turn], as_taught: bool = True) -> Row:
        """``as_taught``: at times with a system message, or without the chat template. Else with neither, and only the
        last answer counts."""
        if as_taught and len(turns) == 1 and not turns[0].pictures and self.rng.random() < 0.12:
            return self._without_template(turns[0])
        row = Row()
        if as_taught and self.rng.random() < 0.15:
            row.say([self.special[SYSTEM], *self._ids(self.rng.choice(demo_skills.SYSTEM_PROMPTS)), self.special[END]])
        for turn in turns:
            row.say([self.special[USER]])
            if turn.shown_first:
                self._show(row, turn)
            row.say(self._ids(turn.said))
            if not turn.shown_first:
                self._show(row, turn)
            row.say([self.special[END], self.special[ASSISTANT]])
            asked = as_taught or turn is turns[-1]
            row.say([*self._ids(turn.answered), self.special[END]], turn.skill if asked else None)
        return row

    def _show(self, row: Row, turn: Turn) -> None:
        for picture in turn.pictures:
            row.show(picture, *(self.special[name] for name in (VISION_START, IMAGE_PAD, VISION_END)))

    def _without_template(self, turn: Turn) -> Row:
        """A question and its answer as plain lines, for prompts that come without the chat template."""
        row = Row()
        row.say(self._ids(turn.said))
        row.say([*self._ids("\n" + turn.answered), self.special[END]], turn.skill)
        return row

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def as_batch(rows: list[Row]) -> Batch:
    """Rows of like length, padded at the end; pictures of one size follow each other wherever the order allows."""
    rows = sorted(rows, key=lambda row: row.grids)
    width = max(len(row.ids) for row in rows)
    skills: list[str] = []
    answers = np.full((len(rows), width), -1)
    ids, labels, positions = np.zeros_like(answers), np.full_like(answers, IGNORED), np.zeros((3, *answers.shape), int)
    for i, row in enumerate(rows):
        length = len(row.ids)
        ids[i, :length], labels[i, :length] = row.ids, row.labels
        positions[:, i, :length] = np.concatenate(row.positions, axis=1)
        own = np.array(row.answers)
        answers[i, :length] = np.where(own < 0, -1, own + len(skills))
        skills += row.skills
    return Batch(
        *(torch.from_numpy(table) for table in (ids, positions, labels, answers)),
        skills,
        *stacked([(patches, seen) for row in rows for patches, seen in zip(row.patches, row.seen, strict=True)]),
        grids=[grid for row in rows for grid in row.grids],
    )


def stacked(pictures: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    if not pictures:
        return torch.zeros(0, 588), torch.zeros(0, 4, dtype=torch.int64)
    patches, seen = zip(*pictures, strict=True)
    return torch.from_numpy(np.concatenate(patches)), torch.from_numpy(np.concatenate(seen))


# ---- what is practised


class Conversations(torch.utils.data.IterableDataset):
    """Batches of about so many tokens without end, made in a process of their own. ``shares`` [number of skills] is
    shared with the training, which changes it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: str, tokens: int, shares: Tensor) -> None:
        self.tokenizer, self.seed, self.tokens, self.shares = tokenizer, seed, tokens, shares

    def __iter__(self) -> Iterator[Batch]:
        rng = random.Random(self.seed)
        encoder = Encoder(self.tokenizer, rng)
        while True:
            shares = dict(zip(SKILLS, self.shares.tolist(), strict=True))
            rows = [encoder(demo_skills.conversation(rng, shares)) for _ in range(512)]
            cut = cut_by_tokens(sorted(rows, key=lambda row: len(row.ids)), self.tokens)
            rng.shuffle(cut)
            yield from map(as_batch, cut)


def cut_by_tokens(rows: list[Row], tokens: int) -> list[list[Row]]:
    """Rows in order of length, cut so that each piece has about so many tokens when padded."""
    cut, start = [], 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or len(rows[stop].ids) * (stop + 1 - start) > tokens:
            cut.append(rows[start:stop])
            start = stop
    return cut


class Pictures(torch.utils.data.IterableDataset):
    """Batches of so many pictures, of the training side, with nothing said."""

    def __init__(self, seed: str, number: int) -> None:
        self.seed, self.number = seed, number

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[tuple[int, int]]]]:
        rng = random.Random(self.seed)
        scenes = (demo_skills.a_number, demo_skills.some_things, demo_skills.many_things, demo_skills.two_sizes)
        while True:
            drawn = []
            while len(drawn) < self.number:
                (picture,) = rng.choices(scenes, (4, 3, 2, 1))[0](rng)
                if not demo_skills.is_kept_back(picture.key):
                    drawn.append(demo_pictures.draw(picture))
            cut = [(*demo_pictures.patches(one.image), one.parts) for one in drawn]
            cut.sort(key=lambda one: one[1])
            grids = [grid for _, grid, _ in cut]
            yield *stacked([(patches, demo_pictures.shown(parts, grid)) for patches, grid, parts in cut]), grids


def in_own_process(data: torch.utils.data.IterableDataset) -> Iterator[Any]:
    return iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=6))


class Progress:
    """How often the answers of each skill were wrong lately, and what follows for its share."""

    def __init__(self) -> None:
        self.wrong = torch.ones(len(SKILLS))
        self.shares = torch.tensor([demo_skills.WEIGHTS[name] for name in SKILLS]).share_memory_()

    def note(self, batch: Batch, right: Tensor) -> None:
        """``right [B, L]``: where a learned token would have been the model's own."""
        failed = set(batch.answers[(batch.answers >= 0) & ~right].tolist())
        for answer, name in enumerate(batch.skills):
            self.wrong[SKILLS.index(name)].lerp_(torch.tensor(float(answer in failed)), 0.005)
        due = 0.2 + (5 * self.wrong).clamp(max=1)
        self.shares.copy_(due * torch.tensor([demo_skills.WEIGHTS[name] for name in SKILLS]))
