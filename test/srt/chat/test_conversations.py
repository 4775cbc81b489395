"""Conversations in plain data: styles, the registry, requests, files, and the published formats."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from rtp_llm.srt import conversation as module
from rtp_llm.srt.chat.formats import _LAYOUTS as LAYOUTS
from rtp_llm.srt.chat.formats import BUILT_IN, FORMAT_OF_NAME
from rtp_llm.srt.checkpoint import read_chat_template, read_model_config
from rtp_llm.srt.configs import model_config
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.conversation import (
    ChatTemplate,
    ChatTemplateError,
    Conversation,
    ConversationTemplate,
    ImageData,
    MediaRules,
    SeparatorStyle,
    chat_template_exists,
    chat_templates,
    generate_chat_conv,
    get_conv_template_by_model_path,
    load_chat_template,
    register_conv_template,
    register_conv_template_matching_function,
)
from rtp_llm.srt.entrypoints.openai.protocol import ChatCompletionRequest
from rtp_llm.srt.models.registry import ModelFile, ModelRegistry
from rtp_llm.srt.sampling_params import InvalidRequest

MEDIA = MediaRules(frozenset({"image", "video"}))
TURNS = [
    {"role": "user", "content": "alpha one"},
    {"role": "assistant", "content": "beta two"},
    {"role": "user", "content": "gamma three"},
]
SYSTEM = {"role": "system", "content": "sigma zero"}


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(module, "chat_templates", chat_templates.copy())
    monkeypatch.setattr(module, "_matching_functions", [])


def image(url: str = "u", **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


# Styles


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("ADD_COLON_SINGLE", "S|U: a|A: b|U: c|A:"),
        ("ADD_COLON_TWO", "S|U: a|A: b;U: c|A:"),
        ("ADD_COLON_SPACE_SINGLE", "S|U: a|A: b|U: c|A: "),
        ("NO_COLON_SINGLE", "SUa|Ab|Uc|A"),
        ("NO_COLON_TWO", "SUa|Ab;Uc|A"),
        ("ADD_NEW_LINE_SINGLE", "S|U\na|A\nb|U\nc|A\n"),
        ("LLAMA2", "Sa|A b;U c|A"),
        (
            "LLAMA3",
            "S<|start_header_id|>U<|end_header_id|>\n\na<|eot_id|><|start_header_id|>A<|end_header_id|>\n\nb<|eot_id|>"
            "<|start_header_id|>U<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>A<|end_header_id|>\n\n",
        ),
        ("CHATML", "S|\nU\na|\nA\nb|\nU\nc|\nA\n"),
        ("GEMMA3", "Sa|Ab|Uc|A"),
        ("MPT", "S|Ua|Ab|Uc|A"),
    ],
)
def test_styles(style: str, expected: str) -> None:
    conversation = Conversation(
        "x", system_message="S", roles=("U", "A"), sep_style=SeparatorStyle[style], sep="|", sep2=";"
    )
    for i, words in enumerate(["a", "b", "c", None]):
        conversation.append_message(conversation.roles[i % 2], words)
    assert conversation.get_prompt() == expected


def test_every_style_is_laid_out_and_tested() -> None:
    assert set(LAYOUTS) == set(SeparatorStyle) and len(SeparatorStyle) == 11
    with pytest.raises(ValueError, match="ADD_COLON_TWO needs sep2"):
        Conversation("x", sep_style=SeparatorStyle.ADD_COLON_TWO)


def test_without_a_system_message_there_is_no_system_prompt() -> None:
    for conversation in BUILT_IN:
        bare = conversation.copy()
        bare.set_system_message("")
        bare.append_message(bare.roles[0], "hi")
        assert bare.get_prompt().removeprefix("<|start_header_id|>").startswith(bare.roles[0])
    constant = Conversation("x", system_template="Be {kind}.", sep_style=SeparatorStyle.MPT, roles=("U:", "A:"))
    constant.append_message("U:", "hi")
    assert constant.get_prompt() == "Be {kind}.\nU:hi\n"


def test_messages_may_hold_braces_and_nothing() -> None:
    conversation = chat_templates["chatml"].copy()
    conversation.set_system_message("{role} {0} {system_message}")
    conversation.append_message(conversation.roles[0], "")
    assert conversation.get_prompt() == (
        "<|im_start|>system\n{role} {0} {system_message}<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
    )


def test_a_conversation_is_told_and_copied() -> None:
    conversation = Conversation("x", system_message="S")
    conversation.append_message("USER", "hi")
    conversation.append_message("ASSISTANT", None)
    copied = conversation.copy()
    copied.update_last_message("ho")
    copied.append_image("u", "low")
    copied.append_video("v")
    copied.append_audio("w")
    assert (copied.image_data, copied.video_data, copied.audio_data) == ([ImageData("u", "low")], ["v"], ["w"])
    assert conversation.messages == [["USER", "hi"], ["ASSISTANT", None]]
    assert not conversation.image_data and not copied.copy().image_data
    assert copied.to_openai_api_messages() == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]
    assert copied.dict() == {
        "template_name": "x",
        "system_message": "S",
        "roles": ("USER", "ASSISTANT"),
        "messages": [["USER", "hi"], ["ASSISTANT", "ho"]],
        "offset": 0,
    }


# The registry


def test_the_registry() -> None:
    mine = Conversation("mine")
    register_conv_template(mine)
    assert chat_template_exists("mine") and not chat_template_exists("yours")
    with pytest.raises(AssertionError, match=r"mine has been registered\."):
        register_conv_template(Conversation("mine"))
    other = Conversation("mine", sep="!")
    register_conv_template(other, override=True)
    assert module.chat_templates["mine"] is other


def test_the_first_function_that_knows_a_model_names_its_conversation() -> None:
    assert get_conv_template_by_model_path("/models/Qwen2-VL-7B-Instruct") == "qwen2-vl"
    assert get_conv_template_by_model_path("/models/nobody-knows") is None
    register_conv_template_matching_function(lambda path: None)
    register_conv_template_matching_function(lambda path: "chatml" if "VL" in path else None)
    register_conv_template_matching_function(lambda path: "llama-2")
    assert get_conv_template_by_model_path("/models/Qwen2-VL-7B-Instruct") == "chatml"
    assert get_conv_template_by_model_path("/models/other") == "llama-2"
    register_conv_template_matching_function(lambda path: 1 / 0)  # is not asked
    assert get_conv_template_by_model_path("/models/other") == "llama-2"


def test_a_function_that_names_nothing_known_is_told() -> None:
    register_conv_template_matching_function(lambda path: "typo")
    with pytest.raises(ChatTemplateError, match="names the conversation 'typo' for m, and there is no such"):
        get_conv_template_by_model_path("m")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2-vl"),
        ("Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl"),
        ("llava-hf/llava-1.5-7b-hf", "vicuna_v1.1"),
        ("liuhaotian/llava-v1.5-13b", "vicuna_v1.1"),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "chatml-llava"),
        ("google/gemma-3-4b-it", "gemma-it"),
        ("OpenGVLab/InternVL3-8B-hf", "internvl-2-5"),
        ("mistral-community/pixtral-12b", "mistral"),
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral"),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", "llama_3_vision"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2"),
        ("Qwen/Qwen3-8B", None),
        ("meta-llama/Llama-3.1-8B", None),
    ],
)
def test_models_whose_format_is_built_in(path: str, name: str | None) -> None:
    assert get_conv_template_by_model_path(path) == name


def test_built_in_names_exist() -> None:
    assert {name for _, name in FORMAT_OF_NAME} <= set(chat_templates)


# From a request


def test_a_request_becomes_a_conversation() -> None:
    request = ChatCompletionRequest.model_validate(
        {
            "messages": [
                {"role": "system", "content": [text("be"), text("kind")]},
                user(image("a", detail="high"), text("what is "), text("it?"), image("b")),
                {"role": "assistant", "content": "a cat"},
                user(text("and?")),
            ]
        }
    )
    conversation = generate_chat_conv(request, "vicuna_v1.1")
    assert conversation.image_data == [ImageData("a", "high"), ImageData("b")]
    assert conversation.modalities == ["image", "image"]
    assert conversation.get_prompt() == (
        "be\nkind USER: <image>\n<image>\nwhat is it? ASSISTANT: a cat</s>USER: and? ASSISTANT:"
    )
    assert not chat_templates["vicuna_v1.1"].messages and not chat_templates["vicuna_v1.1"].image_data


def test_media_stand_where_they_were_said() -> None:
    request = {"messages": [user(text("x"), image("a"), text("y"), {"type": "video_url", "video_url": {"url": "v"}})]}
    conversation = generate_chat_conv(request, "qwen2-vl")
    assert conversation.messages[0][1] == (
        "x<|vision_start|><|image_pad|><|vision_end|>y<|vision_start|><|video_pad|><|vision_end|>"
    )
    assert conversation.video_data == ["v"]
    register_conv_template(Conversation("plain", audio_token="<sound>"))
    plain = generate_chat_conv(
        {"messages": [user(text("x"), image("a"), text("y"), {"type": "audio_url", "audio_url": {"url": "w"}})]},
        "plain",
    )
    assert plain.messages[0][1] == "x<image>\ny<sound>" and plain.audio_data == ["w"]


def test_texts_among_very_many_images_begin_lines() -> None:
    register_conv_template(Conversation("plain"))
    few = generate_chat_conv({"messages": [user(*[image()] * 16, text("t"))]}, "plain")
    many = generate_chat_conv({"messages": [user(*[image()] * 17, text("t"))]}, "plain")
    assert few.messages[0][1] == "<image>\n" * 16 + "t"
    assert many.messages[0][1] == "<image>\n" * 17 + "\nt"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "messages must be a list, not str"),
        ([{"role": "tool", "content": "x"}], "Unknown role: tool"),
        ([*TURNS, SYSTEM], r"messages\[3\]: .* takes one system message, before all others"),
        ([{"role": "system", "content": [image()]}], "takes text only"),
        ([{"role": "assistant", "content": [text("a"), image()]}], "takes text only"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "needs content"),
    ],
)
def test_requests_without_a_place(messages: Any, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words) as caught:
        generate_chat_conv({"messages": messages}, "chatml")
    assert isinstance(caught.value, (ValueError, InvalidRequest))
    with pytest.raises(ChatTemplateError, match=words):
        ConversationTemplate("chatml").prompt(messages, media=MEDIA)


# As a template


def test_a_conversation_used_as_a_template() -> None:
    template = ConversationTemplate("vicuna_v1.1", bos_token="<s>")
    prompt = template.prompt([user(text("what?"), image("a"), {"type": "video", "url": "v"})], media=MEDIA)
    assert prompt.text.endswith("USER: <image>\n<video>\nwhat? ASSISTANT:")
    assert (prompt.image_data, prompt.video_data) == (["a"], ["v"])
    assert prompt.add_special_tokens and not prompt.stop
    assert ConversationTemplate("qwen2-vl").prompt(TURNS).stop == ["<|im_end|>"]
    assert not ConversationTemplate("mistral", bos_token="[INST]").prompt(TURNS).add_special_tokens
    register_conv_template(Conversation("ids", stop_token_ids=[3, 4], stop_str="end"))
    prompt = ConversationTemplate("ids").prompt(TURNS)
    assert (prompt.stop, prompt.stop_token_ids) == (["end"], [3, 4])


def test_options_of_a_conversation() -> None:
    template = ConversationTemplate("qwen3-vl")
    opening = "<|im_start|>assistant\n"
    said = template.prompt(TURNS[:1], add_generation_prompt=False).text
    assert template.render(TURNS[:1]) == said + opening
    going_on = template.prompt(TURNS[:2], add_generation_prompt=False, continue_final_message=True).text
    assert going_on == said + opening + "beta two"
    with pytest.raises(ChatTemplateError, match="needs a last message of role assistant"):
        template.prompt(TURNS, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="no place for tools"):
        template.prompt(TURNS, tools=[{"type": "function"}])
    with pytest.raises(ChatTemplateError, match="does not use 'enable_thinking'"):
        template.prompt(TURNS, chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(ChatTemplateError, match="is an image, and this model takes text only"):
        template.render([user(image())])


# Which template is taken


JINJA = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SEEING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<pic>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}{% endfor %}"
)


def tokenizer(chat_template: Any = JINJA) -> SimpleNamespace:
    return SimpleNamespace(chat_template=chat_template, special_tokens_map={"bos_token": "<s>"})


def test_a_conversation_by_name_wins() -> None:
    template = load_chat_template(tokenizer(), "chatml")
    assert isinstance(template, ConversationTemplate) and template.name == "chatml"
    assert "You are a helpful assistant." in template.render(TURNS)


def test_a_registered_function_wins_over_the_tokenizer_and_the_tokenizer_over_what_is_built_in() -> None:
    path = "Qwen/Qwen2-VL-2B-Instruct"
    own = load_chat_template(tokenizer(SEEING), model_path=path, is_multimodal=True)
    assert isinstance(own, ChatTemplate)
    assert own.prompt([user(image("a"), text("x"))], media=MEDIA).text == "<user><pic>x"
    blind = load_chat_template(tokenizer(JINJA), model_path=path, is_multimodal=True)
    assert isinstance(blind, ConversationTemplate) and blind.name == "qwen2-vl"
    assert isinstance(load_chat_template(tokenizer(JINJA), model_path=path), ChatTemplate)
    missing = load_chat_template(tokenizer(None), model_path=path)
    assert isinstance(missing, ConversationTemplate)
    assert load_chat_template(tokenizer(None), model_path="nobody", is_multimodal=True) is None
    register_conv_template_matching_function(lambda path: "llama-2")
    for is_multimodal in (False, True):
        told = load_chat_template(tokenizer(SEEING), model_path="any", is_multimodal=is_multimodal)
        assert isinstance(told, ConversationTemplate) and told.name == "llama-2"


def test_a_template_that_takes_no_images_says_so_where_there_is_nothing_better() -> None:
    template = load_chat_template(tokenizer(JINJA), model_path="nobody-knows", is_multimodal=True)
    assert isinstance(template, ChatTemplate)
    assert template.render(TURNS[:1]) == "<user>alpha one"
    with pytest.raises(ChatTemplateError, match=r"messages\[0\].content\[0\] is an image, and .* no place for images"):
        template.prompt([user(image(), text("x"))], media=MEDIA)


def test_the_template_of_a_processor(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": SEEING}))
    options: dict[str, Any] = {"model_path": "nobody", "directory": str(tmp_path)}
    assert load_chat_template(tokenizer(None), **options) is None
    template = load_chat_template(tokenizer(None), is_multimodal=True, **options)
    assert template is not None and template.prompt([user(image())], media=MEDIA).text == "<user><pic>"


def test_special_tokens_are_added_as_processors_do() -> None:
    def wants(source: str, is_multimodal: bool) -> bool:
        template = load_chat_template(tokenizer(source), is_multimodal=is_multimodal)
        assert template is not None
        return template.prompt(TURNS).add_special_tokens

    assert wants(SEEING, True)
    assert not wants("{{ bos_token }}" + SEEING, True)
    assert not wants(SEEING, False)


def test_a_conversation_described_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    described = {
        "name": "mine",
        "system": "<sys>",
        "user": "<u>",
        "assistant": "<a>",
        "sep_style": "add_new_line_single",
        "stop_str": ["<u>", "<a>"],
        "sep": "|",
    }
    path.write_text(json.dumps(described))
    template = load_chat_template(tokenizer(), str(path))
    assert template is not None
    prompt = template.prompt([SYSTEM, *TURNS])
    assert prompt.text == "<sys>\nsigma zero|<u>\nalpha one|<a>\nbeta two|<u>\ngamma three|<a>\n"
    assert prompt.stop == ["<u>", "<a>"]
    for change, words in [
        ({"sep_style": "NO_SUCH"}, "unknown sep_style 'NO_SUCH'; have ADD_COLON_SINGLE"),
        ({"sep_style": "NO_COLON_TWO"}, "needs sep2"),
        ({"colour": "red"}, "has the unknown key 'colour'"),
        ({"user": 5}, "must have a string under 'user'"),
        ({"stop_str": 5}, "stop_str must be a string"),
    ]:
        path.write_text(json.dumps({**described, **change}))
        with pytest.raises(ChatTemplateError, match=words):
            load_chat_template(tokenizer(), str(path))


MODEL_FILE = """
from torch import nn
from rtp_llm.srt.configs.model_config import register_multimodal_model
from rtp_llm.srt.conversation import Conversation, register_conv_template, register_conv_template_matching_function

