"""In: images and marks of a training program. Out: a PNG with a grid of panels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
