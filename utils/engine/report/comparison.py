"""A page that sets runs side by side, image by image: the first one against each of the others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from evaluation.evaluator import Score
from utils.engine.report.page import Section, code, facts, folded, heading, key_to_colours, page, pictures, plot, table
from utils.engine.report.plots import scatter_svg
from utils.engine.report.review import INDEX, INPUT, LABEL, ImageScores, load_image_scores, thumbnail
from utils.engine.results import unit_of

RESAMPLES, CHUNK = 2000, 100    # of the images; so many at a time
EACH = 3                        # images that are shown where one side is better by most
LEAST = 8                       # images for an interval to be given


@dataclass(frozen=True)
class Compared:
    """One row: the runs of an experiment, and how their weights were chosen."""

    name: str
    files: Sequence[Path]           # result files
    chosen: str

    @cached_property
    def folders(self) -> list[Path]:
        """Where the scores of the images and their pictures are: beside results.json, above results/step_N.json."""
        return [file.parent if file.parent.name != "results" else file.parent.parent for file in self.files]

    @cached_property
    def images(self) -> ImageScores | None:
        """The mean over the runs, of the images that all of them have; None where a run has no scores of images."""
        if not all((folder / INDEX).is_file() for folder in self.folders):
            return None
        found = [load_image_scores(folder / INDEX) for folder in self.folders]
        names = sorted(set.intersection(*(set(one.names) for one in found)))
        tasks = [task for task in found[0].scores if all(task in one.scores for one in found)]
        return ImageScores({task: found[0].scores[task] for task in tasks}, names,
                           {task: np.mean([of_images(one, task, names) for one in found], axis=0) for task in tasks},
                           found[0].keys)


def of_images(found: ImageScores, task: str, names: Sequence[str]) -> np.ndarray:
    """The scores of these images, in their order."""
    at = {name: i for i, name in enumerate(found.names)}
    return found.values[task][[at[name] for name in names]]


def mean_and_interval(difference: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The mean over the images (n,), and where 95 % of the means of so many images drawn from them lie (bootstrap)."""
    n, rng = len(difference), np.random.default_rng(seed)
    means = np.concatenate([rng.multinomial(n, np.full(n, 1 / n), size=CHUNK) @ difference / n
                            for _ in range(RESAMPLES // CHUNK)])
    return float(difference.mean()), *map(float, np.quantile(means, (0.025, 0.975)))


def comparison_page(rows: Sequence[Compared], cells: Sequence[Sequence[str]], tables: Mapping[str, str],
                    units: Mapping[str, str]) -> str:
    """The document. cells: of the table, titles first; tables: the same as text, by format."""
    scores = table("Mean and spread over the runs of a row", cells)
    scores += "".join(folded(f"The table as {name}", code(text)) for name, text in tables.items())
    runs = facts((row.name, f"{row.chosen}; {', '.join(map(str, row.files))}") for row in rows)
    first, *others = rows
    sections = [("Scores", scores), ("Runs", runs)]
    if others and first.images is not None:
        sections.append(("How to read the differences", HOW_TO_READ))
    for other in others:
        sections += _against(first, other, units)
    return page(f"{' / '.join(row.name for row in rows)}: comparison", f"{len(rows)} rows", sections)


HOW_TO_READ = (
    "<p>Each image has a score of its own in each task, the mean over the runs of a row; a difference is taken image "
    "by image. The interval holds 95 % of the mean differences that other draws of so many images from these would "
    f"give (bootstrap, {RESAMPLES} draws). Where it leaves out 0, the choice of images does not explain the "
    "difference; another seed of the training may, which the spread over runs tells. Several tasks and rows are "
    "several chances: nothing is corrected for that. The mean of the images' scores is not the score of the set.</p>")


def _against(first: Compared, other: Compared, units: Mapping[str, str]) -> Iterator[Section]:
    title = f"{other.name} against {first.name}"
    missing = [row.name for row in (first, other) if row.images is None]
    if missing:
        yield title, facts([(f"no scores of single images ({INDEX})",
                             f"{', '.join(missing)}: evaluate again with report=true")])
        return
    parts, summary = [], [["task", "images", "score", first.name, other.name, "difference", "95 % interval",
                           "images better"]]
    names = sorted(set(first.images.names) & set(other.images.names))
    for task, score in first.images.scores.items():
        if task in other.images.scores:
            row, shown = _task(first, other, task, score, names, unit_of(task, score, units))
            summary.append(row)
            parts.append(shown)
    yield title, table(f"{title}, mean over the images of both", summary) + "\n".join(parts)


def _task(first: Compared, other: Compared, task: str, score: Score, names: Sequence[str],
          unit: str) -> tuple[list[str], str]:
    """A line of the table, and what is shown of the task."""
    a, b = (score.scale * of_images(row.images, task, names) for row in (first, other))
    both = np.isfinite(a) & np.isfinite(b)
    a, b, names = a[both], b[both], [name for name, there in zip(names, both, strict=True) if there]
    head = [task, str(len(names)), f"{score.label} {unit}".strip()]
    if not names:
        return [*head, *["-"] * 5], ""
    number = lambda value, sign="": f"{value:{sign}.{score.decimals}f}"  # noqa: E731
    better = (b > a) if score.higher_is_better else (b < a)
    interval = "too few images"
    if len(names) >= LEAST:
        _, low, high = mean_and_interval(b - a)
        interval = f"{number(low, '+')} to {number(high, '+')}{', without 0' if low > 0 or high < 0 else ''}"
    line = [*head, number(a.mean()), number(b.mean()), number((b - a).mean(), "+"), interval,
            f"{100 * better.mean():.0f} %"]
    words = (f"{task}: {score.label} of each image, {other.name} over {first.name}; on the line both are equal. "
             f"{other.name} is better on {100 * better.mean():.0f} % of {len(names)} images.")
    drawn = plot(scatter_svg(a, b, f"{first.name}, {head[2]}", f"{other.name}, {head[2]}"), words, words)
    return line, heading(3, task) + drawn + "".join(_apart(first, other, task, score, names, a, b, unit))


def _apart(first: Compared, other: Compared, task: str, score: Score, names: Sequence[str], a: np.ndarray,
           b: np.ndarray, unit: str) -> Iterator[str]:
    """The images where either side is better by most."""
    gain = (b - a) * (1 if score.higher_is_better else -1)
    order = np.argsort(-gain, kind="stable")
    pictured = [i for i in order if thumbnail(first.folders[0], INPUT, names[i]).is_file()
                and thumbnail(other.folders[0], task, names[i]).is_file()]
    among = f", of the {len(pictured)} images with pictures" if 0 < len(pictured) < len(order) else ""
    order = pictured or order
    if pictured and gain[order].any():
        yield key_to_colours(task, first.images.keys.get(task, []))
    for row, chosen in ((other, [i for i in order if gain[i] > 0][:EACH]),
                        (first, [i for i in order[::-1] if gain[i] < 0][:EACH])):
        if chosen:
            yield heading(4, f"{task}: better by most in {row.name}{among}")
        for i in chosen:
            values = ", ".join(f"{name} {value:.{score.decimals}f}"
                               for name, value in ((first.name, a[i]), (other.name, b[i])))
            shown = [("image", first, INPUT), ("label", first, f"{task}{LABEL}"), (first.name, first, task),
                     (other.name, other, task)]
            yield pictures(f"{names[i]}, {score.label} {unit}".strip() + f": {values}",
                           [(words, thumbnail(whose.folders[0], kind, names[i])) for words, whose, kind in shown])
