"""``rtp-llm chat``: a conversation in the terminal, with an engine in this process or an OpenAI-compatible server.

Answers go to stdout, everything else (thoughts, statistics, notices, errors) to stderr. ``Chat`` knows neither engine
nor server: it generates through a ``ChatBackend``.
"""

import argparse
from typing import Any

from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.tools.chat.conversation import Chat
from rtp_llm.tools.chat.engine_backend import LoadingBar, engine_backend
from rtp_llm.tools.chat.server_backend import server_backend
from rtp_llm.tools.chat.terminal import Terminal


def run_chat(args: argparse.Namespace, sampling: dict[str, Any], loading_bar: LoadingBar) -> int:
    """Run the command; return the exit status. ``sampling`` are the parameters given on the command line."""
    SamplingParams.from_dict(sampling)  # a wrong flag fails before a model is loaded
    if args.url:
        return Terminal(Chat(server_backend(args, sampling), args.system)).run()
    with engine_backend(args, sampling, loading_bar) as backend:
        return Terminal(Chat(backend, args.system)).run()
