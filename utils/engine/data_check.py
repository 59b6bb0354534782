"""The check of all files before the first step: shared by the ranks, and remembered for the next run."""

import logging
import time
from collections.abc import Mapping

from data.base import MultiTaskDataset
from data.check import Examined, SoundFiles, repeated, summary, survey
from data.mixture import MixedDataset
from utils import distributed

logger = logging.getLogger(__name__)


def require_sound(splits: Mapping[str, MultiTaskDataset | MixedDataset], workers: int) -> None:
    """Raises a ValueError that names the first files with which this training would stop or learn nonsense.

    splits: "train" and what is evaluated. Every rank reads its share, with `workers` processes; files that an earlier
    run found sound are not read again.
    """
    start, read, total = time.perf_counter(), 0, sum(map(len, splits.values()))
    found: dict[str, dict[str, Examined]] = {split: {} for split in splits}
    for split, dataset in ((split, part) for split, whole in splits.items() for part in whole.parts):
        sound = SoundFiles(dataset)
        known = {name: sound.find(name) for name in dataset.ids}
        unread = [name for name, examined in known.items() if examined is None]
        mine = list(survey(dataset, unread[distributed.rank()::distributed.world_size()], workers))
        new = {examined.name: examined for part in distributed.gather_objects(mine) for examined in part}
        if new and distributed.is_main():
            sound.add(new.values())
        where = f"{dataset.spec.name}/" if len(splits[split].parts) > 1 else ""
        found[split] |= {f"{where}{name}": new.get(name) or known[name] for name in dataset.ids}
        read += len(new)
    problems = [problem for examined in found.values() for e in examined.values() for problem in e.problems]
    leaks, twins = repeated({split: {name: e.digest for name, e in of.items()} for split, of in found.items()})
    if leaks:
        problems.append(f"{len(leaks)} image(s) are trained on and scored ({summary(leaks)})")
    if problems:
        folder = next(iter(splits.values())).parts[0].folder        # of the training images
        raise ValueError(f"the data check found {len(problems)} problem(s): {summary(problems)}. `python scripts/"
                         f"check_data.py {folder}` lists all of them; --skip_data_check starts without looking, and a "
                         "damaged file then ends the run when it is met")
    notes = [note for examined in found.values() for e in examined.values() for note in e.notes] + twins
    if notes and distributed.is_main():
        logger.warning("data check, %d note(s): %s", len(notes), summary(notes))
    if read and distributed.is_main():
        logger.info("data check: all files of %d images are sound (%d read now, %.1f s)", total, read,
                    time.perf_counter() - start)