register_multimodal_model("MineForCausalLM")
register_conv_template(Conversation("of-a-model-file", roles=("Q", "A")))
register_conv_template_matching_function(lambda path: "of-a-model-file" if path.endswith("mine") else None)

class MineForCausalLM(nn.Module):
    pass
"""


def test_a_model_file_from_outside_brings_its_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(model_config, "multimodal_model_archs", set())
    (tmp_path / "mine_model_file.py").write_text(MODEL_FILE)
    entry = ModelFile("MineForCausalLM", ("mine_model_file:MineForCausalLM",))
    monkeypatch.setitem(ModelRegistry.models.overrides, "MineForCausalLM", entry)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    (tmp_path / "mine").mkdir()
    config = {"architectures": ["MineForCausalLM"], "model_type": "llama", **sizes}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    args = ServerArgs(model_path=str(tmp_path / "mine"))
    config = read_model_config(args)
    assert config.is_multimodal
    template = read_chat_template(args, config, tokenizer())
    assert template is not None
    assert template.prompt([user(image("a"), text("x"))], media=MEDIA).text == "Q: <image>\nx\nA:"


# The published formats, as real templates have them


def of_template(data_dir: Path, name: str, messages: list[dict[str, Any]]) -> str:
    path = data_dir / "chat-templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"no chat template: {path} does not exist")
    texts, _ = render_jinja_template(
        conversations=[messages],
        chat_template=path.read_text(encoding="utf-8"),
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    return texts[0]


def parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As transformers' templates have them."""
    return [
        {**m, "content": [{"type": "image"} if part["type"] == "image_url" else part for part in m["content"]]}
        if isinstance(m["content"], list)
        else m
        for m in messages
    ]


