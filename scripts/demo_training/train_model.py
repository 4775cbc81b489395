"""Trains the embedded model, rtp_llm/assets/demo, from nothing but the rules of skills.py.

    python scripts/demo_training/train_text.py --out text                      # the language model it starts from
    python scripts/demo_training/train_model.py train --start text --out demo  # 2 hours on one core; --resume goes on
    python scripts/demo_training/train_model.py check --model demo             # transformers computes the same
    python scripts/demo_training/train_model.py evaluate --model demo          # accuracy on held-out questions

The folder is a Hugging Face checkpoint of the Qwen2-VL architecture: configuration, bfloat16 weights, tokenizer, chat
template, image processor. The language model's weights are those of the text model, with a layer more. First the vision
tower alone learns to say what each patch of a picture shows; then the whole learns from conversations of like length,
of whose tokens only the assistant's words are learned. How often a skill is practised follows from how often its
answers were wrong lately.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of scripts, for the modules beside this one

from demo_training import pictures as demo_pictures
from demo_training import skills as demo_skills
from demo_training.network import Batch, DemoNetwork
from demo_training.optimizer import Muon, bound, rate_at
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
console = Console(highlight=False, soft_wrap=True)


# ---- text and pictures to ids


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


# ---- the model and its training


def make_config(tokenizer: PreTrainedTokenizerFast, start: Qwen3Config) -> Qwen2VLConfig:
    """The text model's shape with one layer more, and a tower that sees. Rotary frequencies go up to one per position;
    the first counts time, the next two rows, the others columns: nearly all of a real model's are too slow to tell
    rows and columns as few as these apart."""
    names = dict(
        image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )  # fmt: skip
    special = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    text = dict(
        vocab_size=VOCAB_SIZE, hidden_size=start.hidden_size, intermediate_size=start.intermediate_size,
        num_hidden_layers=start.num_hidden_layers + 1, num_attention_heads=start.num_attention_heads,
        num_key_value_heads=start.num_key_value_heads, max_position_embeddings=CONTEXT_LENGTH, rms_norm_eps=1e-6,
        rope_parameters=dict(start.rope_parameters, mrope_section=[1, 2, 13]),
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = dict(depth=4, embed_dim=128, hidden_size=start.hidden_size, num_heads=4, mlp_ratio=4)
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)


def is_learned(name: str) -> bool:
    """Whether the text model has this parameter too."""
    return ".language_model.layers." in name and f".layers.{NEW_LAYER}." not in name


NEW_LAYER = 3  # the layer that is new; it starts as the identity


@torch.no_grad()
def start_from(network: DemoNetwork, text: Qwen3ForCausalLM, tokenizers: list[PreTrainedTokenizerFast]) -> None:
    """Gives the network the text model's weights. Qwen2-VL does not normalize queries and keys, as Qwen3 does: the
    factor by which each head's were normalized on average takes the place of the norm. A token that the text model
    does not have starts as the mean of its pieces."""
    theirs, ours = tokenizers
    factors = norm_factors(text, theirs)
    language = network.model.language_model
    kept = [layer for i, layer in enumerate(language.layers) if i != NEW_LAYER]
    for layer, old, factor in zip(kept, text.model.layers, factors, strict=True):
        for name, parameter in old.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                continue
            layer.get_parameter(name).copy_(parameter)
        for name, by_head in factor.items():
            norm = getattr(old.self_attn, f"{name}_norm").weight
            weight = getattr(layer.self_attn, f"{name}_proj").weight
            weight.mul_((by_head[:, None] * norm).flatten()[:, None])
    language.norm.weight.copy_(text.model.norm.weight)
    table, old_table = language.embed_tokens.weight, text.model.embed_tokens.weight
    table[: len(old_table)] = old_table
    for token in range(len(old_table), len(table)):
        pieces = theirs(ours.decode([token]), add_special_tokens=False)["input_ids"]
        if ours.convert_ids_to_tokens(token) not in SPECIAL:
            table[token] = old_table[pieces].mean(0)


@torch.no_grad()
def norm_factors(text: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Tensor]]:
    """For each layer the mean of 1 / rms of each head's queries and keys, over some conversations of the text model."""
    rng = random.Random(7)
    seen: list[dict[str, list[Tensor]]] = [{"q": [], "k": []} for _ in text.model.layers]
    hooks = [
        getattr(layer.self_attn, f"{name}_norm").register_forward_pre_hook(
            lambda _, inputs, own=own: own.append(inputs[0].square().mean(-1).rsqrt().flatten(0, 1))
        )
        for layer, both in zip(text.model.layers, seen, strict=True)
        for name, own in both.items()
    ]
    names = [name for name in SKILLS if name not in demo_skills.SIGHTS]
    for _ in range(300):
        turns = demo_skills.draw(rng.choice(names), rng, held_out=False).turns
        said = "".join(f"{USER}{turn.said}{END}{ASSISTANT}{turn.answered}{END}" for turn in turns)
        text(torch.tensor([tokenizer(said, add_special_tokens=False)["input_ids"]]))
    for hook in hooks:
        hook.remove()
    return [{name: torch.cat(own).mean(0) for name, own in both.items()} for both in seen]


