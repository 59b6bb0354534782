"""Experiment files made wrong at random: every one must be refused in one sentence, at once, or be a run that works.

    python scripts/faults/fuzz.py --files 10000                   # only reads them
    python scripts/faults/fuzz.py --files 10000 --train 300       # also trains one update of 300 accepted ones

A file is a small experiment of one of the decoders, changed in its values (odd types, numbers out of range, other
names, options that it did not have) and in its text (keys twice, references, tags, broken brackets). File N of a seed
is always the same one. Exit code 1 where any file ends in a traceback, in an unclear message, or takes too long.
"""

import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.command_line import Command
from utils.engine.config import Config, load_config
from utils.exits import sentence_of
from utils.options import ConfigError
from utils.table import Table

READ_SECONDS, TRAIN_SECONDS, TRAIN_BYTES = 2.0, 300, 6 * 2**30
COMMON = {
    "train_db_name": "NYUD", "val_db_name": "NYUD", "pretrained": False, "image_size": [64, 128], "trBatch": 2,
    "valBatch": 2, "nworkers": 0, "max_iter": 20, "val_interval": 10, "log_interval": 1, "device": "cpu",
    "tensorboard": False, "progress": False, "report": False, "optimizer": "adamw", "optimizer_kwargs": {"lr": 1e-3},
    "scheduler": "poly", "scheduler_kwargs": {"warmup_iters": 2}, "grad_clip_param": {"max_norm": 5.0},
    "loss_kwargs": {"loss_scheme": "weighted_sum", "loss_weights": {"semseg": 1, "depth": 1, "edge": 5}},
    "augmentation": {"scale_range": [0.8, 1.2]},
    "task_dictionary": {"include_semseg": True, "include_depth": True, "include_edge": True, "edge_w": 0.9},
}
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2}
MODELS = {      # decoder -> backbone, its options, the decoder's options
    "bim": ("swin", SWIN, {"msst_depth": 1, "d_state": 2}), "mtmamba": ("swin", SWIN, {"d_state": 2}),
    "mtmamba_plus": ("swin", SWIN, {"d_state": 2}), "fcn": ("swin", SWIN, {}),
    "multi_scale": ("swin", SWIN, {"channels": 8}), "demt": ("swin", SWIN, {"dim": 8}),
    "invpt": ("vit", VIT, {"embed_dim": 8, "PRED_OUT_NUM_CONSTANT": 8}),
    "mlore": ("vit", VIT, {"final_embed_dim": 8, "rank_list": [1, 2], "topk": 1}),
    "taskprompter": ("vit", VIT, {"embed_dim": 8, "level_embed_dim": 8, "final_embed_dim": 8, "img_ds_ratio": 1}),
    "bridgenet": ("vit", VIT, {"embed_dim": 8, "PRED_OUT_NUM_CONSTANT": 8, "refine_depth": [1, 1, 1]}),
}
ODD = (None, "", "x", [], {}, [None], {"a": 1}, [{}], True, False, -1, 0, 1, 2, 3, 7, 64, 0.0, 0.5, 1.5, -0.1, 1e-4,
       "1e-4", 1e308, float("inf"), float("-inf"), float("nan"), 10**20, -10**20, [1, 2], [1, 2, 3], [[1]], [0.5, 1.5],
       "auto", "off", "none", "../../x", "/", "~", "true", "\N{GREEK SMALL LETTER ALPHA}", "a b", "a" * 3000, [1] * 300)


def experiment(rng: random.Random) -> dict:
    """A sound experiment of a random decoder."""
    name = rng.choice(list(MODELS))
    backbone, backbone_kwargs, model_kwargs = MODELS[name]
    return yaml.safe_load(yaml.safe_dump({**COMMON, "model": name, "backbone": backbone, "model_kwargs": model_kwargs,
                                          "backbone_kwargs": backbone_kwargs}))


