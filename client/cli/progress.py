"""The progress bar: bytes of weights, their rate, the time left, the current layer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from flightquant.client.cli.report import size


class _BytesColumn(ProgressColumn):
    """Bytes done of all, and how fast."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        rate = f"{speed / 1e9:.2f} GB/s" if speed else ""
        done = f"{size(task.completed)} of {size(task.total or 0)}  {rate:>9}"
        return Text(done, style="progress.download", no_wrap=True)


class LayerProgress(contextlib.AbstractContextManager["LayerProgress"]):
    """A progress bar in bytes of weights, on standard error, that names the current layer.

    Parameters
    ----------
    sizes : mapping of str to int
        Bytes of all layers that will be told of.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._done: dict[str, float] = dict.fromkeys(sizes, 0.0)
        current = TextColumn("{task.description}", style="cyan", table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = (BarColumn(24), _BytesColumn(), TimeRemainingColumn(compact=True), current)
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("", total=sum(sizes.values()))

    def __enter__(self) -> LayerProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, name: str, fraction: float = 1.0) -> None:
        """The client's progress callback."""
        advance = (fraction - self._done[name]) * self._sizes[name]
        self._done[name] = fraction
        self._progress.update(self._task, advance=advance, description=name)
