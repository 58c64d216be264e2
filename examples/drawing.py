"""In: images, marks and curves of a program. Out: a PNG."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internimage_hf.remote_code import replace_file


@contextmanager
def panels(file: Path, number: int, columns: int, width: float, height: float) -> Iterator[Iterator]:
    """Writes a PNG of `number` panels in rows of `columns`, each `width` x `height` inches, without axes.

    Yields:
        An iterator over the panels as axes of matplotlib, row by row.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = max(1, -(-number // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(columns * width, rows * height), squeeze=False)
    try:
        for axis in axes.flat:
            axis.axis("off")
        yield iter(axes.flat)
        figure.tight_layout()
        figure.savefig(file, dpi=100)
    finally:
        plt.close(figure)


@contextmanager
def figure(file: Path, *rows_and_columns: int, dpi: int = 100, **kwargs) -> Iterator[tuple]:
    """Writes a PNG of axes in rows and columns, which captions do not overlap.

    Args:
        **kwargs: of matplotlib's `subplots`.

    Yields:
        The figure and an array of axes, as `subplots` gives them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    result, axes = plt.subplots(*rows_and_columns, layout="constrained", **kwargs)
    try:
        yield result, axes
        content = io.BytesIO()
        result.savefig(content, format="png", dpi=dpi)
    finally:
        plt.close(result)
    replace_file(file, content.getvalue())
