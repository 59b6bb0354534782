"""The page itself, of gradio's parts."""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from scripts.demo_page.relief import write_relief
from scripts.demo_page.showing import over_photograph, pack, size_shown, value_at
from utils.engine.prediction import Prediction
from utils.engine.predictor import Predictor
from utils.engine.report.page import KEY_STYLE, swatches
from utils.engine.tasks import TASKS

HOUR = 3600             # seconds after which pictures and results are deleted
SYSTEM = ["system-ui", "sans-serif"]            # fonts that need no network
DARK_ON_LIGHT = {f"{name}{mode}": colour for name in ("block_label_text_color", "block_title_text_color")
                 for mode, colour in (("", "*neutral_800"), ("_dark", "*neutral_100"))}
DARK_ON_LIGHT |= dict.fromkeys(("button_primary_background_fill", "checkbox_label_background_fill_selected"),
                               "*primary_700")
DARK_ON_LIGHT |= {"body_text_color_subdued": "*neutral_600"}
# Babylon.js, which draws the surface, puts its canvas first in the order of the tab key; it belongs where it stands.
TAB_ORDER = """<script>
const last = () => document.querySelectorAll('canvas[tabindex="1"]').forEach((canvas) => { canvas.tabIndex = 0; });
new MutationObserver(last).observe(
  document, { childList: true, subtree: true, attributes: true, attributeFilter: ["tabindex"] });
</script>"""
# gradio tells where a picture is clicked, not where the mouse is: a mouse over a result clicks there when it rests.
UNDER_CURSOR = """<script>
let due = null;
document.addEventListener("mousemove", ({ target, clientX, clientY }) => {
  clearTimeout(due);
  const picture = target.closest && target.closest(".result img");
  const there = { bubbles: true, clientX, clientY };
  if (picture) due = setTimeout(() => picture.dispatchEvent(new MouseEvent("click", there)), 60);
});
</script>"""
# What is read there stays in sight however far down the page its own place is; gradio's container would not let it.
IN_SIGHT = """<style>
.gradio-container { overflow: clip !important; }
.block.value { position: sticky !important; bottom: 0; z-index: 100; }
.block.value { background: var(--body-background-fill) !important; }
.block.value .prose { padding: 4px 8px; }
</style>"""
KEY = f"<style>\n{KEY_STYLE.read_text(encoding='ascii')}</style>"
TOUCH = "Move over a picture, or touch it, to read the values there."


class Shown:
    """The widgets of one network: a picture per task and its colours, the values at a place, a surface, a file."""

    def __init__(self, name: str, model: Predictor):
        self.name, self.model = name, model
        with gr.Column(min_width=320):
            gr.Markdown(f"## {name}\n{model.config.model} on {model.config.backbone}, {model.selection}")
            self.pictures, self.keys = {}, {}
            with gr.Row():
                for task in model.tasks:
                    with gr.Column(min_width=480):
                        self.pictures[task] = gr.Image(
                            label=task, interactive=False, format="png", elem_classes="result",
                            alt_text=f"{task} by {name}", buttons=["download", "fullscreen"])  # and none that shares it
                        self.keys[task] = gr.HTML()
            self.value = gr.Markdown(TOUCH, elem_classes="value")
            # Of networks that predict metres. Never hidden at first: gradio does not draw what it shows later.
            metres = any(TASKS.load(task).view.unit_of(context) == "m" for task, context in model.contexts.items())
            self.surface = gr.Model3D(label="depth, from another side", height=360) if metres else None
            self.file = gr.DownloadButton("Raw results (zip)", interactive=False)


