"""Every command that README and docs/ print: understood by its program, and run on small data, here or by a named test.

Trainings are run with a small network (`SMALL`) on the rendered images, everything else as it is printed, in a folder
that holds what a reader would have (`home`). A command that several pages print is run once.
"""

import importlib
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

import main
from evaluation.boundary.__main__ import parse_arguments as boundary_arguments
from scripts.check_export import SMALL as OF_DECODER
from scripts.command_line import Command
from tests.conftest import TINY
from tests.docs_commands import PAGES, commands, unmarked, words_of
from tests.shared import ROOT
from utils.engine.arguments import parse_arguments
from utils.engine.config import load_config

COMMANDS = {" ".join(words): words for words, pages in commands().items() if pages != ["docs/coming_from.md"]}
OF_READERS = ("street.yml", "nyud_vitLp16_MLoRE.yml", "optimizer=rmsprop")     # what they make, or have

# Commands that other tests run: what stands in them -> the test. The first that fits counts.
ELSEWHERE = {
    r"main\.py$|--help|--completion|source /dev/fd": "test_terminal.py::test_without_arguments_there_is_an_overview",
    r"street\.yml|runs/street|check_data\.py street": "test_own_data.py::test_the_tutorial_as_it_is_printed",
    r"configs/photos|runs/boundaries": "test_photos.py::test_one_training_mixes_all_four",
    r"nyud_vitLp16": "test_official_files.py::test_the_command_lines_of_the_originals_are_accepted",
    r"checkpoint\.pth\.tar": "test_invpt.py::test_a_released_checkpoint_loads_as_it_is",
    r"cityscapes": "test_det3d.py::test_a_run_from_files_to_files",
    r"camera:0": "test_video.py::test_a_camera_is_recorded_in_its_own_time",
    r"--run_mode export .*onnx|run_onnx": "test_export.py::test_onnx_says_what_it_is_and_predicts_without_this_program",
    r"--run_mode export .*torch_export": "test_export.py::test_torch_export_is_read_without_this_program",
    r"--run_mode export .*safetensors": "test_export.py::test_safetensors_hold_the_experiment_too",
    r"--dry_run": "test_dry_run.py::test_a_rehearsal_says_what_the_run_will_need_and_leaves_nothing",
    r"dinov2_base|timm:convnext": "test_timm.py::test_every_decoder_runs_on_every_family",
    r"compile=true": "test_training_step.py::test_compile_trains_and_keeps_the_names_of_the_weights",
    r"parallel=fsdp": "test_sharded.py::test_either_goes_on_from_the_checkpoint_of_the_other",
    r"data_cache": "test_data_cache.py::test_a_data_set_gives_the_same_samples",
    r"lora\.rank": "test_lora.py::test_a_run_saves_what_is_trained_and_goes_on_bit_for_bit",
    r"optimizer=rmsprop": "test_doors.py::test_optimizer",
    r"evaluation\.boundary": "test_boundary_tool.py::test_the_tool_sums_what_image_counts_gives",
    r"scripts/(demo|setup|test)\.sh|source \.venv": "test_launch.py::test_the_shell_finds_no_mistake",
    r"pretrained|download_pretrained|run\.sh": "test_coming_from.py::test_run_sh_fetches_and_checks",
    r"scripts/compare\.py": "test_compare.py::test_the_page_pairs_the_same_images",
    r"scripts/delta_m\.py": "test_delta_m.py::test_gain_by_hand",
    r"scripts/fair_table\.py": "test_fair_table.py::test_a_suite_is_run_recorded_and_written_up",
    r"prepare_data\.py list": "test_prepare_data.py::test_the_list_names_sources_and_terms",
    r"prepare_data\.py": "test_prepare_data.py::test_nyu_from_its_container",
    r"check_data\.py": "test_data_check.py::test_a_good_folder",
    r"render_example\.py": "test_example_files.py::test_all_layouts_are_complete_and_typed",
    r"check_parity\.py": "test_parity.py::test_everything_agrees",
    r"draw_models|model_pages": "test_model_pages.py::test_the_figure_is_that_of_the_built_network",
    r"combinations\.py": "test_combinations.py::test_the_page_shows_what_can_be_combined",
    r"draw_architecture": "test_architecture.py::test_the_picture_is_that_of_the_imports",
    r"mkdocs": "test_site.py::test_every_page_is_there_and_needs_no_network",
    r"scripts/app\.py": "test_demo_page.py::test_the_page_shows_and_tells",
    r"gpu_check\.py": "test_gpu_check.py::test_every_step_runs",
    r"layer_values\.py": "test_layer_values.py::",
    r"fuzz\.py": "test_strict_yaml.py::",
    r"mutation_sample": "test_mutation_sample.py::test_a_run_judges_resumes_and_leaves_the_tree_alone",
    r"bench_scan\.py|scan_cost\.py": "test_scan_bench.py::test_one_scan",
    r"sbatch": "test_launch.py::test_an_array_is_one_experiment_with_other_seeds",
    r"benchmark\.py": "test_benchmark.py::test_parameters_and_multiply_adds",
    r"check_export": "test_export.py::test_a_scan_over_maps_of_any_size_in_onnx",
}
# Commands that no test runs, and why.
NOT_RUN = {
    r"^pip install": "installs packages", r"^tensorboard": "waits for a reader", r"pytest|^cd ": "no command of ours",
    r"cuda_graph": "needs a GPU",
    r"bench_(predict|data|boundary|guards)\.py|damaged_files|compare_balancing": "measures for minutes",
}


def home_of(line: str) -> str | None:
    """The test that runs a command, or why none does; None: it is run here."""
    for pattern, where in (*ELSEWHERE.items(), *NOT_RUN.items()):
        if re.search(pattern, line):
            return where
    return None


