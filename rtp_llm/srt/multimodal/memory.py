"""The memory that media may take in this process: a budget, whose users wait until there is room.

A ``Room`` is a number of bytes that accounts share. An account that finds no room waits for others to release theirs.
An account may take more while it holds some, such as a file that grows while it is fetched. Deadlocks are prevented by
Dijkstra's banker's algorithm for a single resource: an account first declares the most that it may hold (its claim),
and bytes are granted only if all accounts that hold some could still, in some order, get their whole claim and finish.
There is no starvation: while an account waits, no later one begins to hold bytes.

``MediaMemory`` is the budget of ``--media-memory-budget-mb``, in two rooms: ``files`` for fetched files, a quarter, and
``pixels`` for the rest. Prompts take from ``files`` first, then once from ``pixels``, all at a time. An account that
holds pixels takes nothing more and will release them; so every account that holds files gets pixels in the end.
"""

import asyncio
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Self

from rtp_llm.srt.sampling_params import ContextLengthExceeded, InvalidRequest

FLAG = "--media-memory-budget-mb"
MIB = 2**20
FILES_SHARE = 4  # files get one part in so many
DECODERS = 4  # media that are decoded at once, in one thread each


class Room:
    """Bytes that accounts take and release, in any thread and any event loop.

    Attributes:
        size: bytes in all.
        held: bytes taken now.
        most_held: the most bytes taken at once.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0
        self.most_held = 0
        self._lock = threading.Lock()
        self._accounts: dict[int, Account] = {}  # by their numbers, oldest first
        self._numbers = itertools.count()

    def account(self, claim: int) -> "Account":
        """Return an account that may hold up to ``claim`` bytes, or all bytes if that is less. It must be closed."""
        account = Account(self, claim)
        with self._lock:
            account.number = next(self._numbers)
            self._accounts[account.number] = account
        return account

    @property
    def num_waiting(self) -> int:
        with self._lock:
            return sum(len(account.asked) for account in self._accounts.values())

    def _ask(self, account: "Account", num_bytes: int) -> "_TakeRequest":
        ask = _TakeRequest(num_bytes)
        with self._lock:
            account.asked.append(ask)
            self._grant()
        return ask

    def _withdraw(self, account: "Account", ask: "_TakeRequest") -> None:
        """Cancel a request, or release its bytes if they have been granted."""
        with self._lock:
            if ask in account.asked:
                account.asked.remove(ask)
            elif ask.is_given and account.number in self._accounts:
                self._take_back(account, ask.num_bytes)
            self._grant()

    def _give(self, account: "Account", num_bytes: int, lower_claim: int = 0) -> None:
        with self._lock:
            if account.number in self._accounts:
                self._take_back(account, num_bytes)
                account.whole_claim = max(account.whole_claim - lower_claim, account.wanted)
                self._grant()

    def _close(self, account: "Account") -> None:
        with self._lock:
            if self._accounts.pop(account.number, None) is not None:
                self._take_back(account, account.held)
                self._grant()

    def _take_back(self, account: "Account", num_bytes: int) -> None:
        account.held -= num_bytes
        self.held -= num_bytes

    def _grant(self) -> None:
        """Grant waiting requests where that is safe, the oldest accounts first."""
        older_waits = False
        for account in self._accounts.values():
            while account.asked and (account.held or not older_waits):
                ask = account.asked[0]
                if not self._is_safe(account, ask.num_bytes):
                    break
                account.asked.pop(0)
                if ask.future.set_running_or_notify_cancel():  # otherwise it was cancelled
                    ask.is_given = True
                    account.held += ask.num_bytes
                    self.held += ask.num_bytes
                    self.most_held = max(self.most_held, self.held)
                    ask.future.set_result(None)
            older_waits = older_waits or bool(account.asked)

    def _is_safe(self, account: "Account", num_bytes: int) -> bool:
        """Return whether, after such a grant, all holders could still get their claims one after the other."""
        free = self.size - self.held - num_bytes
        if free < 0:
            return False
        holders = [
            (other.claim - other.held - (num_bytes if other is account else 0), other.held)
            for other in self._accounts.values()
            if other.held and other is not account
        ]
        holders.append((account.claim - account.held - num_bytes, account.held + num_bytes))
        for missing, held in sorted(holders):
            if missing > free:
                return False
            free += held
        return True


@dataclass(slots=True, eq=False)
class _TakeRequest:
    num_bytes: int
    future: "Future[None]" = field(default_factory=Future)
    is_given: bool = False


@dataclass(slots=True, eq=False)
class Account:
    """One prompt's bytes of a room. Leaving its context closes it.

    Attributes:
        whole_claim: the most that it may hold, not limited by the room's size.
    """

    room: Room
    whole_claim: int
    held: int = 0
    number: int = -1
    asked: list[_TakeRequest] = field(default_factory=list)

    @property
    def claim(self) -> int:
        return min(self.whole_claim, self.room.size)

    @property
    def wanted(self) -> int:
        """Bytes that it holds or waits for."""
        return self.held + sum(ask.num_bytes for ask in self.asked)

    async def take(self, num_bytes: int) -> None:
        """Take bytes; wait until there is room. Taking more than the claim is a bug of the caller."""
        if self.wanted + num_bytes > self.claim:
            raise ValueError(f"{num_bytes} bytes more than {self.wanted} are asked for, but {self.claim} were claimed")
        ask = self.room._ask(self, num_bytes)
        try:
            await asyncio.wrap_future(ask.future)
        except BaseException:
            self.room._withdraw(self, ask)
            raise

    def give(self, num_bytes: int, lower_claim: int = 0) -> None:
        """Release bytes, and lower the claim."""
        self.room._give(self, num_bytes, lower_claim)

    def close(self) -> None:
        """Release everything. Idempotent."""
        self.room._close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class MediaMemory:
    """The media memory of a process."""

    def __init__(self, budget_mb: float) -> None:
        size = int(budget_mb * MIB)
        self.files = Room(size // FILES_SHARE)
        self.pixels = Room(size - size // FILES_SHARE)

    def check_fits(self, num_bytes: int, what: str, param: str) -> None:
        """Raise InvalidRequest if something needs more than all memory for pixels."""
        if num_bytes > self.pixels.size:
            raise InvalidRequest(
                f"{what} would take about {-(-num_bytes // MIB):,} MiB of memory while being decoded and prepared, and "
                f"there are {self.pixels.size // MIB:,} for that: send fewer, or smaller ones, or start the server "
                f"with a larger {FLAG}",
                param,
            )

    def check_file_fits(self, num_bytes: int, what: str, param: str) -> None:
        """Raise InvalidRequest if files are larger than all memory for files."""
        if num_bytes > self.files.size:
            raise InvalidRequest(
                f"{what} larger than the {self.files.size / MIB:.4g} MiB that there are for files: send fewer, or "
                f"smaller ones, or start the server with a larger {FLAG}",
                param,
            )


class FileLimits:
    """Limits of files' sizes: of each, and of all in ``memory``.

    Args:
        max_bytes: of the largest image or video, before it is decoded.
    """

    def __init__(self, max_bytes: int, memory: MediaMemory) -> None:
        self.max_bytes = max_bytes
        self._memory = memory

    async def take(self, files: Account, num_bytes: int, param: str) -> None:
        if files.wanted + num_bytes > files.claim:
            self._memory.check_file_fits(
                files.wanted + num_bytes, "the prompt's images and videos are, as files,", param
            )
        await files.take(num_bytes)

    def check_size(self, num_bytes: int, param: str) -> None:
        if num_bytes > self.max_bytes:
            raise self.too_large(param)

    def checked_size(self, data: bytes, param: str) -> bytes:
        self.check_size(len(data), param)
        return data

    def too_large(self, param: str) -> InvalidRequest:
        limit = self.max_bytes / MIB
        return InvalidRequest(f"the media are larger than {limit:.4g} MiB (--media-url-max-file-size-mb)", param)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that one medium of a prompt takes.

    Args:
        held: its decoded pixels, from decoding until the whole prompt is prepared.
        decoding: more while it is decoded; DECODERS are decoded at once.
        preparing: more while the model's processor works on it; one at a time.
        features: the processor's output, with the copies made on its way to the model.
    """

    held: int
    decoding: int = 0
    preparing: int = 0
    features: int = 0

    @property
    def alone(self) -> int:
        return total_need([self])


