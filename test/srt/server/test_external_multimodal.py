"""The example of a model that sees, in one file outside the package, answers as plain torch and transformers do."""

import base64
import io
import json
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
import transformers
from mm_parity import draw_image
from PIL import Image
from safetensors.torch import load_file, save_file

from tiny_models import make_tiny
from tiny_server import ROOT, free_port, python_process

pytestmark = pytest.mark.xdist_group("server-process")

SCRIPT = str(ROOT / "examples/external_multimodal_model/serve.py")
SIZE, PATCH, HEADS = 28, 7, 4
NUM_PATCHES = (SIZE // PATCH) ** 2
ANSWER_LEN = 8
CONTEXT_LENGTH = 96


def make_checkpoint(directory: Path) -> str:
    """A tiny Llama with an eye. Its name has ``seeing-llama`` in it, by which its conversation is found."""
    make_tiny("LlamaForCausalLM", directory, num_attention_heads=HEADS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    hidden = json.loads((directory / "config.json").read_text())["hidden_size"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed.weight": (hidden, 3, PATCH, PATCH), "embed.bias": (hidden,), "positions.weight": (NUM_PATCHES, hidden),
        "norm.weight": (hidden,), "norm.bias": (hidden,), "attn.qkv_proj.weight": (3 * hidden, hidden),
        "attn.qkv_proj.bias": (3 * hidden,), "attn.proj.weight": (hidden, hidden), "attn.proj.bias": (hidden,),
    }  # fmt: skip
    eye = {f"eye.{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights = load_file(directory / "model.safetensors")
    vocab_size = len(tokenizer)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = 0.3 * torch.randn(vocab_size - len(weights[name]), hidden, generator=generator)
        weights[name] = torch.cat([weights[name], more])
    save_file({**weights, **eye}, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["SeeingLlamaForConditionalGeneration"], "vocab_size": vocab_size}
    config |= {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    config |= {"eye_image_size": SIZE, "eye_patch_size": PATCH}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


class Expected:
    """The same in plain torch, and transformers' Llama."""

    def __init__(self, model_dir: str) -> None:
        config = json.loads(Path(model_dir, "config.json").read_text())
        weights = load_file(Path(model_dir, "model.safetensors"))
        self.eye = {name.removeprefix("eye."): weights.pop(name) for name in list(weights) if name.startswith("eye.")}
        self.image_id = config["image_token_id"]
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
        self.model.load_state_dict(weights)

    def rows(self, image: Image.Image) -> torch.Tensor:
        eye = self.eye
        pixels = torch.from_numpy(np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32) / 255)
        x = torch.nn.functional.conv2d(pixels.permute(2, 0, 1)[None], eye["embed.weight"], eye["embed.bias"], PATCH)
        x = x[0].flatten(1).T + eye["positions.weight"]
        hidden = x.shape[1]
        normed = torch.nn.functional.layer_norm(x, (hidden,), eye["norm.weight"], eye["norm.bias"])
        qkv = normed @ eye["attn.qkv_proj.weight"].T + eye["attn.qkv_proj.bias"]
        q, k, v = qkv.view(NUM_PATCHES, 3, HEADS, hidden // HEADS).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) * (hidden // HEADS) ** -0.5).softmax(-1)
        seen = (weights @ v).transpose(0, 1).reshape(NUM_PATCHES, hidden)
        return x + seen @ eye["attn.proj.weight"].T + eye["attn.proj.bias"]

    @torch.inference_mode()
    def answer(self, text: str, *images: Image.Image) -> list[int]:
        pieces, left = [], iter(images)
        for token_id in self.tokenizer(text)["input_ids"]:
            if token_id == self.image_id:
                pieces.append(self.rows(next(left)))
            else:
                pieces.append(self.model.get_input_embeddings()(torch.tensor([token_id])))
        embeds = torch.cat(pieces)[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        options = {"max_new_tokens": ANSWER_LEN, "min_new_tokens": ANSWER_LEN, "do_sample": False}
        return self.model.generate(inputs_embeds=embeds, attention_mask=mask, eos_token_id=None, **options)[0].tolist()


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("tp_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_example(tmp_path: Path, tp_size: int) -> None:
    model_dir = make_checkpoint(tmp_path / "tiny-seeing-llama")
    expected = Expected(model_dir)
    red, green = draw_image(40, 30, seed=1), draw_image(30, 50, seed=2)
    port = free_port()
    command = [SCRIPT, "--model-path", model_dir, "--port", str(port), "--tp-size", str(tp_size)]
    command += ["--device", "cpu", "--max-total-tokens", "1024", "--dtype", "float32", "--chunked-prefill-size", "8"]
    command += ["--context-length", str(CONTEXT_LENGTH)]
    params = {"temperature": 0, "max_new_tokens": ANSWER_LEN, "ignore_eos": True}
    with python_process(tmp_path, command, port) as server:
        server.wait_ready()

        def ask(text: str, *images: Image.Image) -> dict:
            body = {"text": text, "image_data": [png(image) for image in images], "sampling_params": params}
            return httpx.post(f"{server.url}/generate", json=body, timeout=60).raise_for_status().json()

        one = ask("What is <image> here?", red)
        assert one["output_ids"] == expected.answer("What is <image> here?", red)
        assert one["meta_info"]["prompt_tokens"] == len(expected.tokenizer("What is <image> here?")["input_ids"]) + 15
        assert ask("What is <image> here?", green)["output_ids"] == expected.answer("What is <image> here?", green)
        two = ask("<image> or <image>?", red, green)
        assert two["output_ids"] == expected.answer("<image> or <image>?", red, green)
        again = ask("<image> or <image>?", red, red)
        assert again["output_ids"] == expected.answer("<image> or <image>?", red, red)
        assert again["meta_info"]["cached_tokens"] >= NUM_PATCHES

        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(red)}"}}]
        content.append({"type": "text", "text": "Which?"})
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(
            model=model_dir, messages=messages, temperature=0, max_tokens=ANSWER_LEN, extra_body={"ignore_eos": True}
        )
        ids = expected.answer("Q: <image>\nWhich?\nA:", red)
        text = expected.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.choices[0].message.content == text.partition("\n")[0]
        num_tokens = len(expected.tokenizer("Q: <image>\nWhich?\nA:")["input_ids"]) + 15
        assert answer.usage.prompt_tokens == num_tokens

        # An answer of any length has what room pad_input_ids has left; one of a length that is asked for is refused.
        options = {"model": model_dir, "messages": messages, "temperature": 0}
        extra = {"ignore_eos": True, "min_tokens": CONTEXT_LENGTH - num_tokens}
        answer = client.chat.completions.create(**options, extra_body=extra)
        assert answer.usage.total_tokens == CONTEXT_LENGTH
        too_many = CONTEXT_LENGTH - num_tokens + 1
        with pytest.raises(
            openai.BadRequestError, match=f"the prompt of {num_tokens} tokens leaves room for {too_many - 1}"
        ):
            client.chat.completions.create(**options, max_tokens=too_many)
