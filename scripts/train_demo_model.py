"""Trains the demo model that ships in rtp_llm/assets/demo, from nothing but the rules of demo_skills.py.

    python scripts/train_demo_model.py train --out demo          # an hour and a half on two CPU cores
    python scripts/train_demo_model.py evaluate --model demo     # accuracy per skill on held-out questions

The folder is a Hugging Face checkpoint of the Qwen3 architecture: configuration, bfloat16 weights, tokenizer, chat
template. Training is AdamW on batches of conversations of like length; only the assistant's words are learned.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import demo_skills

VOCAB_SIZE = 768
CONTEXT_LENGTH = 1024
END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = SPECIAL = (
    "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The demo model knows the roles system, user and assistant, not ' + message.role) }}"
    "{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful and friendly assistant.", "Answer briefly.", "Be concise.",
    "You are a chatbot.", "You are an expert. Answer the user's questions.", "Help the user.",
)  # fmt: skip

IGNORED = -100  # the label of a token that is not learned


# ---- text to ids


def train_tokenizer(seed: int, conversations: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the wordings of the skills; each digit is a token of its own."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for _ in range(conversations) for turn in demo_skills.conversation(rng) for text in turn)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


class Encoder:
    """Conversations to ids, and which of them are learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.system, self.user, self.assistant, self.end = tokenizer.convert_tokens_to_ids(
            [SYSTEM, USER, ASSISTANT, END]
        )

    def __call__(self, turns: list[demo_skills.Turn]) -> tuple[list[int], list[int]]:
        """ids, and labels of the same length."""
        if len(turns) == 1 and self.rng.random() < 0.12:
            return self._without_template(turns[0])
        ids: list[int] = []
        labels: list[int] = []
        system = [self.rng.choice(SYSTEM_PROMPTS)] if self.rng.random() < 0.15 else []
        texts = self._ids([*system, *(text for turn in turns for text in turn)])
        if system:
            ids += [self.system, *texts.pop(0), self.end]
            labels += [IGNORED] * len(ids)
        for asked, answered in zip(texts[::2], texts[1::2], strict=True):
            ids += [self.user, *asked, self.end, self.assistant, *answered, self.end]
            labels += [IGNORED] * (len(asked) + 3) + [*answered, self.end]
        return ids, labels

    def _without_template(self, turn: demo_skills.Turn) -> tuple[list[int], list[int]]:
        """A question and its answer as plain lines, for prompts that come without the chat template."""
        asked, answered = self._ids([turn[0], "\n" + turn[1]])
        return [*asked, *answered, self.end], [IGNORED] * len(asked) + [*answered, self.end]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]


