"""How good the embedded model is, and whether transformers computes the same."""

import argparse
import random

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLForConditionalGeneration,
)

from demo_training import pictures as demo_pictures
from demo_training import skills as demo_skills
from demo_training.batches import END, IGNORED, IMAGE_PAD, SKILLS, Encoder, as_batch, cut_by_tokens, image_processor
from demo_training.network import DemoNetwork
from demo_training.skills import Turn

console = Console(highlight=False, soft_wrap=True)


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