def change(values: dict, rng: random.Random) -> None:
    """One change of values, in place: an odd value, a number further off, another name, an option more, one less."""
    group, key = rng.choice(list(_leaves(values)))
    kind = rng.randrange(6)
    if kind == 0:
        group[key] = rng.choice(ODD)
    elif kind == 1:
        group[key] = _near(group[key], rng)
    elif kind == 2:
        field = rng.choice([f for f in fields(Config) if "table" in f.metadata])
        values[field.name] = rng.choice([*field.metadata["table"], "nothing"])
    elif kind == 3:
        name, options = rng.choice(list(_options(values)))
        new = rng.choice([f.name for f in fields(options)] or ["nothing"])
        if isinstance(values.setdefault(name, {}), dict):
            values[name][new] = rng.choice([*ODD, 1, 2, 4, 8, 0.1, True, False])
    elif kind == 4:
        values[rng.choice([f.name for f in fields(Config)])] = rng.choice(ODD)
    else:
        del group[key]


def _leaves(values: dict) -> list[tuple[dict, str]]:
    own = [(values, key) for key in values]
    return own + [leaf for value in values.values() if isinstance(value, dict) for leaf in _leaves(value)]


def _near(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice([value + 1, value - 1, value * 2, value // 2, -value, value * 3, value / 2, value * 1e3])
    if isinstance(value, list) and value:
        near = [_near(item, rng) for item in value]
        return rng.choice([value[:-1], [*value, value[-1]], value[::-1], near, value[0]])
    return rng.choice([str(value).upper(), f"{value}x", [value], value])


def _options(values: dict) -> list[tuple[str, type]]:
    found = []
    for f in fields(Config):
        if "options_of" in f.metadata:
            named = next(g for g in fields(Config) if g.name == f.metadata["options_of"])
            table: Table = named.metadata["table"]
            name = values.get(named.name, named.default)
            found += [(f.name, table.options(name))] if isinstance(name, str) and name in table else []
    return found


def damage(text: str, rng: random.Random) -> str:
    """One change of the text."""
    lines = text.splitlines()
    place = rng.randrange(len(lines))
    spot = rng.randrange(len(text))
    bomb = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9) if i else 1}]\n" for i in range(rng.randrange(2, 12)))
    return rng.choice([
        lambda: "\n".join([*lines[:place], lines[place], *lines[place:]]),               # a line twice
        lambda: "\n".join([*lines[:place], *lines[place + 1:]]),
        lambda: text[:spot] + rng.choice("[]{}:,&*!|>'\"%@`#?-\t\x00\x07\u2028\ud7ff ") + text[spot:],
        lambda: text[:spot] + text[spot + 1:],
        lambda: text[:spot],
        lambda: text + bomb,
        lambda: text + "loop: &loop [*loop]\n",
        lambda: text + "deep: " + "[" * rng.randrange(1, 3000) + "\n",
        lambda: text + "".join(" " * i + f"g{i}:\n" for i in range(rng.randrange(1, 200))),
        lambda: text.replace(": ", rng.choice([": !!int ", ": !!python/object:os.system ", ": !!float ", ": &a ",
                                               ": *a ", ": !!binary ", ": 2026-99-99 #"]), rng.randrange(1, 3)),
        lambda: text + rng.choice(["_base_: x.yml\n", "_base_: [fuzz.yml]\n", "_base_: 3\n", "<<: {max_iter: 3}\n",
                                   "<<: [1]\n", "? [a]\n: b\n", "1: 2\n", "null: 2\n", "---\na: 1\n", "max_iter:\n",
                                   "seed: " + "9" * 5000 + "\n", "seed: 0x\n", "seed: 1:30\n", "x: {}\n" * 5000]),
        lambda: rng.choice(["", "3", "[]", "- a\n", "# nothing\n", "'", "\ufeff" + text, text * 2, text * 400]),
    ])()


