"""Files that nobody but this user can have written: what is checked before code is loaded from a place."""

import os
import stat
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def problem_of_folder(folder: Path) -> str | None:
    """Why others could put files into ``folder``; None: they cannot.

    It must be this user's, and writable for this user alone. Whoever can write to a folder above could exchange it,
    so those must be this user's or root's, and writable for nobody else, unless they are sticky as /tmp is. A symbolic
    link would be checked at its target, so give a resolved path.
    """
    for place in (folder, *folder.parents):
        try:
            info = place.lstat()
        except OSError as error:
            return f"{place}: {error.strerror}"
        if not stat.S_ISDIR(info.st_mode):
            return f"{place} is no folder"
        owners = (os.geteuid(),) if place == folder else (os.geteuid(), 0)
        sticky = place != folder and info.st_mode & stat.S_ISVTX
        if (problem := _problem(place, info, owners)) and not (sticky and info.st_uid in owners):
            return problem
    return None


def problem_of_file(path: Path) -> str | None:
    """Why others could have written the regular file ``path``; None: they could not, given a sound folder."""
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        return f"{path} is no regular file"
    return _problem(path, info, (os.geteuid(),))


def _problem(path: Path, info: os.stat_result, owners: tuple[int, ...]) -> str | None:
    if info.st_uid not in owners:
        return f"{path} belongs to user {info.st_uid}"
    if info.st_mode & OTHERS_WRITE:
        return f"others than its owner may write to {path} (its mode is {stat.S_IMODE(info.st_mode):03o})"
    return None
