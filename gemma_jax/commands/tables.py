"""Tables on standard output."""

from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table


def report_console() -> Console:
    """Returns a console on standard output. In a file or a pipe it is wide, so that rows are not folded."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def table(titles: Sequence[str], right: Collection[str] = ()) -> Table:
    """Returns an empty table with these columns; those in `right` are right-aligned and never folded."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for title in titles:
        if title in right:
            made.add_column(title, justify="right", no_wrap=True)
        else:
            made.add_column(title, overflow="fold")
    return made