def fuzzed(seed: int, number: int) -> str:
    """The text of file `number`."""
    rng = random.Random(f"{seed}/{number}")
    values = experiment(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change(values, rng)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return damage(text, rng) if rng.random() < 0.4 else text


def read(path: Path) -> tuple[str, str]:
    """What comes of reading a file: ("accepted" | "refused" | "traceback", words)."""
    try:
        load_config(path)
    except (ConfigError, OSError) as error:
        clear = len(str(error).splitlines()) == 1 and "fuzz" in str(error) and len(str(error)) < 1000
        return ("refused", str(error)) if clear else ("traceback", f"unclear: {error}")
    except Exception as error:      # noqa: BLE001 (whatever else it may be is what this script looks for)
        return "traceback", f"{type(error).__name__}: {traceback.format_exc().splitlines()[-1]}"
    return "accepted", ""


def _address_space() -> int:
    """Bytes of addresses that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _train(path: Path, folder: Path, pipe: Any) -> None:
    """In a process of its own: the run, cut to one update, its evaluation and its checkpoint."""
    from utils.engine import train as engine
    limit = _address_space() + TRAIN_BYTES              # a fork begins with the addresses of its parent
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    prepare = engine.prepare

    def prepare_one_update(*arguments: Any) -> Any:
        run = prepare(*arguments)
        run.total_steps = min(run.total_steps, 1)
        return run

    engine.prepare = prepare_one_update
    sys.stdout = sys.stderr = open("/dev/null", "w")    # noqa: SIM115 (until the process ends)
    try:
        engine.train(load_config(path, [f"db_root={folder / 'data'}", f"out_dir={folder / 'runs'}", "device=cpu",
                                        f"version_name={path.stem}"]), False)
        pipe.send(("trained", ""))
    except Exception as error:
        sentence = sentence_of(error)
        pipe.send(("refused", sentence) if sentence else ("traceback", traceback.format_exc()[-1500:]))


def train_one(path: Path, folder: Path) -> tuple[str, str]:
    """What comes of one update: ("trained" | "refused" | "traceback" | "too long", words)."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(path, folder, its))
    process.start()
    its.close()
    try:
        if not mine.poll(TRAIN_SECONDS):
            return "too long", f"more than {TRAIN_SECONDS} s"
        return mine.recv()
    except EOFError:
        return "traceback", "the process died"
    finally:
        process.kill()
        process.join()


def _interrupt(signum: int, frame: Any) -> None:
    raise TimeoutError(f"more than {5 * READ_SECONDS:g} s")


def campaign(files: int, train: int, seed: int, first: int) -> int:
    """Reads `files` files, trains `train` of those accepted; prints a table and what failed."""
    counts, accepted, failures, slowest = Counter(), [], [], (0.0, -1)
    signal.signal(signal.SIGALRM, _interrupt)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(first, first + files):
            path = folder / f"fuzz_{number}.yml"
            path.write_text(fuzzed(seed, number), encoding="utf-8", errors="surrogatepass")
            start = time.process_time()
            signal.alarm(int(5 * READ_SECONDS))
            outcome, words = read(path)
            signal.alarm(0)
            took = time.process_time() - start
            slowest = max(slowest, (took, number))
            outcome = "too long" if took > READ_SECONDS else outcome
            counts[outcome] += 1
            accepted += [path] if outcome == "accepted" else []
            failures += [(number, outcome, words)] if outcome in ("traceback", "too long") else []
        print(f"read {files}: {dict(counts)}; slowest {slowest[0]:.2f} s (file {slowest[1]})", flush=True)
        if train:
            failures += _train_some(random.Random(seed).sample(accepted, min(train, len(accepted))), folder)
    for number, outcome, words in failures:
        print(f"\nfile {number} of seed {seed}: {outcome}\n{words}")
    return int(bool(failures))


def _train_some(paths: list[Path], folder: Path) -> list[tuple[int, str, str]]:
    import utils.engine.train  # noqa: F401 (once, for all processes to come)
    from scripts.example_data.write import write_example
    write_example(folder / "data", num_train=12, num_val=2, size=(64, 96), seed=0, workers=1, progress=False)
    counts, failures, refusals = Counter(), [], Counter()
    for path in paths:
        number = int(path.stem.removeprefix("fuzz_"))
        outcome, words = train_one(path, folder)
        counts[outcome] += 1
        if outcome == "refused":
            refusals[words[:160]] += 1
        elif outcome != "trained":
            failures.append((number, outcome, words))
    print(f"trained one update of {len(paths)} accepted ones: {dict(counts)}")
    for words, count in refusals.most_common():
        print(f"  {count} x {words}")
    return failures


main = Command(__doc__, campaign, {
    "--files": dict(type=int, default=10000, help="how many files to read"),
    "--train": dict(type=int, default=0, help="how many of the accepted ones to build and train for one update"),
    "--seed": dict(type=int, default=0, help="of the changes"),
    "--first": dict(type=int, default=0, help="number of the first file"),
})

if __name__ == "__main__":
    sys.exit(main())