def build_page(models: Mapping[str, Predictor], examples: Sequence[str]) -> gr.Blocks:
    """A column per network under one picture and its switches."""
    tasks = list(dict.fromkeys(task for model in models.values() for task in model.tasks))
    scratch = Scratch()
    with gr.Blocks(title="Dense predictions", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown("# What the networks see\nA photograph in, every task out. It stays on this machine.")
        predictions = gr.State({}, time_to_live=HOUR)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                picture = gr.Image(label="photograph", type="filepath", image_mode=None,
                                   sources=["upload", "webcam", "clipboard"], elem_id="photograph")
                if examples:
                    gr.Examples([[path] for path in examples], [picture],
                                example_labels=[Path(path).stem for path in examples])
                start = gr.Button("Predict", variant="primary", elem_id="start")
            with gr.Column(scale=1, min_width=320):
                wanted = gr.CheckboxGroup(tasks, value=tasks, label="tasks")
                opacity = gr.Slider(0, 1, 1.0, step=0.05, label="opacity over the photograph")
                threshold = gr.Slider(0, 1, 0.0, step=0.01, label="threshold of probabilities (0: as they are)")
                view = gr.Slider(20, 120, 60, step=1, label="field of view of the camera for the surface, degrees")
        with gr.Row():
            shown = [Shown(name, model) for name, model in models.items()]
        painted = [widget for one in shown for part in (one.pictures, one.keys) for widget in part.values()]
        in_space = [one for one in shown if one.surface is not None]
        surfaces, files = [one.surface for one in in_space], [one.file for one in shown]
        settings = [wanted, opacity, threshold]
        start.click(partial(_predict, models, scratch), [picture], [predictions, *files]).then(
            partial(_paint, shown), [predictions, *settings], painted).then(
            partial(_surfaces, in_space, scratch), [predictions, view], surfaces)
        # Not `release`, which is the mouse's alone: the arrow keys move a slider too.
        for setting in settings:
            setting.change(partial(_paint, shown), [predictions, *settings], painted, trigger_mode="always_last")
        view.change(partial(_surfaces, in_space, scratch), [predictions, view], surfaces, trigger_mode="always_last")
        for one in shown:
            for widget in one.pictures.values():
                widget.select(_values(one.name), [predictions], [one.value], show_progress="hidden",
                              trigger_mode="always_last")
    return page


def launch(page: gr.Blocks, host: str, port: int, folders: Sequence[str]) -> None:
    """Serves the page; `folders` hold the examples."""
    print(f"http://{host}:{port}   Ctrl-C ends", flush=True)
    theme = gr.themes.Soft(font=SYSTEM, font_mono=["ui-monospace", "monospace"]).set(**DARK_ON_LIGHT)
    page.launch(server_name=host, server_port=port, allowed_paths=list(folders), theme=theme, footer_links=[],
                share=False, show_error=True, quiet=True, head=TAB_ORDER + UNDER_CURSOR + IN_SIGHT + KEY)


def _predict(models: Mapping[str, Predictor], scratch: "Scratch", path: str | None) -> list[Any]:
    """The predictions of all networks, and their files for the download buttons."""
    if path is None:
        raise gr.Error("Choose a photograph first.", print_exception=False)
    found: dict[str, Prediction] = {}
    for name, model in models.items():
        try:
            found[name] = model.predict(path)
        except (ValueError, OSError) as error:
            raise gr.Error(f"{error}", print_exception=False) from error
    files = []
    for number, prediction in enumerate(found.values()):
        packed = pack(prediction, scratch.folder(), f"{Path(path).stem}_{number}")
        files.append(gr.DownloadButton(value=str(packed), interactive=True))
    return [found, *files]


def _paint(shown: Sequence[Shown], predictions: Mapping[str, Prediction], wanted: Sequence[str], opacity: float,
           threshold: float) -> list[Any]:
    """Every picture again, and what its colours mean; those of tasks that are not wanted hidden."""
    painted = []
    for one in shown:
        pictures, keys = [], []
        for task in one.pictures:
            result = predictions.get(one.name, {}).get(task)
            image = None if result is None else over_photograph(result, predictions[one.name].image, opacity, threshold)
            key = "" if result is None else swatches(f"colours of {task} by {one.name}", result.legend())
            pictures.append(gr.Image(value=image, visible=task in wanted))
            keys.append(gr.HTML(value=key, visible=task in wanted))
        painted += pictures + keys
    return painted


def _surfaces(shown: Sequence[Shown], scratch: "Scratch", predictions: Mapping[str, Prediction], view: float) -> Any:
    """The depths in space, of networks that predict metres."""
    made = [write_relief(predictions[one.name], view, scratch.folder() / "surface.glb") if one.name in predictions
            else None for one in shown]
    files = [file and str(file) for file in made]
    return files if len(files) != 1 else files[0]


def _values(name: str) -> Callable[..., str]:
    """Says what all tasks of this network predict where one of its pictures is touched."""
    def say(predictions: Mapping[str, Prediction], event: gr.SelectData) -> str:
        if name not in predictions:
            return TOUCH
        painted = size_shown(predictions[name].image)
        x, y = ((at + 0.5) / side for at, side in zip(event.index, painted, strict=True))
        return "\n".join(f"- {value_at(result, x, y)}" for result in predictions[name].values())
    return say


class Scratch:
    """Folders for files on their way to the browser; gradio copies them into its own. Removed after an hour."""

    def __init__(self) -> None:
        self.root = tempfile.TemporaryDirectory(prefix="mtdp_page_")

    def folder(self) -> Path:
        for old in Path(self.root.name).iterdir():
            if time.time() - old.stat().st_mtime > HOUR:
                shutil.rmtree(old, ignore_errors=True)          # another call may be at it
        return Path(tempfile.mkdtemp(dir=self.root.name))
