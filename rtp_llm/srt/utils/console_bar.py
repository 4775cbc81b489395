"""A bar of what is done, on a terminal; nothing where stderr is a file."""

import sys

WIDTH = 30  # characters


def show_bar(what: str, done: int, total: int) -> None:
    """Draw the bar over the one before; after the last part, remove it."""
    if not sys.stderr.isatty():
        return
    filled = WIDTH * done // total
    line = f"{what} [{'#' * filled}{' ' * (WIDTH - filled)}] {done}/{total}"
    sys.stderr.write("\r" + (" " * len(line) + "\r" if done == total else line))
    sys.stderr.flush()
