"""A core that says what a test wants, for what the server makes of it; a checkpoint for it, and one that speaks at
random."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rtp_llm.srt.checkpoint import read_model_config, read_tokenizer
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.managers.engine_client import ABORTED, EngineClient
from rtp_llm.srt.messages import (
    AbortRequest,
    CoreInfo,
    CoreStats,
    FinishReason,
    GenerateRequest,
    Shutdown,
    TokenOutput,
)
from rtp_llm.srt.request_spec import GrammarSpec
from rtp_llm.srt.utils.ipc import QueueLink
from tiny_server import InProcess, serving

END = "<|end|>"
# Thinks and calls as Qwen 3 does.
TEMPLATE = """
{%- if tools %}{{ '<|system|>' + tools|tojson + '<|end|>' }}{% endif %}
{%- for m in messages %}{{ '<|' + m.role + '|>' }}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content or '' }}
{%- for call in m.tool_calls or () %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments|tojson }}
{{- '}</tool_call>' }}
{%- endfor %}{{ '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% if enable_thinking %}{{ '<think>' }}{% endif %}{% endif %}"""
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
NO_TEXT = FinishReason("abort", message="ScriptedCore.texts has no text left for this request", status_code=500)
INFO = CoreInfo(8192, 4096, 8, 2048, 0, 0, "cpu")


def make_spoken_checkpoint(folder: Path, special: list[str]) -> str:
    """A configuration, and a byte-level tokenizer with these special tokens beside END."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[END, *special])
    tokenizer.train_from_iterator(["the weather in Paris", '{"name": "get_weather", "arguments": {}}'] * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=special
    )
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=len(fast),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
    )
    config.save_pretrained(folder)
    return str(folder)


def make_random_speaker(folder: Path) -> tuple[str, str]:
    """A checkpoint with random weights whose tokenizer has SPECIAL, and a file with TEMPLATE. Returns their paths."""
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    path = make_spoken_checkpoint(folder, SPECIAL)
    torch.manual_seed(5)
    config: Any = transformers.LlamaConfig.from_pretrained(path)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path, str(template)


class ScriptedCore:
    """Answers each request with the next text of ``texts``, in messages of one to three ids. A reason in place of a
    text ends the request at once; without a text left it fails, and ``stop`` says so.

    ``prompts`` are the texts that it was asked to continue, ``grammars`` those of their answers. A request for fewer
    tokens than its text has gets these. While ``holds``, an answer's last message waits for its request to be aborted.
    """

    is_ready = True
    info = INFO

    def __init__(self, tokenizer: Any) -> None:
        self.texts: list[str | FinishReason] = []
        self.prompts: list[str] = []
        self.grammars: list[GrammarSpec | None] = []
        self.holds = False
        self.num_unanswered = 0
        self.tokenizer = tokenizer
        self._link = QueueLink()
        self.client = EngineClient(self._link.client)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def stats(self) -> CoreStats:
        return self.client.stats

    def stop(self) -> None:
        self._link.client.send(Shutdown())
        self._thread.join()
        assert not self.num_unanswered, f"{self.num_unanswered} requests found no text left in ScriptedCore.texts"

    def _run(self) -> None:
        while True:
            for message in self._link.core.drain(block=True):
                if isinstance(message, Shutdown):
                    return
                if isinstance(message, GenerateRequest):
                    self._answer(message)
                if isinstance(message, AbortRequest) and message.rid is not None:
                    self._link.core.send([TokenOutput(message.rid, [], finish_reason=ABORTED)])

    def _answer(self, request: GenerateRequest) -> None:
        self.prompts.append(self.tokenizer.decode(request.prompt_ids))
        self.grammars.append(request.spec.grammar)
        text = self.texts.pop(0) if self.texts else NO_TEXT
        self.num_unanswered += text is NO_TEXT
        if isinstance(text, FinishReason):
            self._link.core.send([TokenOutput(request.rid, [], finish_reason=text)])
            return
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        most = request.spec.max_new_tokens
        end = self.tokenizer.eos_token_id
        reason = FinishReason("stop", matched=end) if len(ids) < most else FinishReason("length", length=most)
        ids = [*ids, end] if len(ids) < most else ids[:most]
        while ids:
            now, ids = ids[: 1 + len(ids) % 3], ids[1 + len(ids) % 3 :]
            if self.holds and not ids:
                return
            output = TokenOutput(request.rid, now, finish_reason=None if ids else reason)
            self._link.core.send([output])


@contextmanager
def scripted_speaker(folder: Path, special: list[str]) -> Iterator[tuple[InProcess, ScriptedCore]]:
    """A ``scripted`` server of a ``make_spoken_checkpoint`` in this folder, with TEMPLATE."""
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    with scripted(make_spoken_checkpoint(folder, special), chat_template=str(template)) as running:
        yield running


@contextmanager
def scripted(model_path: str, **options: Any) -> Iterator[tuple[InProcess, ScriptedCore]]:
    """A server in this process over a ScriptedCore."""
    args = ServerArgs(
        model_path=model_path, served_model_name="tiny", device="cpu", port=0, log_level="error", **options
    )
    core = ScriptedCore(read_tokenizer(args, read_model_config(args)))
    try:
        with serving(args, core) as running:
            yield running, core
    finally:
        core.stop()
