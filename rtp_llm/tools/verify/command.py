"""``rtp-llm verify``, and its output."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtp_llm.srt.checkpoint import read_model_config, read_tokenizer
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.utils.logging import configure_logging
from rtp_llm.tools.verify.all_schedules import SchedulesReport, verify_schedules
from rtp_llm.tools.verify.locate import MODULE_TOLERANCE, Difference
from rtp_llm.tools.verify.options import VerifyOptions
from rtp_llm.tools.verify.pooled import PooledReport, hint, makes_no_text, verify_pooled
from rtp_llm.tools.verify.run import TOP, PromptResult, Report, verify
from rtp_llm.tools.verify.schedule_places import Located

EXIT_DIFFERENT = 1
WIDTH = 80


def run_verify(args: argparse.Namespace) -> int:
    """Run the command; return the exit status: 0 if ours and transformers agree, 1 if not."""
    options = VerifyOptions(**{name: getattr(args, name) for name in [item.name for item in fields(VerifyOptions)]})
    server_args = ServerArgs.from_cli_args(args)
    configure_logging(server_args.log_level)
    if makes_no_text(server_args, options):
        return _run_pooled(verify_pooled(server_args, options), args.json)
    if options.schedules:
        return _run_schedules(server_args, options, args.json)
    report = verify(server_args, options)
    if args.json:
        print(json.dumps(as_json(report), indent=2))
    else:
        _print(report, _decoder(server_args))
    return 0 if report.agrees else EXIT_DIFFERENT


def _run_pooled(report: PooledReport, json_wanted: bool) -> int:
    if json_wanted:
        shown = asdict(report) | {"agrees": report.agrees, "first": None, "around": _pairs_of(report.around)}
        for result in shown["results"]:
            del result["prompt"]["media"]
        if report.first:
            [shown["first"]] = _pairs_of([report.first])
        print(json.dumps(_finite(shown), indent=2))
    else:
        _print_pooled(report)
    return 0 if report.agrees else EXIT_DIFFERENT


def _print_pooled(report: PooledReport) -> None:
    console = _console()
    console.print(f"{escape(report.class_name)} on {escape(report.model_path)}, {report.dtype}", soft_wrap=True)
    if report.failure:
        console.print("[red]It cannot be compared.[/red]")
        console.print(escape(report.failure), soft_wrap=True)
        return
    table = Table("prompt", "output", "difference")
    for result in report.results:
        colour = "green" if result.error <= report.tolerance else "red"
        table.add_row(escape(result.prompt.text), result.task, f"[{colour}]{result.error:.1e}[/{colour}]")
    console.print(table)
    if report.left_out:
        console.print(f"Not compared, as transformers' class has none: {', '.join(report.left_out)}.")
    if report.agrees:
        console.print(f"[green]They agree[/green]: within {report.tolerance:g} of the outputs' size.")
        return
    console.print("[red]They differ.[/red]")
    if report.first is None:
        console.print(hint(report))
        return
    place, error = report.first
    console.print(f"First: [bold]{escape(place.module)}[/bold], its {escape(place.part)} ({error:.2g})")
    console.print(f"See {escape(report.source)}")
    console.print(_table_of(report.around, "around it"))


def _run_schedules(args: ServerArgs, options: VerifyOptions, json_wanted: bool) -> int:
    report = verify_schedules(args, options)
    if json_wanted:
        results = [{**asdict(replace(result, error=None)), "agrees": result.agrees} for result in report.results]
        shown = asdict(replace(report, results=(), located=None)) | {"agrees": report.agrees, "results": results}
        if report.located:
            shown["located"] = asdict(replace(report.located, around=[])) | {"around": _places_of(report.located)}
        print(json.dumps(_finite(shown), indent=2))
    else:
        _print_schedules(report)
    return 0 if report.agrees else EXIT_DIFFERENT


def _print_schedules(report: SchedulesReport) -> None:
    console = _console()
    seeing = f", {report.num_with_images} of them with images" if report.num_with_images else ""
    console.print(
        f"{escape(report.model_path)}, {report.dtype}, {report.num_questions} prompts{seeing}", soft_wrap=True
    )
    if report.failure:
        console.print("[red]It cannot be compared.[/red]")
        console.print(escape(report.failure), soft_wrap=True)
        return
    table = Table("schedule", "log-probabilities", "median", "worst at")
    for result in report.results:
        if result.failure:
            table.add_row(result.schedule, "[red]fails[/red]", "", escape(result.failure))
        else:
            colour = "green" if result.agrees else "red"
            difference = f"[{colour}]{result.difference:.1e}[/{colour}]"
            table.add_row(result.schedule, difference, f"{result.median:.1e}", escape(result.question))
    console.print(table)
    console.print("[green]They agree.[/green]" if report.agrees else "[red]They differ.[/red]")
    if report.note:
        console.print(escape(report.note))
    if report.located:
        console.print(f"Computed again: {report.located.schedule}.")
        for line in _found_lines(report.located):
            console.print(line)


def as_json(report: Report) -> Any:
    shown = asdict(report) | {"agrees": report.agrees}
    for result in shown["results"]:
        del result["prompt"]["media"]
    shown["around"] = _places_of(report)
    return _finite(shown)


def _places_of(report: Report | Located) -> list[dict[str, Any]]:
    return _pairs_of(report.around)


def _pairs_of(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    return [{"module": d.place.module, "part": d.place.part, "error": d.error} for d in differences]


def _finite(value: Any) -> Any:
    """Replace infinity and NaN, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decoder(args: ServerArgs) -> Any:
    """Return a function from ids to text, or to the ids themselves without a tokenizer."""
    tokenizer = read_tokenizer(args, read_model_config(args))
    return str if tokenizer is None else lambda ids: repr(tokenizer.decode(ids))


