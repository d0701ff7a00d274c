"""`python -m hallulib ...`: thin, no logic. Errors that a reader can act on stay plain words."""

import sys
from importlib import import_module
from typing import Annotated

import typer
import yaml

from hallulib.errors import HallulibError, RecipeError
from hallulib.files import display_path, resolve_path, write_text_atomic
from hallulib.recipe import load_recipe, name_nearest, parse_set
from hallulib.run import MANIFEST, Run
from hallulib.stages import STAGES

HELP = "A course you can run: teach a language model not to invent facts."
app = typer.Typer(
    help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

Name = Annotated[str, typer.Option(help="Name of a recipe, or the path of your own YAML.")]
Folder = Annotated[str, typer.Option(help="Run folder; default: outputs/<recipe>.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Change the recipe: dpo.beta=0.2. Repeatable.")
]


@app.command()
def course(
    recipe: Name = "tiny-cpu",
    run_dir: Folder = "",
    set_: Settings = None,
    from_: Annotated[str, typer.Option("--from", help="Start at this notebook, as 04.")] = "",
    only: Annotated[str, typer.Option(help="Run only this notebook, as 06.")] = "",
    force: Annotated[bool, typer.Option(help="Run again even what is unchanged.")] = False,
) -> None:
    """Run the notebooks in order; what is unchanged is skipped, what failed is continued."""
    from hallulib.course import run_course

    overrides = parse_set(set_)
    run_course(recipe, run_dir, overrides, from_notebook=from_, only=only, force=force)


@app.command("run-stage")
def run_stage(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(STAGES)}.")],
    recipe: Name = "tiny-cpu",
    run_dir: Folder = "",
    set_: Settings = None,
    force: Annotated[bool, typer.Option(help="Run it even if unchanged, or too large.")] = False,
) -> None:
    """Run one stage without its notebook (also under `accelerate launch -m hallulib`)."""
    if name not in STAGES:
        what = f"There is no stage '{name}'." + name_nearest(name, list(STAGES))
        raise RecipeError(what, f"Use one of {', '.join(STAGES)}.")
    effective = load_recipe(recipe, parse_set(set_))
    run = Run.open(run_dir, effective)
    if force:
        run.forget(name)
    if name in ("sft", "pairs", "reference", "dpo") and not run.is_current(name, effective):
        import_module("hallulib.memory").check_fits(effective, run, name, force)
    module, function = STAGES[name].door.split(":")
    getattr(import_module(f"hallulib.{module}"), function)(effective, run)
    print(f"{name}: finished in {display_path(run.root)}")


@app.command()
def assess(
    recipe: Name = "tiny-cpu",
    run_dir: Folder = "",
    set_: Settings = None,
    port: Annotated[int, typer.Option(help="Port on this computer.")] = 8866,
) -> None:
    """Serve the assessment to people who should not see code (--set assessment.assessor=dana)."""
    from hallulib.assessment.serve import serve_assessment

    overrides = parse_set(set_)
    effective = load_recipe(recipe, overrides)
    serve_assessment(Run.open(run_dir, effective), effective, overrides, port)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Hub id or folder; default: the recipe's.")] = "",
    gpu: Annotated[str, typer.Option(help="Name or size, as 12GB; default: the one here.")] = "",
    data: Annotated[str, typer.Option(help="Run folder, or its data/audit.json.")] = "",
    recipe: Name = "llama3-8b-12gb",
    out: Annotated[str, typer.Option(help="Where to write the recipe that fits.")] = "",
) -> None:
    """Print what fits on a card and what it needs; write it as a recipe."""
    from hallulib.memory.budget import plan_training

    text, planned = plan_training(model, gpu, data, recipe)
    print(text)
    if out:
        values = planned.model_dump(mode="json", exclude={"name"})  # that is the file's own
        write_text_atomic(resolve_path(out), yaml.safe_dump(values, sort_keys=False))
        print(f"Recipe written to {display_path(resolve_path(out))}")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A data set: mts-dialog.")],
    from_: Annotated[str, typer.Option("--from", help="A folder with a copy; no network.")] = "",
) -> None:
    """Lay real text in data/external/, with its licence; every file's checksum is checked."""
    from hallulib.data.fetch import fetch_data

    print("\n".join(fetch_data(name, from_)))


@app.command()
def runs() -> None:
    """List the runs in outputs/ with their headline."""
    from hallulib.report import read_headline

    folders = sorted(path.parent for path in resolve_path("outputs").glob(f"*/{MANIFEST}"))
    if not folders:
        print("No runs yet.")
    for folder in folders:
        try:
            headline = read_headline(Run(folder))
            found = "not evaluated yet" if headline.empty else headline.to_string()
        except (ValueError, KeyError) as error:  # a damaged one does not hide the others
            found = f"unreadable ({error!r}): run notebook 06_evaluation again"
        print(f"{folder.name}\n{found}\n")


@app.command()
def compare(a: str, b: str) -> None:
    """Print two runs side by side: recipe differences, results, cost."""
    from hallulib.report import compare_runs, find_run

    print(compare_runs(find_run(a), find_run(b)).to_string(max_colwidth=40))


@app.command()
def gallery(run: Annotated[str, typer.Argument(help="A run.")] = "tiny-cpu") -> None:
    """Copy the executed notebooks of a finished run to outputs/gallery, stamped."""
    from hallulib.course import publish_gallery
    from hallulib.report import find_run

    print(*map(display_path, publish_gallery(find_run(run))), sep="\n")


@app.command("recipe")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Name of a recipe, or a path.")] = "tiny-cpu",
    set_: Settings = None,
) -> None:
    """Print a recipe with every setting, as it will be used."""
    effective = load_recipe(name, parse_set(set_)).to_dict()
    print(yaml.safe_dump(effective, sort_keys=False, allow_unicode=True), end="")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a reader can act on ends in plain words and with status 2."""
    try:
        app(arguments)
    except (HallulibError, OSError) as error:
        print(f"\nError: {error}", file=sys.stderr)
        sys.exit(2)