class Training:
    """The network, what only training needs beside it, and the clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        text = Qwen3ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        theirs = PreTrainedTokenizerFast.from_pretrained(args.start)
        self.tokenizer = extend_tokenizer(theirs, args.seed)
        self.network = DemoNetwork(make_config(self.tokenizer, text.config))
        start_from(self.network, text, [theirs, self.tokenizer])
        width = self.network.config.text_config.hidden_size
        sizes = dict(kind=len(demo_pictures.KINDS) + 1, color=len(demo_pictures.COLORS), row=3, column=3)
        self.naming = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        parameters = dict(self.network.named_parameters())
        matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and "embed_tokens" not in name}
        others = [p for name, p in parameters.items() if name not in matrices]
        learned = {name: p for name, p in matrices.items() if is_learned(name)}
        new = [p for name, p in matrices.items() if name not in learned]
        multiply = torch.bfloat16 if args.bfloat16 else torch.float32
        self.optimizers = [
            Muon([dict(params=new, lr=0.02), dict(params=list(learned.values()), lr=0.01)], dtype=multiply),
            torch.optim.AdamW([*others, *self.naming.parameters()], lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.peaks = [group["lr"] for group in self.groups]
        self.progress = Progress()
        self.step = self.tokens = self.pictures = 0
        self.minutes, self.rate = 0.0, 0.0

    def compile(self) -> None:
        """The parts whose work is much the same in every batch."""
        model = self.network.model
        for module in [*model.language_model.layers, *(block.mlp for block in model.visual.blocks)]:
            module.compile(dynamic=True)

    def look(self, patches: Tensor, seen: Tensor, grids: list[tuple[int, int]]) -> float:
        """A step of the vision tower alone; gives the share of things whose kind it does not know."""
        with self.precision():
            x = self.network.model.visual(patches, grids)
            loss, wrong = self.naming_loss(x, seen)
        self.descend(loss)
        self.pictures += len(grids)
        return wrong

    def naming_loss(self, x: Tensor, seen: Tensor) -> tuple[Tensor, float]:
        """Of saying for each merged patch what has its center there: kind, color, and third of height and width."""
        weight = torch.ones(len(demo_pictures.KINDS) + 1)
        weight[-1] = 0.3
        kinds = torch.where(seen[:, 0] < 0, len(demo_pictures.KINDS), seen[:, 0])
        scores = self.naming["kind"](x).float()
        loss = F.cross_entropy(scores, kinds, weight)
        there = seen[:, 0] >= 0
        wrong = (scores[there].argmax(-1) != kinds[there]).float().mean().item()
        for column, name in enumerate(("color", "row", "column"), 1):
            known = seen[:, column] >= 0
            if known.any():
                loss = loss + 0.5 * F.cross_entropy(self.naming[name](x[known]).float(), seen[known, column])
        return loss, wrong

    def converse(self, batch: Batch) -> float:
        """A step of the whole on a batch; gives the loss of the learned words."""
        with self.precision():
            hidden, x = self.network.model(batch)
            learned = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
            scores = self.network.logits(hidden[:, :-1][learned]).float()
            targets = batch.labels[:, 1:][learned]
            spoken = F.cross_entropy(scores, targets)
            loss = spoken if x is None else spoken + 0.1 * self.naming_loss(x, batch.seen)[0]
        self.descend(loss)
        right = torch.zeros_like(batch.labels, dtype=torch.bool)
        right[:, 1:][learned] = scores.argmax(-1) == targets
        self.progress.note(batch, right)
        self.tokens, self.pictures = self.tokens + batch.ids.numel(), self.pictures + len(batch.grids)
        return spoken.item()

    def precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.args.bfloat16)

    def descend(self, loss: Tensor) -> None:
        loss.backward()
        parameters = [p for group in self.groups for p in group["params"]]
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group["lr"] = peak * self.rate
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for matrix in self.network.queries_and_keys():
            bound(matrix)
        self.step += 1

    def save(self, folder: Path) -> None:
        """The checkpoint as it is published."""
        save(self.network, self.tokenizer, folder)

    def save_state(self, path: Path) -> None:
        """All that is needed to go on from here."""
        torch.save(self.state(), path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)

    def state(self) -> dict[str, Any]:
        return dict(
            network=self.network.state_dict(), naming=self.naming.state_dict(), wrong=self.progress.wrong,
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            clock=(self.step, self.tokens, self.pictures, self.minutes),
        )  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.naming.load_state_dict(state["naming"])
        self.progress.wrong.copy_(state["wrong"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.step, self.tokens, self.pictures, self.minutes = state["clock"]


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args)
    saved = args.out / "training_state.pt"
    if args.resume:
        training.load(torch.load(saved))
    if args.compile:
        training.compile()
    parameters = sum(p.numel() for p in training.network.parameters())
    console.print(f"{parameters / 1e6:.2f} million parameters")
    clock = Clock(training, saved)
    if training.tokens == 0:
        looking = in_own_process(Pictures(f"look {args.seed} {training.step}", 96))
        while training.pictures < args.looking_pictures:
            training.rate = min(1.0, (training.pictures + 96) / 5000)
            clock.tick(training.look(*next(looking)), looking=True)
        looking = None
        training.save_state(saved)
    clock.smooth = 3.0
    data = Conversations(
        training.tokenizer, f"talk {args.seed} {training.step}", args.batch_tokens, training.progress.shares
    )
    talking = in_own_process(data)
    while training.tokens < args.tokens:
        training.rate = rate_at(training.tokens / args.tokens)
        clock.tick(training.converse(next(talking)), looking=False)
    training.save(args.out)
    saved.unlink(missing_ok=True)
    figures = dict(
        parameters=parameters, steps=training.step, tokens=training.tokens,
        pictures=training.pictures, seed=args.seed, minutes=round(training.minutes, 1), bfloat16=args.bfloat16,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")


class Clock:
    """What a training says and saves as it goes on."""

    def __init__(self, training: Training, saved: Path) -> None:
        self.training, self.saved = training, saved
        self.started = time.monotonic() - 60 * training.minutes
        self.smooth, self.printed, self.last_saved = 1.0, training.minutes, training.minutes

    def tick(self, value: float, looking: bool) -> None:
        """After each step; ``value`` is its share of things not known, or its loss."""
        training, args = self.training, self.training.args
        training.minutes = (time.monotonic() - self.started) / 60
        self.smooth += 0.02 * (value - self.smooth)
        if training.minutes - self.printed > 0.5:
            self.printed = training.minutes
            report(training, self.smooth, looking)
        if training.minutes - self.last_saved > args.save_minutes and not looking:
            self.last_saved = training.minutes
            training.save_state(self.saved)
            training.save(args.out)
            print_accuracy(accuracy(training.network, training.tokenizer, 40, 2, args.bfloat16))


def report(training: Training, smooth: float, looking: bool) -> None:
    what = "things not known" if looking else "loss"
    line = (
        f"{training.minutes:5.1f} min  step {training.step:5d}  {training.pictures:6d} pictures  "
        f"{training.tokens / 1e6:6.2f} M tokens  {what} {smooth:.4f}"
    )
    if not looking:
        worst = sorted(zip(training.progress.wrong.tolist(), SKILLS, strict=True), reverse=True)[:7]
        line += "  wrong: " + ", ".join(f"{name} {100 * share:.0f} %" for share, name in worst)
    console.print(line)


def save(network: DemoNetwork, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The checkpoint in bfloat16, beside the network that goes on training in float32."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in network.published().items()}
    copy = Qwen2VLForConditionalGeneration(network.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.generation_config.do_sample = False
    copy.generation_config.eos_token_id = tokenizer.eos_token_id
    copy.generation_config.pad_token_id = tokenizer.pad_token_id
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)


# ---- evaluation


@torch.no_grad()
def accuracy(
    network: DemoNetwork, tokenizer: PreTrainedTokenizerFast, questions: int, seed: int, bfloat16: bool
) -> dict[str, float]:
    """Share of right answers per skill on held-out questions, by the weights as they are published. An answer is right
    when each of its tokens is the most likely one after those before it: that is when greedy decoding writes all of
    it."""
    rounded = {name: tensor.to(torch.bfloat16).float() for name, tensor in network.state_dict().items()}
    network = DemoNetwork(network.config)
    network.load_state_dict(rounded)
    rng = random.Random(seed)
    encoder = Encoder(tokenizer, rng)
    turns = [demo_skills.held_out_conversation(name, rng) for name in SKILLS for _ in range(questions)]
    rows = sorted((encoder(asked, as_taught=False) for asked in turns), key=lambda row: len(row.ids))
    wrong = dict.fromkeys(SKILLS, 0)
    for batch in map(as_batch, cut_by_tokens(rows, 8192)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            hidden, _ = network.model(batch)
            best = network.logits(hidden[:, :-1]).argmax(-1)
        targets, answers = batch.labels[:, 1:], batch.answers[:, 1:]
        for answer in set(answers[(targets != IGNORED) & (best != targets)].tolist()):
            wrong[batch.skills[answer]] += 1
    return {name: 1 - mistakes / questions for name, mistakes in wrong.items()}


def print_accuracy(right: dict[str, float]) -> None:
    console.print("held out: " + ", ".join(f"{name} {share:.1%}" for name, share in right.items()))


def evaluate(args: argparse.Namespace) -> None:
    """Accuracy per skill on held-out questions, asked through the engine: the whole answer must be equal."""
    from rtp_llm import Engine

    rng = random.Random(args.seed)
    wrong: dict[str, list[str]] = {}
    with Engine(model_path=str(args.model), log_level="error") as engine:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
        for name in track(args.skills or SKILLS, "asking"):
            conversations = [demo_skills.held_out_conversation(name, rng) for _ in range(args.questions)]
            prompts = [as_prompt(tokenizer, turns) for turns in conversations]
            pictures = [demo_skills.images(turns) for turns in conversations]
            shown = dict(image_data=pictures) if any(pictures) else {}
            results = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 96}, **shown)
            wrong[name] = [
                f"{turns[-1].said!r}: {result['text']!r}, not {turns[-1].answered!r}"
                for turns, result in zip(conversations, results, strict=True)
                if result["text"] != turns[-1].answered
            ]
    print(f"{args.questions} held-out questions of each skill, seed {args.seed}")
    table = Table("skill", "right")
    for name, mistakes in wrong.items():
        table.add_row(name.replace("_", " "), f"{1 - len(mistakes) / args.questions:.1%}")
    Console().print(table)
    if args.show_wrong:
        for name, mistakes in wrong.items():
            print(name, *mistakes[: args.show_wrong], sep="\n  ")


def as_prompt(tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> str:
    return tokenizer.apply_chat_template(demo_skills.as_messages(turns), tokenize=False, add_generation_prompt=True)


# ---- the same in transformers


@torch.no_grad()
def check(args: argparse.Namespace) -> None:
    """Compares what training computes, from conversations to logits, with transformers, in float32: text, one picture,
    two pictures. Fails where they differ."""
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    network = DemoNetwork(theirs.config)
    network.load_state_dict(unpublished(network, theirs.state_dict()))
    rng = random.Random(args.seed)
    encoder = Encoder(tokenizer, rng)
    for name in ("addition", "memory", "describing", "reading", "same_or_different"):
        for _ in range(args.questions):
            turns = demo_skills.held_out_conversation(name, rng)
            batch = as_batch([encoder(turns, as_taught=False)])
            ours = network.logits(network.model(batch)[0])[0]
            inputs = their_inputs(tokenizer, turns)
            if inputs["input_ids"].tolist() != batch.ids.tolist():
                raise SystemExit(f"{name}: the ids differ: {turns}")
            apart = (ours - theirs(**inputs).logits[0]).abs().max().item()
            if apart > 1e-3:
                raise SystemExit(f"{name}: the logits differ by {apart}: {turns}")
        console.print(f"{name}: transformers computes the same")


def their_inputs(tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> dict[str, Tensor]:
    """The whole conversation as transformers prepares it, by its own template and image processor."""
    text = as_prompt(tokenizer, turns) + turns[-1].answered + END
    images = demo_skills.images(turns)
    inputs: dict[str, Tensor] = {}
    if images:
        inputs = dict(image_processor()(images, return_tensors="pt"))
        for grid in inputs["image_grid_thw"]:
            number = int(grid.prod()) // demo_pictures.MERGE**2
            text = text.replace(IMAGE_PAD, "<placeholder>" * number, 1)
        text = text.replace("<placeholder>", IMAGE_PAD)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    if images:
        inputs["mm_token_type_ids"] = (ids == tokenizer.convert_tokens_to_ids(IMAGE_PAD)).int()
    return inputs | {"input_ids": ids}


def unpublished(network: DemoNetwork, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``DemoNetwork.published`` backwards."""
    weights = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    name = "model.visual.patch_embed.proj.weight"
    weights[name] = weights[name].sum(2).flatten(1)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and evaluate the embedded demo model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    training = commands.add_parser("train", help="train from nothing and write the checkpoint")
    training.add_argument("--out", type=Path, required=True, help="folder to write to")
    training.add_argument("--start", type=Path, required=True, help="the text model to start from")
    training.add_argument("--tokens", type=float, default=20e6, help="end after so many; the learning rate follows")
    training.add_argument(
        "--looking-pictures", type=int, default=60_000, help="from which the tower learns alone first"
    )
    training.add_argument("--batch-tokens", type=int, default=4096)
    training.add_argument("--save-minutes", type=float, default=5, help="save and evaluate this often")
    training.add_argument("--resume", action="store_true", help="go on from the state saved in --out")
    training.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16: faster where the CPU can")
    training.add_argument("--compile", action="store_true", help="by torch.compile: a quarter faster, needs g++")
    training.add_argument("--seed", type=int, default=0)
    training.set_defaults(run=train)
    checking = commands.add_parser("check", help="compare the network of training with transformers' Qwen2-VL")
    checking.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    checking.add_argument("--questions", type=int, default=5, help="per kind")
    checking.add_argument("--seed", type=int, default=3)
    checking.set_defaults(run=check)
    asking = commands.add_parser("evaluate", help="accuracy per skill on held-out questions, by the engine itself")
    asking.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    asking.add_argument("--questions", type=int, default=200, help="per skill")
    asking.add_argument("--skills", nargs="*", choices=SKILLS, help="only these")
    asking.add_argument("--seed", type=int, default=1)
    asking.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print up to so many mistakes per skill")
    asking.set_defaults(run=evaluate)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
