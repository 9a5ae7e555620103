"""Progress: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["track"]

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 15.0


@lru_cache(maxsize=1)
def _console() -> Console:
    """The one console: bars within bars share its screen."""
    from rich.console import Console

    return Console(stderr=True)


def track(
    items: Iterable[Item],
    *,
    total: int,
    title: str,
    status: Callable[[], str] | None = None,
) -> Iterator[Item]:
    """The items, with a progress bar on a terminal and plain lines elsewhere (on stderr).

    Parameters
    ----------
    items
        What is worked through.
    total
        How many there will be.
    title
        What the work is, a few words.
    status
        Gives a few words on how it stands, shown beside the title.
    """
    told = status or str
    if sys.stderr.isatty():
        from rich.progress import Progress

        with Progress(console=_console(), transient=True) as progress:
            task = progress.add_task(title, total=total)
            for item in items:
                yield item
                progress.update(task, advance=1, description=f"{title} {told()}".strip())
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES and done < total:
            last, remaining = now, (now - start) / done * (total - done)
            line = f"{title}: {done} of {total}, {remaining:.0f} s left {told()}".strip()
            print(line, file=sys.stderr, flush=True)
