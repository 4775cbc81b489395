"""Porting a model file: gather what it needs, rewrite it rule by rule, and write it down."""

import ast
from dataclasses import dataclass
from pathlib import Path

from rtp_llm.port.gather import gather
from rtp_llm.port.output import text_of
from rtp_llm.port.program import Program
from rtp_llm.port.report import Report
from rtp_llm.port.rules.attention import rewrite_attention
from rtp_llm.port.rules.configs import declare_config
from rtp_llm.port.rules.constructors import rewrite_constructors
from rtp_llm.port.rules.encoders import rewrite_encoders
from rtp_llm.port.rules.fold import fold
from rtp_llm.port.rules.layers import count_layers, rewrite_layers
from rtp_llm.port.rules.leftovers import clean, comment_leftovers
from rtp_llm.port.rules.logits import rewrite_logits
from rtp_llm.port.rules.multimodal import add_processor, take_media
from rtp_llm.port.rules.recurrent import return_outputs
from rtp_llm.port.rules.sglang import rewrite_sglang
from rtp_llm.port.rules.sglang_boundaries import write_residuals
from rtp_llm.port.rules.sglang_layers import keep_one_loader, rewrite_sglang_layers
from rtp_llm.port.rules.sglang_shell import answer_flags, finish_kernels, remove_sglang_shell
from rtp_llm.port.rules.shell import remove_shell
from rtp_llm.port.rules.threading import thread_batch
from rtp_llm.port.rules.unused import remove_unused
from rtp_llm.port.rules.weights import rewrite_weights
from rtp_llm.port.source import PortError, SourceTree

# In this order: what a rule reads, the earlier ones have left in place.
RULES = {
    "vllm": (
        declare_config,
        take_media,
        rewrite_encoders,
        remove_shell,
        fold,
        remove_unused,
        rewrite_attention,
        rewrite_constructors,
        rewrite_layers,
        return_outputs,
        thread_batch,
        rewrite_logits,
        rewrite_weights,
        clean,
        remove_unused,
        add_processor,
        comment_leftovers,
    ),
    "sglang": (
        remove_sglang_shell,
        remove_shell,
        fold,
        remove_unused,
        write_residuals,
        answer_flags,
        fold,
        keep_one_loader,
        finish_kernels,
        remove_unused,
        rewrite_constructors,
        rewrite_sglang_layers,
        rewrite_sglang,
        count_layers,
        clean,
        remove_unused,
        comment_leftovers,
    ),
}


@dataclass(frozen=True)
class Ported:
    """A ported file: its text, and what is to be said about it."""

    text: str
    report: Report


def port(path: Path, architecture: str | None = None, engine: str | None = None) -> Ported:
    """Port a model file of another engine.

    Args:
        architecture: the one to port; None: all of the file.
        engine: "vllm" or "sglang"; None: found by the file's imports.

    Raises:
        PortError: the file cannot be read, has no model class, or a sibling is missing; or a rule fails on it.
    """
    program = gather(SourceTree(path, engine), architecture)
    return _ported(program)


def _ported(program: Program) -> Ported:
    for rule in RULES[program.engine]:
        try:
            rule(program)
        except PortError:
            raise
        except Exception as error:  # whatever a rule may stumble over; the cause is chained
            raise _fault(f"{rule.__name__} failed: {type(error).__name__}: {error}") from error
    text = text_of(program)
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise _fault(f"the result is not valid Python, line {error.lineno}: {error.msg}: {error.text}") from error
    return Ported(text, Report.of(program, text))


def _fault(what: str) -> PortError:
    return PortError(f"{what}. This is a fault of the porter, not of the file: please report it, with the file")