def _print(report: Report, text_of: Any) -> None:
    console = _console()
    console.print(f"{escape(report.class_name)} on {escape(report.model_path)}, {report.dtype}", soft_wrap=True)
    if report.failure:
        console.print("[red]It cannot be compared.[/red]")
        console.print(escape(report.failure), soft_wrap=True)
        return
    console.print(_results_table(report, text_of))
    for line in _verdict(report):
        console.print(line)
    if report.pixels:
        console.print(escape(report.pixels))
    if report.around:
        console.print(_places_table(report))


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.width >= WIDTH else Console(width=WIDTH, highlight=False)


def _results_table(report: Report, text_of: Any) -> Table:
    table = Table("prompt", "max diff", "mean diff", f"top {TOP}", "text")
    for column in table.columns[1:4]:
        column.justify, column.no_wrap = "right", True
    for result in report.results:
        colour = "green" if result.error <= report.tolerance else "red"
        table.add_row(
            escape(result.prompt.text),
            f"[{colour}]{result.max_difference:.2g}[/{colour}]",
            f"{result.mean_difference:.2g}",
            f"{result.top_agreement:.0%}",
            escape(_text(result, text_of)),
        )
    return table


def _text(result: PromptResult, text_of: Any) -> str:
    if result.parting is None:
        return "same"
    part = result.parting
    i = part.index
    text = f"token {i}: ours {text_of([result.output_ids[i]])}, theirs {text_of([part.token_id])}"
    if part.same_in_float32 is None:
        return text
    return f"{text}; a tie within {part.gap:.1g}; " + (
        "equal in float32" if part.same_in_float32 else "they part in float32, too"
    )


def _verdict(report: Report) -> list[str]:
    if report.agrees:
        worst = max(result.error for result in report.results)
        agree = f"[green]They agree[/green]: logits differ by {worst:.1g} of their spread ({report.tolerance:g} may)."
        return [agree, *_states_lines(report), *_found_lines(report)]
    return ["[red]They differ.[/red]", *_found_lines(report)]


def _found_lines(report: Report | Located) -> list[str]:
    """Return note, place, causes and source."""
    lines = [escape(report.note)] if report.note else []
    if report.finding:
        finding = report.finding
        lines.append(f"First: [bold]{escape(finding.module)}[/bold], its {escape(finding.part)} ({finding.error:.2g})")
        causes = finding.causes or ["not found by experiment; everything before this place agrees"]
        lines += [f"Likely cause: {escape(cause)}" for cause in causes]
        lines.append(f"See {escape(report.source)}")
    return lines


def _states_lines(report: Report) -> list[str]:
    """Say how states at boundaries compare, where all logits agree."""
    states = [result.states for result in report.results if result.states]
    if not states:
        return []
    worst = max(states, key=lambda result: result.error)
    line = f"States at boundaries: {sum(result.num for result in states)} compared, "
    if worst.error <= MODULE_TOLERANCE[report.dtype]:
        return [f"{line}they differ by {worst.error:.1g} at most."]
    other = f"{escape(worst.worst)} differs by {worst.error:.2g}, though all that is made of it agrees: "
    return [f"{line}{other}ours is kept in another form."]


def _places_table(report: Report) -> Table:
    return _table_of(report.around, f"around it, of {report.num_compared} places")


def _table_of(differences: Sequence[Difference], title: str) -> Table:
    table = Table("place", "difference", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for place, error in differences:
        table.add_row(escape(str(place)), f"{error:.1e}")
    return table
