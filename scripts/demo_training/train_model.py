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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of scripts, for the modules beside this one

from demo_training import pictures as demo_pictures
from demo_training import skills as demo_skills
from demo_training.batches import (
    ASSISTANT,
    CONTEXT_LENGTH,
    END,
    IGNORED,
    IMAGE_PAD,
    SKILLS,
    SPECIAL,
    USER,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    VOCAB_SIZE,
    Conversations,
    Pictures,
    Progress,
    extend_tokenizer,
    image_processor,
    in_own_process,
)
from demo_training.evaluation import accuracy, check, console, evaluate, print_accuracy
from demo_training.network import Batch, DemoNetwork
from demo_training.optimizer import Muon, bound, rate_at


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
        """Loss of naming what has its center in each merged patch: kind, color, and third of height and width."""
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
