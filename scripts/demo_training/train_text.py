"""Trains the language model that train_model.py starts from, from nothing but the rules of skills.py.

    python scripts/demo_training/train_text.py --out text          # an hour and a half on two CPU cores

The folder is a Hugging Face checkpoint of the Qwen3 architecture: configuration, bfloat16 weights, tokenizer, chat
template. It is taught everything but seeing. Batches are conversations of like length, of whose tokens only the
assistant's words are learned.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of scripts, for the modules beside this one

from demo_training import skills as demo_skills
from demo_training.optimizer import Muon, rate_at

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

IGNORED = -100  # the label of a token that is not learned
WARMUP = 0.02  # of the training


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
    texts = (text for _ in range(conversations) for turn in text_conversation(rng) for text in turn[:2])
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


def text_conversation(rng: random.Random) -> list[demo_skills.Turn]:
    """One without pictures."""
    return demo_skills.conversation(rng, demo_skills.TEXT_WEIGHTS, mean_extra=1.4, most=6)


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
        system = [self.rng.choice(demo_skills.SYSTEM_PROMPTS)] if self.rng.random() < 0.15 else []
        texts = self._ids([*system, *(text for turn in turns for text in turn[:2])])
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
        rows = sorted((encoder(text_conversation(rng)) for _ in range(pool)), key=lambda row: len(row[0]))
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


def train(args: argparse.Namespace) -> None:
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = train_tokenizer(args.seed)
    model = make_model(args.seed).to(device)
    console.print(f"{model.num_parameters() / 1e6:.2f} million parameters, on {device}", highlight=False)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon([dict(params=matrices, lr=0.02)]),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    rng = random.Random(args.seed + 1)
    data = batches(Encoder(tokenizer, rng), rng, args.batch_tokens)
    started, tokens, step, smooth = time.monotonic(), 0, 0, 6.0
    while (minutes := (time.monotonic() - started) / 60) < args.minutes and step < args.steps:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate_at(max(step / args.steps, minutes / args.minutes), WARMUP)
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the language model that the embedded model starts from.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=85, help="end after so long; the learning rate follows")
    parser.add_argument("--steps", type=int, default=6000, help="end after so many steps, if that comes first")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
