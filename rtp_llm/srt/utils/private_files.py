"""Checks that only this user can have written a file, made before code or weights are loaded from it."""

import os
import stat
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def problem_of_folder(folder: Path) -> str | None:
    """Return why others could put files into ``folder``; None: they cannot.

    It must belong to this user, and be writable for this user alone. A user who can write to a parent folder could
    replace it, so parents must belong to this user or root, and be writable for no other, unless they are sticky like
    /tmp. A symbolic link would be checked at its target, so pass a resolved path.
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


def prepared_folder(folder: Path) -> tuple[Path, str | None]:
    """Create a folder for this user alone if it is missing; return it resolved, and why it cannot be used, if so."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        resolved = folder.resolve(strict=True)
    except OSError as error:
        return folder, f"{folder}: {error.strerror}"
    problem = problem_of_folder(resolved)
    if problem is None and not os.access(resolved, os.W_OK | os.X_OK):
        problem = f"{resolved} cannot be written to"
    return resolved, problem


def problem_of_file(path: Path) -> str | None:
    """Return why others could have written the regular file ``path``; None: they could not, in a checked folder."""
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
