"""What the figures of all studies share: a backend that needs no screen, colours, and how a figure is saved."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 (after the backend)

ANSWER_COLOURS = {"true": "tab:blue", "random": "tab:orange"}


def save(figure: plt.Figure, path: Path, dpi: int = 110) -> None:
    """Writes a figure and frees it."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