IMAGE = user(text("what is "), image("a"), text(" this?"))


@pytest.mark.parametrize(
    ("name", "template", "messages"),
    [
        ("chatml", "Qwen-Qwen2.5-7B-Instruct", [SYSTEM, *TURNS]),
        ("qwen2-vl", "Qwen-Qwen2.5-7B-Instruct", [SYSTEM, *TURNS]),
        ("chatml-llava", "Qwen-Qwen2.5-7B-Instruct", [SYSTEM, *TURNS]),
        ("qwen3-vl", "Qwen3.5-4B", [*TURNS[:2], IMAGE]),
        ("gemma-it", "google-gemma-2-2b-it", TURNS),
        ("mistral", "Mistral-Small-3.2-24B-Instruct-2506", [SYSTEM, *TURNS]),
        ("mistral", "Mistral-Small-3.2-24B-Instruct-2506", [SYSTEM, *TURNS[:2], IMAGE]),
    ],
)
def test_published_formats(data_dir: Path, name: str, template: str, messages: list[dict[str, Any]]) -> None:
    theirs = of_template(data_dir, template, parts(messages)).removeprefix("<s>").removesuffix("<think>\n")
    assert ConversationTemplate(name).prompt(messages, media=MEDIA).text == theirs


def test_published_formats_without_a_template_here() -> None:
    """LLaVA 1.5, Gemma 3 with a system message and an image, Llama 2: from their model cards."""

    def prompt(name: str, *messages: dict[str, Any]) -> str:
        return ConversationTemplate(name).prompt(messages, media=MEDIA).text

    silent = {"role": "system", "content": ""}
    assert prompt("vicuna_v1.1", silent, user(image("a"), text("What?"))) == "USER: <image>\nWhat? ASSISTANT:"
    assert prompt("gemma-it", SYSTEM, user(image("a"), text("What? "))) == (
        "<start_of_turn>user\nsigma zero\n\n<start_of_image>What?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert prompt("llama-2", SYSTEM, *TURNS) == (
        "[INST] <<SYS>>\nsigma zero\n<</SYS>>\n\nalpha one [/INST] beta two </s><s>[INST] gamma three [/INST]"
    )
    assert prompt("llama-2", *TURNS[:1]) == "[INST] alpha one [/INST]"
    assert prompt("internvl-2-5", SYSTEM, user(image("a"), text("What?"))) == (
        "<|im_start|>system\nsigma zero<|im_end|>\n<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