def total_need(needs: Sequence[Need]) -> int:
    """Return the bytes that a prompt's media take together."""
    stays = sum(need.held + need.features for need in needs)
    decoding = sum(sorted((need.decoding for need in needs), reverse=True)[:DECODERS])
    return stays + max([decoding, *(need.preparing for need in needs)])


class MediaScope:
    """A prompt's use of the budget, from its first fetch until its items are handed on.

    Args:
        most_tokens: of a prompt.
        too_long: the error's class for a prompt with more, made from a reason and a parameter's name.
    """

    def __init__(self, most_tokens: int | None = None, too_long: type[InvalidRequest] = ContextLengthExceeded) -> None:
        self.most_tokens = most_tokens
        self._too_long = too_long
        self._accounts: list[Account] = []

    def keep(self, account: Account) -> Account:
        """Close the account with the scope, at the latest."""
        self._accounts.append(account)
        return account

    def close(self) -> None:
        for account in self._accounts:
            account.close()
        self._accounts = []

    def check_tokens(self, num_tokens: int, param: str) -> None:
        """Raise ContextLengthExceeded if media alone have more tokens than a prompt may."""
        if self.most_tokens is not None and num_tokens > self.most_tokens:
            raise self._too_long(
                f"This model's maximum context length is {self.most_tokens} tokens: the prompt's media alone have at "
                f"least {num_tokens}; send fewer, or smaller ones",
                param,
            )


_scope: ContextVar[MediaScope | None] = ContextVar("media_scope", default=None)


@contextmanager
def media_scope(scope: MediaScope) -> Iterator[MediaScope]:
    """Make this the current scope, and release its memory in the end."""
    token = _scope.set(scope)
    try:
        yield scope
    finally:
        _scope.reset(token)
        scope.close()


@contextmanager
def current_scope() -> Iterator[MediaScope]:
    """Yield the current scope, or a new one."""
    scope = _scope.get()
    if scope is not None:
        yield scope
        return
    with media_scope(MediaScope()) as own:
        yield own
