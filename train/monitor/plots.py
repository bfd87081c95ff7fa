"""Figures of a run: curves over its steps, grids of samples, scores over the guidance scale."""

import textwrap
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from data.storage.atomic import atomic_file

# Ends of the names of what is drawn beside a score: its spread, and the same of others' captions.
BESIDE = ("_std", "_chance")
# What a line of scores is of, and how that is told.
SETTINGS = {"guidance_scale": "guidance {:g}", "aug_level": "level {:g}", "enlarged_by": "{}"}


def plot_curves(metrics: list[dict[str, float]], folder: Path) -> list[Path]:
    """Draw loss.png and lr.png into a folder: the same two curves as on the model card."""
    paths, trained = [folder / "loss.png", folder / "lr.png"], ("loss", "mse", "vb")
    for path, names, log_scale in zip(paths, ((*trained, "validation/mse"), ("lr",)), (True, False), strict=True):
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for name in names:
            points = np.array([(m["step"], m[name]) for m in metrics if name in m])
            if len(points):
                smooth = name in trained and len(points) > 50
                line = axes.plot(points[:, 0], points[:, 1], alpha=0.35 if smooth else 1, label=name)[0]
                if smooth:
                    axes.plot(points[:, 0], _smooth(points[:, 1]), color=line.get_color(), label=f"{name}, smoothed")
        axes.set(xlabel="step", ylabel="lr" if names == ("lr",) else "loss", yscale="log" if log_scale else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
        save_figure(figure, path)
    return paths


def plot_grid(
    images: np.ndarray | list[np.ndarray], captions: list[str], title: str, path: Path, columns: int = 8,
    rows_are: list[str] | None = None,
) -> None:  # fmt: skip
    """Draw images with their captions below them, all in one size.

    images: each [3, H, W] uint8; pixels of small ones stay sharp.  rows_are: a label beside each row.
    """
    columns = min(len(images), columns)
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.5 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, caption in zip(axes.flat, images, captions, strict=False):
        ax.imshow(image.transpose(1, 2, 0), interpolation="antialiased")  # nearest if they are enlarged, and by much
        ax.set_title("\n".join(textwrap.wrap(caption, 22)[:4]), fontsize=7, y=-0.05, va="top", parse_math=False)
    for ax, label in zip(axes[:, 0], rows_are or [], strict=False):
        ax.text(-0.08, 0.5, label, transform=ax.transAxes, rotation=90, ha="right", va="center", fontsize=8)
    figure.suptitle("\n".join(textwrap.wrap(title, 26 * columns)), fontsize=9)
    save_figure(figure, path)


def label_of(line: dict[str, Any], over: str = "") -> str:
    """The settings of a line of scores, as in 'guidance 4, level 0.25', but for the one that they are drawn over."""
    return ", ".join(told.format(line[name]) for name, told in SETTINGS.items() if name in line and name != over)


def plot_scores(lines: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw each score over the guidance scale, with NAME_std as its error bars and NAME_chance as a line.

    In the second stage over the level of noise, if there are several; what no net drew is a horizontal line.
    """
    names = [name for name in lines[0] if name not in SETTINGS and not name.endswith(BESIDE)]
    figure, panels = plt.subplots(1, len(names), figsize=(4.5 * len(names), 4), squeeze=False, layout="constrained")
    levels = {line["aug_level"] for line in lines if "aug_level" in line}
    over = "aug_level" if len(levels) > 1 else "guidance_scale"
    for axes, name in zip(panels.flat, names, strict=True):
        for at, label in enumerate(dict.fromkeys(label_of(line, over) for line in lines)):
            curve = [line for line in lines if label_of(line, over) == label]
            if over not in curve[0]:
                axes.axhline(curve[0][name], linestyle=":", color=f"C{at}", label=label)
                continue
            x = [line[over] for line in curve]
            errors = [line[f"{name}_std"] for line in curve] if f"{name}_std" in curve[0] else None
            axes.errorbar(
                x, [line[name] for line in curve], errors, marker="o", capsize=3, color=f"C{at}", label=label or None
            )
            if f"{name}_chance" in curve[0]:
                chance = [line[f"{name}_chance"] for line in curve]
                axes.plot(x, chance, "--", color="grey", label=", ".join(filter(None, (label, "others' captions"))))
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        axes.set(xlabel="noise level" if over == "aug_level" else "guidance scale", ylabel=name)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=8)
    save_figure(figure, path)


def plot_lengths(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw each score over the length of the average, a curve for each of the other settings that the lines have."""
    known = dict.fromkeys(name for line in lines for name in line)
    names = [name for name in known if name not in ("ema_length", *SETTINGS) and not name.endswith(BESIDE)]
    figure, panels = plt.subplots(1, len(names), figsize=(4.5 * len(names), 4), squeeze=False, layout="constrained")
    for axes, name in zip(panels.flat, names, strict=True):
        of_score = [line for line in lines if name in line]
        for label in dict.fromkeys(map(label_of, of_score)):
            points = sorted((line["ema_length"], line[name]) for line in of_score if label_of(line) == label)
            axes.plot(*zip(*points, strict=True), "o-", label=label or None)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
        axes.set(xlabel="length of the average", ylabel=name, xscale="log")
        lengths = sorted({line["ema_length"] for line in of_score})
        axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """An exponential average over about a fiftieth of the curve, corrected for the bias of its start."""
    keep = 1 - 50 / max(len(values), 51)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return np.array(smoothed)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    with atomic_file(path) as aside, warnings.catch_warnings():
        # matplotlib's font shows a box for a letter that it lacks, as in a Chinese caption, and warns of each.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(aside, dpi=120, format="png")
    plt.close(figure)
