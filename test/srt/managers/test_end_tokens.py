"""What ends a text: the configuration, the tokenizer and the chat template all count."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rtp_llm.srt.conversation import ChatTemplate, ConversationTemplate, load_chat_template
from rtp_llm.srt.managers.end_tokens import EndToken, end_of_turn, find_end_tokens
from rtp_llm.srt.managers.engine_client import LiveRequest
from rtp_llm.srt.managers.tokenizer_manager import Prompt, TokenizerManager
from rtp_llm.srt.scheduler.request import Request

SPECIAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|channel|>",
    "<|message|>", "<|return|>", "<|call|>", "<|user|>", "<|assistant|>", "<|stop|>",
)  # fmt: skip
LOOP = "{% for m in messages %}"
CHATML = LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
INST = (
    LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}END{% endif %}{% endfor %}"
)
HARMONY = (
    LOOP + "{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
    "{{ '<|message|>' + m.content }}{{ END }}{% endfor %}"
)
THOUGHTS = (
    LOOP + "{% if m.reasoning_content %}{{ '<|start|>think' + m.reasoning_content + '<|end|>' }}{% endif %}"
    "{{ '<|start|>' + m.role + m.content + '<|end|>' }}{% endfor %}"
)


@pytest.mark.parametrize(
    "source, expected",
    [
        (CHATML, "<|im_end|>"),
        ("<|im_start|>system\nHello<|im_end|>\n" + CHATML, "<|im_end|>"),
        (INST.replace("END", "</s>"), "</s>"),
        (INST.replace("END", " </s>"), "</s>"),
        (INST.replace("END", ""), None),
        (INST.replace("END", "[INST]"), None),  # begins the next turn, and so it does if nothing follows
        (LOOP + "{{ '<|' + m.role + '|>' + m.content }}{% endfor %}<|user|>", None),
        (INST.replace("END", "<|end|><|stop|>"), None),  # which of the two?
        (INST.replace("END", ".</s>"), None),
        (HARMONY.replace("{{ END }}", "<|end|>"), None),
        (HARMONY.replace("{{ END }}", "<|call|>"), None),
        (HARMONY.replace("{{ END }}", "{{ '<|return|>' if loop.last else '<|end|>' }}"), "<|return|>"),
        (THOUGHTS, None),
        (LOOP + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", None),
        (LOOP + "{{ m.content.upper() + '<|end|>' }}{% endfor %}", None),  # the words do not come back
    ],
)
def test_the_end_of_a_turn(source: str, expected: str | None) -> None:
    assert end_of_turn(ChatTemplate(source), SPECIAL) == expected


@pytest.mark.parametrize(
    "name, expected",
    [("chatml", "<|im_end|>"), ("qwen2-vl", "<|im_end|>"), ("vicuna_v1.1", "</s>"), ("mistral", "</s>")],
)
def test_the_end_of_a_turn_in_a_conversation(name: str, expected: str) -> None:
    assert end_of_turn(ConversationTemplate(name), SPECIAL) == expected


REAL = {
    "Qwen-Qwen3-0.6B": "<|im_end|>",
    "Kimi-K2-Instruct": "<|im_end|>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "openai-gpt-oss-120b": "<|return|>",
    "mistralai-Mistral-Nemo-Instruct-2407": "</s>",
    "ibm-granite-granite-4.0": "<|end_of_text|>",
    "GLM-4.6": None,  # <|user|> follows, which begins the next turn
    "upstage-Solar-Open-100B": None,  # <|end|> ends the thoughts, too
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": None,
}


@pytest.mark.parametrize("name", REAL)
def test_the_end_of_a_turn_in_real_templates(data_dir: Path, name: str) -> None:
    source = (data_dir / "chat-templates" / f"{name}.jinja").read_text(encoding="utf-8")
    special = [
        *SPECIAL, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<end_of_turn>", "<start_of_turn>",
        "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|system|>", "<|observation|>", "<|begin|>",
        "<|content|>", "<|think|>", "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|im_user|>",
    ]  # fmt: skip
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    assert end_of_turn(template, special) == REAL[name]


def make_tokenizer(template: str | None = CHATML, **named: str) -> Any:
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = template
    return fast


def test_all_sources_count() -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    eos, start, end = tokenizer.convert_tokens_to_ids(["</s>", "<|im_start|>", "<|im_end|>"])
    assert start not in (eos, end)
    found = find_end_tokens([0, eos], 100, tokenizer, load_chat_template(tokenizer))
    assert found == (
        EndToken(0, "hello", ("config",)),
        EndToken(eos, "</s>", ("config", "tokenizer")),
        EndToken(end, "<|im_end|>", ("chat template",)),
    )
    assert str(found[1]) == f"</s> ({eos}: config, tokenizer)"
    assert found[2].to_dict() == {"id": end, "text": "<|im_end|>", "sources": ["chat template"]}


def test_what_is_not_there_counts_for_nothing() -> None:
    tokenizer = make_tokenizer(None)
    assert find_end_tokens([], 100, tokenizer, None) == ()
    assert find_end_tokens([1, 1, 100, -1], 100, None, None) == (EndToken(1, None, ("config",)),)
    refuses = ChatTemplate("{{ raise_exception('no') }}")
    assert find_end_tokens([1], 100, tokenizer, refuses) == (EndToken(1, "<unk>", ("config",)),)


def test_ids_outside_the_vocabulary_are_left_out() -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    eos, end = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    small = find_end_tokens([], max(eos, end), tokenizer, load_chat_template(tokenizer))
    assert [token.token_id for token in small] == [min(eos, end)]


def test_a_fine_tuned_model_with_the_configuration_of_its_base(data_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers/qwen3-tokenizer")
    tokenizer.eos_token = "<|im_end|>"
    base = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    template = ChatTemplate(CHATML)
    ends = find_end_tokens([base], len(tokenizer), tokenizer, template)
    assert [(token.text, token.sources) for token in ends] == [
        ("<|endoftext|>", ("config",)),
        ("<|im_end|>", ("tokenizer", "chat template")),
    ]


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_they_go_to_the_core_with_each_request_and_again_after_its_death(ignore_eos: bool) -> None:
    manager = TokenizerManager(
        None, 100, 50, 50, end_tokens=[EndToken(3, None, ("config",)), EndToken(7, None, ("tokenizer",))]
    )
    params = {"ignore_eos": ignore_eos, "stop_token_ids": [9], "max_new_tokens": 4}
    (request,) = manager.requests(Prompt(input_ids=[5], sampling_params=params))
    for message in (request, LiveRequest(request, lambda output: None).resubmission()):
        assert Request.from_message(message, 0).stop_ids == ([9] if ignore_eos else [3, 7, 9])
