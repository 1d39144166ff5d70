"""Tables on standard output."""

from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table


def report_console() -> Console:
    """Standard output, wide where it is a file or a pipe: rows must not be folded there."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def table(titles: Sequence[str], right: Collection[str] = ()) -> Table:
    """An empty table with these columns, some of which are aligned right and never folded."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for title in titles:
        if title in right:
            made.add_column(title, justify="right", no_wrap=True)
        else:
            made.add_column(title, overflow="fold")
    return made