HERE = [line for line in COMMANDS
        if home_of(line) is None and re.match(r"python (main|scripts/average_checkpoints)\.py", line)]


def test_there_are_commands_and_blocks_of_them_say_so():
    assert len(COMMANDS) > 100 and len(HERE) > 20
    homeless = [line for line in COMMANDS if line not in HERE and home_of(line) is None]
    assert not homeless, f"say in ELSEWHERE which test runs it, or in NOT_RUN why none does: {homeless}"
    assert [(page.name, block) for page in PAGES for block in unmarked(page)] == []


def test_a_shell_reads_them():
    script = 'for s in a{1,2} "b c"; do python main.py "x=$s"; done  # none\nuntil torchrun -n 2 main.py; do :; done'
    assert words_of(script) == [("python", "main.py", "x=a1"), ("python", "main.py", "x=a2"),
                                ("python", "main.py", "x=b c"), ("torchrun", "-n", "2", "main.py")]
    for wrong in ("python 'main.py", "pyhton main.py"):
        with pytest.raises(ValueError, match="bash says"):
            words_of(wrong)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in HERE])
def test_it_is_understood(line, monkeypatch):
    """What is not run here has arguments that its program takes, and keys and values that an experiment may have."""
    monkeypatch.chdir(ROOT)
    program, *words = COMMANDS[line]
    script = words[0] if words else ""
    if program in ("bash", "sbatch"):
        script = next(word for word in words if word.endswith(".sh"))
        assert (ROOT / script).is_file() or (ROOT / "pretrained_ckpts" / script).is_file()
        words = words[words.index(script):]
    if script.endswith("main.py") or program == "sbatch":
        understood_by_main(words[1:])
    elif script.endswith(".py"):
        command = getattr(importlib.import_module(script.removesuffix(".py").replace("/", ".")), "main", None)
        if isinstance(command, Command):
            command.parser.parse_intermixed_args(words[1:] if "/" in script else [])
    elif words[:2] == ["-m", "evaluation.boundary"] and words[2:]:
        boundary_arguments(words[2:])


def understood_by_main(words: list[str]) -> None:
    if not words or words[0].startswith(("--help", "--completion")):
        with pytest.raises(SystemExit) as end:
            parse_arguments(words, None)
        assert end.value.code == (2 if not words else 0)
        return
    args = parse_arguments(words, None)
    if args.config_exp is not None and not set(OF_READERS) & set(words):
        assert load_config(args.config_exp, args.overrides)


@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_the_test_that_runs_it_is_there(pattern):
    file, _, name = ELSEWHERE[pattern].partition("::")
    assert f"def {name or 'test_'}" in (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert any(re.search(pattern, line) for line in COMMANDS), f"no command is meant by {pattern}"


@pytest.fixture(scope="module")
def home(tmp_path_factory, example_root) -> Path:
    """Where a reader types: the repository's folders, photographs, a film, and what was trained before."""
    home = tmp_path_factory.mktemp("home")
    for name in ("configs", "docs"):
        (home / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for name in ("photo.jpg", "photos/a.jpg", "more/far/b.jpg", "listed.png"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(home / name), rng.integers(0, 256, (48, 72, 3)).astype(np.uint8))
    (home / "list.txt").write_text("listed.png\n")
    film = cv2.VideoWriter(str(home / "film.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25, (72, 48))
    for _ in range(2):
        film.write(rng.integers(0, 256, (48, 72, 3)).astype(np.uint8))
    film.release()
    return home


def small(args, example_root: Path) -> list[str]:
    """What makes a printed training one of a moment; beside an earlier run of that name, unless it goes on with it."""
    config = load_config(args.config_exp, args.overrides)
    given = {word.partition("=")[0] for word in args.overrides}
    kept = [word for word in TINY if word.partition("=")[0] not in given]
    if config.model != "bim":
        backbone, of_backbone, of_model = OF_DECODER[config.model]
        kept = [word for word in kept if not word.startswith(("backbone", "model_kwargs"))]
        kept += [f"backbone={backbone}", "backbone_kwargs=null", of_backbone, "model_kwargs=null",
                 f"model_kwargs={of_model}", "image_size=[64, 128]"]
    elif config.neck != "none":
        kept += ["neck=none", "neck_kwargs=null"]
    again = config.run_dir.exists() and not args.resume and config.resume == "never"
    return [*kept, f"db_root={example_root}", "scheduler_kwargs.warmup_iters=0", "max_iter=1", "val_interval=1",
            "boundary_eval=off", "eval_at_start=false",
            *([f"out_dir=more/{len(list(Path('more').iterdir()))}"] if again else [])]


def test_they_run(home, example_root, monkeypatch, capsys):
    """In the order of the pages, each once."""
    monkeypatch.chdir(home)
    for line in HERE:
        _, script, *words = COMMANDS[line]
        if script.startswith("scripts/"):
            for path in (Path(word) for word in words if re.search(r"/step_\d+\.pt$", word)):
                shutil.copy(path.with_name("last.pt"), path)             # as a longer training would leave them
            command = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
            assert command(words) == 0, (line, capsys.readouterr().err)
            continue
        args = parse_arguments(words, None)
        more = small(args, example_root) if args.run_mode == "train" else [f"db_root={example_root}"]
        monkeypatch.setattr("sys.argv", ["main.py", *words, *more])
        try:
            main.main()
        except SystemExit as end:
            raise AssertionError(f"{line}: {end}") from end
    assert len(list((home / "runs").glob("*/last.pt"))) > 8 and (home / "out" / "predictions.jsonl").is_file()
