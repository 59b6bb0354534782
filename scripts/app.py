"""The demo page: pictures in the browser, what the networks say of them beside each other.

    pip install -r requirements-demo.txt
    python scripts/app.py --trained_model runs/bim_nyud
    python scripts/app.py --trained_model runs/bim_nyud runs/mtmamba_nyud --examples photos/

Opens on this machine alone, http://127.0.0.1:7860; --host 0.0.0.0 shows it to the network, to anybody in it. Each
--trained_model is what `predict` takes. Nothing is sent anywhere else, and pictures are deleted after an hour.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import load_model
from scripts.command_line import Command
from utils.engine.inputs import find_inputs

MOST_EXAMPLES = 12


def serve(trained_model: Sequence[str], examples: Sequence[str], host: str, port: int, device: str) -> None:
    """Loads the networks and serves the page until Ctrl-C."""
    try:
        from scripts.demo_page.page import build_page, launch
    except ImportError as error:
        raise ValueError(f"the demo page needs gradio ({error}); pip install -r requirements-demo.txt") from error
    given = list(dict.fromkeys(name.rstrip("/") for name in trained_model))
    short = [Path(name).name for name in given]
    models = {name if short.count(name) == 1 else path: load_model(path, device)
              for name, path in zip(short, given, strict=True)}
    for model in models.values():
        print(model)
    pictures = [str(path) for path in find_inputs(examples)][:MOST_EXAMPLES] if examples else []
    launch(build_page(models, pictures), host, port, [str(Path(path).resolve().parent) for path in pictures])


main = Command(__doc__, serve, {
    "--trained_model": dict(nargs="+", required=True, metavar="CKPT", help="checkpoints, folders of runs, Hub names"),
    "--examples": dict(nargs="+", default=(), metavar="PATH", help="pictures, or folders of them, to pick from"),
    "--host": dict(default="127.0.0.1", metavar="ADDRESS", help="who may open the page; default: this machine"),
    "--port": dict(type=int, default=7860, help="of the address"),
    "--device": dict(default="auto", help="auto, cpu, cuda or cuda:N"),
})

if __name__ == "__main__":
    sys.exit(main())
