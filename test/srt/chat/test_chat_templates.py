"""Chat templates: 68 real ones against transformers, and what may be wrong with messages and templates."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from rtp_llm.srt.conversation import ChatTemplate, ChatTemplateError, MediaRules, load_chat_template
from rtp_llm.srt.sampling_params import InvalidRequest

CHATML = (
    "{% for message in messages %}{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
USER = [{"role": "user", "content": "alpha one"}]
SYSTEM = [{"role": "system", "content": "sigma zero"}, *USER]
TURNS = [*USER, {"role": "assistant", "content": "beta two"}, {"role": "user", "content": "gamma three"}]
CONVERSATIONS = {"user": USER, "system": SYSTEM, "turns": TURNS}

# What a template ends with so that the assistant is to speak.
CHATML_END = "<|im_start|>assistant\n"
LLAMA_END = "<|start_header_id|>assistant<|end_header_id|>\n\n"
GRANITE_END = "<|start_of_role|>assistant<|end_of_role|>"
NEEDS_TOOLS = "works only with tools"
NEEDS_FUNCTIONS = "'functions' is undefined"


def refused(why: str, *conversations: str) -> dict[str, str]:
    return dict.fromkeys(conversations or tuple(CONVERSATIONS), why)


# name -> (end of the prompt, {conversation that is refused: why})
TEMPLATES: dict[str, tuple[str, dict[str, str]]] = {
    "Apertus-8B-Instruct": ("<|assistant_start|>", {}),
    "Apriel-1.6-15b-Thinker-fixed": ("\n<|begin_assistant|>\nHere are my reasoning steps:\n", {}),
    "Bielik-11B-v3.0-Instruct": (CHATML_END, {}),
    "ByteDance-Seed-OSS": ("<seed:bos>assistant\n", {}),
    "Cohere2MoE": ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>", {}),
    "CohereForAI-c4ai-command-r-plus-tool_use": ("", refused(NEEDS_TOOLS)),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": (
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>",
        {},
    ),
    "GLM-4.6": ("<|assistant|>", {}),
    "GLM-4.7-Flash": ("<|assistant|><think>", {}),
    "GLM-5.2": ("<|assistant|><think>", {}),
    "GigaChat3-10B-A1.8B": ("assistant<|role_sep|>\n", {}),
    "GigaChat3.1-10B-A1.8B": ("assistant<|role_sep|>\n", {}),
    "HuggingFaceTB-SmolLM3-3B": (CHATML_END, {}),
    "Kimi-K2-Instruct": ("<|im_assistant|>assistant<|im_middle|>", {}),
    "Kimi-K2-Thinking": ("<|im_assistant|>assistant<|im_middle|>", {}),
    "LFM2-8B-A1B": (CHATML_END, {}),
    "LFM2.5-8B-A1B": (CHATML_END, {}),
    "LFM2.5-Instruct": (CHATML_END, {}),
    "MiMo-VL": (CHATML_END, {}),
    "MiniMax-M2": ("]~b]ai\n<think>\n", {}),
    "MiniMax-M3": ("]~b]ai\n", {}),
    "MiroThinker": (CHATML_END, refused("cannot assign attribute on non-namespace object", "turns")),
    "Mistral-Small-3.2-24B-Instruct-2506": ("[/INST]", {}),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("<|im_start|>assistant\n<think>\n", {}),
    "NVIDIA-Nemotron-Nano-v2": ("<SPECIAL_11>Assistant\n<think>\n", {}),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("", refused(NEEDS_TOOLS)),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("", refused(NEEDS_TOOLS)),
    "Qwen-QwQ-32B": ("<|im_start|>assistant\n<think>\n</think>", {}),
    "Qwen-Qwen2.5-7B-Instruct": (CHATML_END, {}),
    "Qwen-Qwen3-0.6B": (CHATML_END, {}),
    "Qwen3-Coder": (CHATML_END, {}),
    "Qwen3.5-4B": ("<|im_start|>assistant\n<think>\n", {}),
    "Reka-Edge": ("assistant:", {}),
    "StepFun3.5-Flash": ("<|im_start|>assistant\n<think>\n", {}),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("<｜Assistant｜><think>\n", {}),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("<｜Assistant｜><think>\n</think>", {}),
    "deepseek-ai-DeepSeek-V3.1": ("<｜Assistant｜><think></think>", {}),
    "deepseek-ai-DeepSeek-V3.2": ("<｜Assistant｜><think></think>", {}),
    "deepseek-ai-DeepSeek-V4-Flash-0731": ("<｜Assistant｜></think>", {}),
    "deepseek-ai-DeepSeek-V4": ("<｜Assistant｜></think>", {}),
    "fireworks-ai-llama-3-firefunction-v2": ("", refused(NEEDS_FUNCTIONS)),
    "google-gemma-2-2b-it": ("<start_of_turn>model\n", refused("System role not supported", "system")),
    "google-gemma-4-31B-it-interleaved": ("<|turn>model\n<|channel>thought\n<channel|>", {}),
    "google-gemma-4-31B-it": ("<|turn>model\n<|channel>thought\n<channel|>", {}),
    "ibm-granite-granite-3.3-2B-Instruct": (GRANITE_END, {}),
    "ibm-granite-granite-4.0": (GRANITE_END, {}),
    "ibm-granite-granite-4.1": (GRANITE_END, {}),
    "llama-cpp-deepseek-r1": ("<｜Assistant｜><think>\n", {}),
    "llama-cpp-rwkv-world": ("Assistant:", {}),
    "meetkai-functionary-medium-v3.1": (LLAMA_END, {}),
    "meetkai-functionary-medium-v3.2": ("<|start_header_id|>assistant<|end_header_id|>\n\n>>>", {}),
    "meta-llama-Llama-3.1-8B-Instruct": (LLAMA_END, {}),
    "meta-llama-Llama-3.2-3B-Instruct": (LLAMA_END, {}),
    "meta-llama-Llama-3.3-70B-Instruct": (LLAMA_END, {}),
    "microsoft-Phi-3.5-mini-instruct": ("<|end|>\n<|assistant|>\n", {}),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("[/INST]", {}),
    "mistralai-Mistral-Nemo-Instruct-2407": ("[/INST]", {}),
    "moonshotai-Kimi-K2": ("<|im_assistant|>assistant<|im_middle|>", {}),
    "openai-gpt-oss-120b": ("<|start|>assistant", {}),
    "openbmb-MiniCPM5-1B": (CHATML_END, {}),
    "poolside-Laguna-S-2.1": ("<assistant></think>", {}),
    "poolside-Laguna-XS-2.1": ("<assistant>\n</think>", {}),
    "poolside-Laguna-XS.2": ("<assistant>\n</think>", {}),
    "stepfun-ai-Step-3.5-Flash": ("<|im_start|>assistant\n<think>\n", {}),
    "tencent-Hy3": ("<｜hy_Assistant:opensource｜><think:opensource></think:opensource>", {}),
    "unsloth-Apriel-1.5": ("<|assistant|>\n", {}),
    "unsloth-mistral-Devstral-Small-2507": ("[/INST]", {}),
    "upstage-Solar-Open-100B": ("<|begin|>assistant", {}),
}


def user_words(text: str, messages: list[dict[str, Any]]) -> list[int]:
    return [text.find(message["content"]) for message in messages]


@pytest.fixture(scope="module")
def templates(data_dir: Path) -> dict[str, str]:
    folder = data_dir / "chat-templates"
    if not folder.is_dir():
        pytest.skip(f"no chat templates: {folder} does not exist")
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> Any:
    folder = data_dir / "tokenizers" / "qwen3-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no tokenizer: {folder} does not exist")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def test_the_table_is_complete(templates: dict[str, str]) -> None:
    assert set(templates) == set(TEMPLATES)
    assert len(templates) == 68


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates(templates: dict[str, str], tokenizer: Any, name: str) -> None:
    """Renders what transformers does, all words in order, ending so that the assistant speaks; or says why not."""
    end, refusals = TEMPLATES[name]
    template = ChatTemplate(templates[name], tokenizer.special_tokens_map)
    for kind, messages in CONVERSATIONS.items():
        if kind in refusals:
            with pytest.raises(ChatTemplateError) as caught:
                template.render(messages)
            assert refusals[kind] in str(caught.value)
            with pytest.raises(Exception):  # noqa: B017  transformers refuses them too, by errors of many kinds
                of_transformers(tokenizer, templates[name], messages)
            continue
        text = template.render(messages)
        assert text == of_transformers(tokenizer, templates[name], messages)
        positions = user_words(text, messages)
        assert -1 not in positions and positions == sorted(positions)
        assert text.endswith(end)


def of_transformers(tokenizer: Any, source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    options = {"add_generation_prompt": True} | options
    return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_parts_mean_the_same_as_strings(templates: dict[str, str], tokenizer: Any, name: str) -> None:
    """Content as a list of one text part is the same message, whether or not the template knows lists."""
    refusals = TEMPLATES[name][1]
    template = ChatTemplate(templates[name], tokenizer.special_tokens_map)
    for kind, messages in CONVERSATIONS.items():
        if kind not in refusals:
            parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
            assert template.render(parts) == template.render(messages)


def test_ids_are_those_of_transformers(templates: dict[str, str], tokenizer: Any) -> None:
    source = templates["Qwen-Qwen3-0.6B"]
    text = ChatTemplate(source, tokenizer.special_tokens_map).render(TURNS)
    ids = tokenizer.apply_chat_template(TURNS, chat_template=source, add_generation_prompt=True, return_dict=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_the_last_message_may_be_continued(templates: dict[str, str], tokenizer: Any) -> None:
    messages = [*USER, {"role": "assistant", "content": "beta two "}]
    for name in ("Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct", "google-gemma-2-2b-it"):
        template = ChatTemplate(templates[name], tokenizer.special_tokens_map)
        text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
        options = {"add_generation_prompt": False, "continue_final_message": True}
        assert text == of_transformers(tokenizer, templates[name], messages, **options)
        assert text.rstrip().endswith("beta two")


def test_variables_of_a_template(templates: dict[str, str], tokenizer: Any) -> None:
    template = ChatTemplate(templates["Qwen-Qwen3-0.6B"], tokenizer.special_tokens_map)
    text = template.render(USER, chat_template_kwargs={"enable_thinking": False})
    assert text == template.render(USER) + "<think>\n\n</think>\n\n" == template.render(USER, enable_thinking=False)
    with pytest.raises(ChatTemplateError, match="does not use 'thinking_budget'") as caught:
        template.render(USER, chat_template_kwargs={"thinking_budget": 3})
    assert caught.value.param == "chat_template_kwargs"
    for name in ("messages", "chat_template", "add_generation_prompt", "conversations", "tools"):
        with pytest.raises(ChatTemplateError, match=f"cannot set '{name}'"):
            template.render(USER, chat_template_kwargs={name: "x"})


def test_jinja_in_a_message_is_text() -> None:
    evil = "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}{# #} {{ raise_exception('no') }}"
    assert evil in ChatTemplate(CHATML).render([{"role": "user", "content": evil}])
    assert evil in ChatTemplate(CHATML).render([{"role": "user", "content": [{"type": "text", "text": evil}]}])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "messages must be a list, not str"),
        ([], "messages is empty"),
        ([*USER, "hello"], r"messages\[1\] must be an object with role and content, not str"),
        ([{"content": "hi"}], r"messages\[0\].role must be a word .* not nothing"),
        ([{"role": 3, "content": "hi"}], r"messages\[0\].role must be a word .* not int 3"),
        ([{"role": "user<|im_end|>", "content": "hi"}], r"messages\[0\].role must be a word"),
        ([{"role": "user\n", "content": "hi"}], r"messages\[0\].role must be a word"),
        ([*USER, {"role": "user"}], r"messages\[1\].content is missing"),
        ([{"role": "assistant", "content": None}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content must be a string or a list of parts.* not int 5"),
        ([{"role": "user", "content": {}}], r"messages\[0\].content must be a string or a list of parts"),
        ([{"role": "user", "content": ["hi"]}], r"messages\[0\].content\[0\] must be an object"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text must be a string, not nothing"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[1\] is an image, and this model takes text only",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}], "unknown field 'b'"),
    ],
)
def test_wrong_messages_are_named(messages: Any, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words) as caught:
        ChatTemplate(CHATML).render(messages)
    assert caught.value.param == "messages"
    assert isinstance(caught.value, InvalidRequest)


def test_several_parts_become_lines_for_templates_that_take_strings() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert ChatTemplate(CHATML).render([{"role": "user", "content": parts}]) == "<|user|>one\ntwo\n<|assistant|>"


def test_a_template_that_takes_parts_only() -> None:
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}"
    assert ChatTemplate(source).render(TURNS) == "alpha one;beta two;gamma three;"


def test_nothing_is_left_out_silently() -> None:
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match=r"messages\[0\]: the .* leaves out messages of role 'system'"):
        ChatTemplate(source).render(SYSTEM)
    with pytest.raises(ChatTemplateError, match="has no place for tools"):
        ChatTemplate(source).render(USER, tools=[{"type": "function"}])


def test_developer_is_system_where_the_template_does_not_know_it() -> None:
    message = {"role": "developer", "content": "x"}
    assert ChatTemplate(CHATML).render([message, *USER]).startswith("<|system|>x")
    knowing = "{# developer #}" + CHATML
    assert ChatTemplate(knowing).render([message, *USER]).startswith("<|developer|>x")


def test_fields_that_are_none_are_not_there_and_others_go_along() -> None:
    source = "{% for m in messages %}{{ m.content }}{{ m.name is defined }}{{ m.refusal }}{% endfor %}"
    message = {"role": "assistant", "content": "hi ", "name": None, "refusal": "c1"}
    assert ChatTemplate(source).render([message]) == "hi Falsec1"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ nothing.at.all }}", "uses something that is not there: 'nothing' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "the sandbox forbids: .*__class__"),
        ("{{ raise_exception.__globals__.json }}", "the sandbox forbids: .*__globals__"),
        ("{{ messages.append(1) }}", "the sandbox forbids"),
        ("{{ (messages|first).update({'a': 1}) }}", "the sandbox forbids"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "the sandbox forbids"),
        ("{{ range(10 ** 9)|list }}", "fails on these messages: OverflowError"),
        ("{{ 1 / 0 }}", "fails on these messages: ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on these messages: RecursionError"),
        ("{% include '/etc/passwd' %}", "fails on these messages: TypeError: no loader"),
    ],
)
def test_what_a_template_does_wrong(source: str, words: str) -> None:
    """Told on a template that shows the messages first, so that it is not refused for leaving them out."""
    with pytest.raises(ChatTemplateError, match=words) as caught:
        ChatTemplate(CHATML + source).render(USER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["{% for m in messages %}", "{{ a b }}", "{{ messages|nofilter }}"])
def test_broken_templates_are_told_when_loaded(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="not valid Jinja: line 2: ") as caught:
        ChatTemplate("ok\n" + source)
    assert caught.value.param == "chat_template"


def test_continuing_needs_something_to_continue() -> None:
    template = ChatTemplate(CHATML)
    with pytest.raises(ChatTemplateError, match="set only one of them"):
        template.render(USER, continue_final_message=True)
    for messages in (USER, [*USER, {"role": "assistant", "content": ""}]):
        with pytest.raises(ChatTemplateError, match=r"needs a last message of role assistant.* messages\[\d\] has"):
            template.render(messages, add_generation_prompt=False, continue_final_message=True)
    changing = ChatTemplate("{% for m in messages %}{{ m.content|upper }}{% endfor %}")
    with pytest.raises(ChatTemplateError, match="changes the last message"):
        messages = [{"role": "assistant", "content": "some"}]
        changing.render(messages, add_generation_prompt=False, continue_final_message=True)


def tokenizer_with(chat_template: Any) -> SimpleNamespace:
    return SimpleNamespace(chat_template=chat_template, special_tokens_map={"bos_token": "<s>"})


def rendered(template: ChatTemplate | None, **options: Any) -> str:
    assert template is not None
    return template.render(USER, **options)


def test_where_templates_come_from(tmp_path: Path) -> None:
    several = tokenizer_with({"default": CHATML, "rag": "rag" + CHATML, "tool_use": "{# tools #}T" + CHATML})
    assert rendered(load_chat_template(tokenizer_with("{{ bos_token }}" + CHATML))).startswith("<s><|user|>")
    assert rendered(load_chat_template(several)).startswith("<|user|>")
    assert rendered(load_chat_template(several), tools=[{"type": "function"}]).startswith("T<|user|>")
    assert rendered(load_chat_template(several, "rag")).startswith("rag<|user|>")
    assert rendered(load_chat_template(tokenizer_with({"only": CHATML}))).startswith("<|user|>")
    (tmp_path / "a.jinja").write_text("file {{ bos_token }}" + CHATML)
    (tmp_path / "a.json").write_text(json.dumps({"chat_template": "json" + CHATML}))
    assert rendered(load_chat_template(several, str(tmp_path / "a.jinja"))).startswith("file <s><|user|>")
    assert rendered(load_chat_template(several, str(tmp_path / "a.json"))).startswith("json<|user|>")


def test_where_there_is_no_template(tmp_path: Path) -> None:
    assert load_chat_template(tokenizer_with(None)) is None
    assert load_chat_template(None) is None
    assert load_chat_template(tokenizer_with({"a": CHATML, "b": CHATML})) is None
    for content, words in [
        ('{"name": "x", "user": "U"}', "sep_style"),
        ("{", "cannot read"),
        ("[]", "no Jinja template"),
    ]:
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ChatTemplateError, match=words):
            load_chat_template(tokenizer_with(None), str(tmp_path / "a.json"))
    with pytest.raises(ChatTemplateError, match=r"'x' is neither a file nor .*\(the tokenizer has a, b\)"):
        load_chat_template(tokenizer_with({"b": CHATML, "a": CHATML}), "x")
    with pytest.raises(ChatTemplateError, match=r"\(the tokenizer has none\)"):
        load_chat_template(tokenizer_with(None), "x")
    with pytest.raises(ChatTemplateError, match="needs a tokenizer"):
        load_chat_template(None, "x")
    (tmp_path / "b.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ChatTemplateError, match="cannot read the chat template"):
        load_chat_template(tokenizer_with(None), str(tmp_path / "b.jinja"))


def test_many_threads_at_once() -> None:
    template = ChatTemplate(CHATML)
    found: list[str] = []

    def work(i: int) -> None:
        for _ in range(50):
            found.append(template.render([{"role": f"role{i}", "content": f"word{i}"}]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(found)) == [f"<|role{i}|>word{i}\n<|assistant|>" for i in range(8)]
    assert len(found) == 400


def test_role_names_do_not_fill_the_memory() -> None:
    template = ChatTemplate(CHATML)
    for i in range(200):
        template.render([{"role": f"r{i}", "content": "x"}])
    assert len(template._roles) <= 64


# Media

MEDIA = MediaRules(frozenset({"image", "video"}))
IMAGE = {"type": "image_url", "image_url": {"url": "https://x/a.png", "detail": "high"}}
VIDEO = {"type": "video_url", "video_url": {"url": "https://x/b.mp4"}}

# name -> what stands for an image and for a video in a user's message (which a processor may find to be no placeholder
# of its own); None: nothing
PLACEHOLDERS: dict[str, tuple[str | None, str | None]] = {
    "Apriel-1.6-15b-Thinker-fixed": ("[IMG]", None),
    "GLM-5.2": ("<|begin_of_image|><|image|><|end_of_image|>", "<reminder>You are unable to process this video"),
    "Kimi-K2-Instruct": ("<|media_start|>image<|media_content|><|media_pad|><|media_end|>", None),
    "LFM2.5-8B-A1B": ("<image>", None),
    "MiniMax-M3": ("]<]image[>[", "]<]video[>["),
    "Mistral-Small-3.2-24B-Instruct-2506": ("[IMG]", None),
    "Qwen3.5-4B": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    "google-gemma-4-31B-it": ("<|image|>", "<|video|>"),
    "unsloth-Apriel-1.5": ("[IMG]", None),
    "Qwen-Qwen3-0.6B": (None, None),
    "google-gemma-2-2b-it": (None, None),
    "meta-llama-Llama-3.1-8B-Instruct": (None, None),
}


def said(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


@pytest.mark.parametrize("name", PLACEHOLDERS)
def test_real_templates_with_media(templates: dict[str, str], tokenizer: Any, name: str) -> None:
    """Each of the media shows in its place, or is refused by name; the sources come in the order of the text."""
    template = ChatTemplate(templates[name], tokenizer.special_tokens_map)
    for kind, part, placeholder in zip(("image", "video"), (IMAGE, VIDEO), PLACEHOLDERS[name], strict=True):
        assert template.takes(kind) == (placeholder is not None)
        messages = said("alpha", part, "beta", part)
        if placeholder is None:
            with pytest.raises(ChatTemplateError, match=rf"messages\[0\].content\[1\] is an? {kind}|refuses"):
                template.prompt(messages, media=MEDIA)
            continue
        prompt = template.prompt(messages, media=MEDIA)
        assert prompt.text.count(placeholder) == 2
        assert prompt.text.index("alpha") < prompt.text.index(placeholder) < prompt.text.index("beta")
        url = part[part["type"]]["url"]
        assert (prompt.image_data, prompt.video_data) == (([url] * 2, []) if kind == "image" else ([], [url] * 2))
        forms = [{"type": kind} if p is part else p for p in messages[0]["content"]]
        assert prompt.text == of_transformers(
            tokenizer, templates[name], [{"role": "user", "content": forms}], add_generation_prompt=True
        )


def test_what_a_template_says_of_images_is_passed_on(templates: dict[str, str]) -> None:
    template = ChatTemplate(templates["Qwen3.5-4B"])
    messages = [{"role": "system", "content": [IMAGE]}, *USER]
    with pytest.raises(ChatTemplateError, match=r"System message cannot contain images\."):
        template.prompt(messages, media=MEDIA)
    numbered = template.prompt(said(IMAGE, IMAGE), chat_template_kwargs={"add_vision_id": True}, media=MEDIA)
    assert "Picture 1: <|vision" in numbered.text and "Picture 2: <|vision" in numbered.text


SEES_LAST = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% elif loop.last and m == messages|last %}<picture>{% endif %}"
    "{% endfor %}{% endif %};{% endfor %}"
)
SEES_FIRST = (
    "{% for m in messages %}{% for p in m.content|selectattr('type', 'equalto', 'image_url') %}<picture>\n{% endfor %}"
    "{% for p in m.content|selectattr('type', 'equalto', 'text') %}{{ p.text ~ ' ' }}{% endfor %}{% endfor %}"
)
SEES_SOME = (
    "{% for m in messages %}{% for p in m.content %}{{ p.text if p.type == 'text' else "
    "('<picture>' if m == messages|last) }}{% endfor %};{% endfor %}"
)


def test_media_that_a_template_leaves_out_are_no_secret() -> None:
    blind = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    printing = "{% for m in messages %}{% for p in m.content %}{{ p.text or p }}{% endfor %}{% endfor %}"
    for source in (blind, printing, CHATML, SEES_LAST):
        template = ChatTemplate(source)
        assert not template.takes("image")
        with pytest.raises(ChatTemplateError, match=r"messages\[0\].content\[1\] is an image, and .* no place for"):
            template.prompt(said("x", IMAGE), media=MEDIA)
    some = ChatTemplate(SEES_SOME)
    assert some.prompt(said(IMAGE, "x", IMAGE), media=MEDIA).text == "<picture>x<picture>;"
    with pytest.raises(ChatTemplateError, match="does not show all of the 2 media"):
        some.prompt([*said("x", IMAGE), *said("y", IMAGE)], media=MEDIA)
    with pytest.raises(ChatTemplateError, match="does not show all of the 1 media"):
        some.prompt([*said("<picture>", IMAGE), *said("y")], media=MEDIA)  # what a user types is no image


def test_templates_that_know_openai_s_parts_only() -> None:
    prompt = ChatTemplate(SEES_FIRST).prompt([*said("x", IMAGE), *said(IMAGE, "y", IMAGE, "z")], media=MEDIA)
    assert prompt.text == "<picture>\nx <picture>\n<picture>\ny z "
    assert len(prompt.image_data) == 3


@pytest.mark.parametrize(
    ("part", "source"),
    [
        (IMAGE, "https://x/a.png"),
        ({"type": "image_url", "image_url": "data:image/png;base64,AA=="}, "data:image/png;base64,AA=="),
        ({"type": "image_url", "image_url": {"url": "u", "detail": None}}, "u"),
        ({"type": "image", "url": "u"}, "u"),
        ({"type": "image", "path": "/p"}, "/p"),
        ({"type": "image", "base64": "AAAA"}, "AAAA"),
        ({"type": "image", "image": b"bytes"}, b"bytes"),
    ],
)
def test_forms_of_images(part: dict[str, Any], source: Any) -> None:
    assert ChatTemplate(SEES_SOME).prompt(said("x", part), media=MEDIA).image_data == [source]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url"}, "image_url must be a URL or data: URI, not nothing"),
        ({"type": "image_url", "image_url": {}}, "image_url.url must be a URL or data: URI, not nothing"),
        ({"type": "image_url", "image_url": {"url": ""}}, "image_url.url must be a URL or data: URI, not str ''"),
        ({"type": "image_url", "image_url": {"url": ["u"]}}, "image_url.url must be a URL or data: URI, not list"),
        ({"type": "image_url", "image_url": {"url": "u", "detail": "huge"}}, "detail must be one of auto, low, high"),
        ({"type": "image_url", "image_url": {"url": "u", "size": 3}}, "image_url has the unknown field 'size'"),
        ({"type": "image_url", "image_url": "u", "url": "u"}, "has the unknown field 'url'"),
        ({"type": "video_url", "video_url": {"url": "u", "detail": "low"}}, "has the unknown field 'detail'"),
        ({"type": "image"}, "must have one of image, url, path, base64, and has none"),
        ({"type": "image", "url": "u", "path": "p"}, "and has url and path"),
        ({"type": "image", "image": 5}, "image must be a URL or data: URI, not int 5"),
        ({"type": "input_audio", "input_audio": {"data": "x"}}, "is audio, and this model takes text, images and vid"),
        ({"type": "hologram"}, "has type 'hologram', which is not supported; known: text, image_url"),
    ],
)
def test_wrong_media_are_named(part: dict[str, Any], words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words) as caught:
        ChatTemplate(SEES_SOME).prompt([*USER, *said("x", part)], media=MEDIA)
    assert str(caught.value).startswith("messages[1].content[1]")
    assert caught.value.param == "messages"


def test_limits_of_media() -> None:
    template = ChatTemplate(SEES_SOME)
    rules = MediaRules(frozenset({"image", "video"}), {"image": 2, "video": 0})
    assert len(template.prompt(said(IMAGE, IMAGE), media=rules).image_data) == 2
    with pytest.raises(ChatTemplateError, match=r"\[0\].content\[2\]: the messages hold 3 images, .* at most 2"):
        template.prompt(said(IMAGE, IMAGE, IMAGE), media=rules)
    with pytest.raises(ChatTemplateError, match="hold 1 videos, and this server takes at most 0"):
        template.prompt(said(VIDEO), media=rules)
