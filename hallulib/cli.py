"""`python -m hallulib ...`: thin, no logic. Errors of ours are printed in plain words."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated

import typer
import yaml

from hallulib.errors import HallulibError, RecipeError
from hallulib.files import display_path, resolve_path, write_text_atomic
from hallulib.recipe import load_recipe, nearest, parse_set
from hallulib.run import Run, find_run, list_runs

app = typer.Typer(
    help="A course you can run: teach a language model not to invent facts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeOption = Annotated[str, typer.Option(help="Name of a recipe, or the path of your own YAML.")]
RunDirOption = Annotated[
    str, typer.Option(help="Run folder, relative to the project; default: outputs/<recipe>.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change the recipe: dpo.beta=0.2. Repeatable.")
]

# Where each stage's function lives. Named here, imported when asked for: torch takes seconds.
STAGE_FUNCTIONS = {
    "data": "hallulib.data:prepare_data",
    "sft": "hallulib.sft:train_sft",
    "memory": "hallulib.memory:predict_budget",
    "pairs": "hallulib.dpo:build_pairs",
    "reference": "hallulib.dpo.reference:cache_reference",
    "dpo": "hallulib.dpo.train:train_dpo",
    "comparison": "hallulib.dpo.arms:train_comparison_arms",
    "evaluation": "hallulib.evaluation:evaluate_systems",
    "assessment": "hallulib.assessment:analyse_assessment",
}
# Those whose memory is predicted before they start.
CHECKED_STAGES = ("sft", "pairs", "reference", "dpo")


@contextmanager
def continuable() -> Iterator[None]:
    """Ctrl-C ends with a plain word and the status shells expect (130)."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. What is finished is kept; the same command continues.", err=True)
        raise typer.Exit(130) from None


@app.command()
def course(
    recipe: RecipeOption = "tiny-cpu",
    run_dir: RunDirOption = "",
    set_: SetOption = None,
    from_: Annotated[str, typer.Option("--from", help="Start at this notebook, as 04.")] = "",
    only: Annotated[str, typer.Option(help="Run only this notebook, as 06.")] = "",
    force: Annotated[bool, typer.Option(help="Run again even what is unchanged.")] = False,
) -> None:
    """Run the notebooks in order; what is unchanged is skipped, what failed is continued."""
    from hallulib.course import run_course

    overrides = parse_set(set_ or [])
    with continuable():
        run_course(recipe, run_dir, overrides, from_notebook=from_, only=only, force=force)


@app.command("run-stage")
def run_stage(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(STAGE_FUNCTIONS)}.")],
    recipe: RecipeOption = "tiny-cpu",
    run_dir: RunDirOption = "",
    set_: SetOption = None,
    force: Annotated[
        bool, typer.Option(help="Run it even if unchanged, or predicted not to fit in memory.")
    ] = False,
) -> None:
    """Run one stage without its notebook (also under `accelerate launch -m hallulib`)."""
    if name not in STAGE_FUNCTIONS:
        close = nearest(name, list(STAGE_FUNCTIONS))
        hint = f" Did you mean '{close}'?" if close else ""
        raise RecipeError(
            f"There is no stage '{name}'.{hint}", f"Use one of {', '.join(STAGE_FUNCTIONS)}."
        )
    effective = load_recipe(recipe, parse_set(set_ or []))
    run = Run.open(run_dir, effective)
    if force:
        run.forget(name)
    if name in CHECKED_STAGES and not run.is_current(name, effective):
        import_module("hallulib.memory").check_fits(effective, run, name, force)
    module, function = STAGE_FUNCTIONS[name].split(":")
    with continuable():
        getattr(import_module(module), function)(effective, run)
    typer.echo(f"{name}: finished in {display_path(run.root)}")


@app.command()
def assess(
    recipe: RecipeOption = "tiny-cpu",
    run_dir: RunDirOption = "",
    set_: SetOption = None,
    port: Annotated[int, typer.Option(help="Port on this computer.")] = 8866,
) -> None:
    """Serve the assessment to people who should not see code (--set assessment.assessor=dana)."""
    from hallulib.assessment.serve import serve_assessment

    overrides = parse_set(set_ or [])
    effective = load_recipe(recipe, overrides)
    with continuable():
        serve_assessment(Run.open(run_dir, effective), effective, overrides, port)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Hub id or folder; default: the recipe's.")] = "",
    gpu: Annotated[str, typer.Option(help="Name or size, as 12GB; default: the one here.")] = "",
    data: Annotated[str, typer.Option(help="Run folder, or its data/audit.json.")] = "",
    recipe: RecipeOption = "llama3-8b-12gb",
    out: Annotated[str, typer.Option(help="Where to write the recipe that fits.")] = "",
) -> None:
    """Print what fits on a card, what it needs and how long it takes; write it as a recipe."""
    from hallulib.memory.planner import plan_training

    text, planned = plan_training(model, gpu, data, recipe)
    typer.echo(text)
    if out:
        values = planned.to_dict()
        values.pop("name")  # the file's own name
        write_text_atomic(resolve_path(out), yaml.safe_dump(values, sort_keys=False))
        typer.echo(f"Recipe written to {display_path(resolve_path(out))}")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A data set: mts-dialog.")],
    from_: Annotated[str, typer.Option("--from", help="A folder with a copy; no network.")] = "",
) -> None:
    """Lay real text in data/external/, with its licence; every file's checksum is checked."""
    from hallulib.data.fetch import fetch_data

    for line in fetch_data(name, from_):
        typer.echo(line)


@app.command()
def runs() -> None:
    """List the runs in outputs/ with their headline."""
    from hallulib.report import HEADLINE, format_table, headline_cells, read_headline

    rows = []
    for folder in list_runs():
        try:
            found = headline_cells(read_headline(folder))
        except HallulibError as error:
            found = [[f"unreadable: {error.what}", *[""] * (len(HEADLINE) - 1)]]
        empty = [["not evaluated yet", *[""] * (len(HEADLINE) - 1)]]
        rows += [[folder.name, *cells] for cells in found or empty]
    typer.echo(format_table(["run", *HEADLINE], rows) if rows else "No runs yet.")


@app.command()
def compare(a: str, b: str) -> None:
    """Print two runs side by side: recipe differences, results, cost."""
    from hallulib.report import compare_table

    typer.echo(compare_table(find_run(a), find_run(b)))


@app.command()
def gallery(run: Annotated[str, typer.Argument(help="A run.")] = "tiny-cpu") -> None:
    """Copy the executed notebooks of a finished run to outputs/gallery, stamped."""
    from hallulib.gallery import publish_gallery

    for path in publish_gallery(find_run(run)):
        typer.echo(display_path(path))


@app.command("recipe")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Name of a recipe, or a path.")] = "tiny-cpu",
    set_: SetOption = None,
) -> None:
    """Print a recipe with every setting, as it will be used."""
    effective = load_recipe(name, parse_set(set_ or [])).to_dict()
    typer.echo(yaml.safe_dump(effective, sort_keys=False, allow_unicode=True), nl=False)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; our errors end with status 1 and no traceback."""
    try:
        app(arguments)
    except HallulibError as error:
        typer.echo(f"\nError: {error}", err=True)
        sys.exit(1)