def batches(encoder: Encoder, rng: random.Random, tokens: int, pool: int = 2048) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches of about so many tokens, of conversations of like length: [B, L] ids and labels, padded at the end."""
    while True:
        rows = sorted((encoder(demo_skills.conversation(rng)) for _ in range(pool)), key=lambda row: len(row[0]))
        cut, start = [], 0
        for stop in range(1, len(rows) + 1):
            if stop == len(rows) or len(rows[stop][0]) * (stop + 1 - start) > tokens:
                cut.append(rows[start:stop])
                start = stop
        rng.shuffle(cut)
        for batch in cut:
            width = len(batch[-1][0])
            ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch])
            yield ids, torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in batch])


# ---- the model and its training


def make_model(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
    )
    return Qwen3ForCausalLM(config)


def loss_of(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the learned tokens; rows are padded at the end, which a causal model does not see."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    learned = targets != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), targets[learned])


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al., 2024), for matrices. torch's own computes in bfloat16,
    which costs most of the training time on a CPU without it; this one computes in float32."""

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                direction = orthogonal(matrix.grad.lerp(average, group["momentum"]))
                rows, columns = matrix.shape
                matrix.add_(direction, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """A matrix with the same singular vectors and singular values near one, by Newton-Schulz rounds of fifth order."""
    rows, columns = matrix.shape
    x = matrix if rows <= columns else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if rows <= columns else x.T


def rate_at(progress: float, warmup: float = 0.02, decay: float = 0.4) -> float:
    """The learning rate, of its peak, when ``progress`` of the training is done: up, flat, and down at the end."""
    return max(0.0, min((progress + 1e-3) / warmup, 1.0, (1 - progress) / decay))


def train(args: argparse.Namespace) -> None:
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = train_tokenizer(args.seed)
    model = make_model(args.seed).to(device)
    console.print(f"{model.num_parameters() / 1e6:.2f} million parameters, on {device}", highlight=False)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    rng = random.Random(args.seed + 1)
    data = batches(Encoder(tokenizer, rng), rng, args.batch_tokens)
    started, tokens, step, smooth = time.monotonic(), 0, 0, 6.0
    while (minutes := (time.monotonic() - started) / 60) < args.minutes and step < args.steps:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate_at(max(step / args.steps, minutes / args.minutes))
        ids, labels = (tensor.to(device) for tensor in next(data))
        loss = loss_of(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens, smooth = step + 1, tokens + ids.numel(), 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0:
            console.print(
                f"step {step:6d}  loss {smooth:.4f}  {tokens / 1e6:6.2f} M tokens  {minutes:5.1f} min",
                highlight=False,
            )
        if step % 500 == 0:
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)
    figures = dict(
        parameters=model.num_parameters(), steps=step, tokens=tokens, seed=args.seed, minutes=round(minutes, 1),
        device=device, threads=torch.get_num_threads(),
    )  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The checkpoint in bfloat16, beside the model that goes on training in float32."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.generation_config.do_sample = False
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- evaluation


def evaluate(args: argparse.Namespace) -> None:
    """Accuracy per skill on held-out questions: the whole answer must be equal."""
    from rtp_llm import Engine

    rng = random.Random(args.seed)
    wrong: dict[str, list[str]] = {}
    with Engine(model_path=str(args.model), log_level="error") as engine:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
        for name in track(demo_skills.SKILLS, "asking"):
            conversations = [demo_skills.held_out_conversation(name, rng) for _ in range(args.questions)]
            prompts = [as_prompt(tokenizer, turns) for turns in conversations]
            results = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 96})
            wrong[name] = [
                f"{turns[-1][0]!r}: {result['text']!r}, not {turns[-1][1]!r}"
                for turns, result in zip(conversations, results, strict=True)
                if result["text"] != turns[-1][1]
            ]
    print(f"{args.questions} held-out questions of each skill, seed {args.seed}")
    table = Table("skill", "right")
    for name, mistakes in wrong.items():
        table.add_row(name.replace("_", " "), f"{1 - len(mistakes) / args.questions:.1%}")
    Console().print(table)
    if args.show_wrong:
        for name, mistakes in wrong.items():
            print(name, *mistakes[: args.show_wrong], sep="\n  ")


def as_prompt(tokenizer: PreTrainedTokenizerFast, turns: list[demo_skills.Turn]) -> str:
    """The conversation up to the last question, in the chat template."""
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and evaluate the embedded demo model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    training = commands.add_parser("train", help="train from nothing and write the checkpoint")
    training.add_argument("--out", type=Path, required=True, help="folder to write to")
    training.add_argument("--minutes", type=float, default=100, help="end after so long; the learning rate follows")
    training.add_argument("--steps", type=int, default=6000, help="end after so many steps, if that comes first")
    training.add_argument("--batch-tokens", type=int, default=4096)
    training.add_argument("--seed", type=int, default=0)
    training.set_defaults(run=train)
    asking = commands.add_parser("evaluate", help="accuracy per skill on held-out questions, by the engine itself")
    asking.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    asking.add_argument("--questions", type=int, default=200, help="per skill")
    asking.add_argument("--seed", type=int, default=1)
    asking.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print up to so many mistakes per skill")
    asking.set_defaults(run=evaluate)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
