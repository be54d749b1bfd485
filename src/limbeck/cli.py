"""The command line. Exit codes: 0 done, 1 it failed, 2 the input is wrong, 130 interrupted."""

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

# Heavy imports (torch, transformers) wait inside the commands, so that --help is quick.
from limbeck.core.errors import DataError, Interrupted, LimbeckError, ModelError, RecipeError
from limbeck.core.text import one_line

INTERRUPTED = 130

REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
"""What a system says of a place that the user may not write to, or cannot."""

PIPE_WIDTH = 5000
"""Columns where there is no terminal: rich would cut a long path at 80."""

app = typer.Typer(
    name="limbeck",
    help="Distil a large language model into a small one, and see what was kept.",
    epilog="Start with `limbeck demo`, or `limbeck init forward_kl` for a recipe of your own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override a field: train.steps=100"),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when it fails.")]


@app.command()
def methods(debug: Debug = False) -> None:
    """List what a recipe can be made of: objectives, teachers, sources, steps, evaluations ..."""
    from rich.table import Table

    from limbeck.core.registry import kinds
    from limbeck.recipe import resolve  # noqa: F401  # registers all kinds

    console = _console()
    for slot in ("objective", "student", "teacher", "source", "step", "speaker", "scorer", "eval"):
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
        table.add_column(slot, min_width=18)
        table.add_column("teacher gives" if slot == "objective" else "")
        table.add_column("what it is")
        for name, cls in kinds(slot).items():
            needs = ", ".join(sorted(getattr(cls, "needs", ()))) if slot == "objective" else ""
            table.add_row(name, needs, (cls.__doc__ or "").strip().splitlines()[0])
        console.print(table)
        console.print()


@app.command()
def init(
    method: Annotated[str, typer.Argument(help="An objective's kind; see `limbeck methods`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("recipe.yaml"),
    student: Annotated[str, typer.Option(help="Folder or hub id.")] = "Qwen/Qwen3-0.6B",
    teacher: Annotated[str, typer.Option(help="Folder or hub id.")] = "Qwen/Qwen3-4B",
    data: Annotated[str, typer.Option(help="A .jsonl, .parquet, folder or hub id.")] = "data.jsonl",
    debug: Debug = False,
) -> None:
    """Write a commented recipe for METHOD, to be edited."""
    from limbeck.core.files import write_text
    from limbeck.recipe.template import template

    text = template(method, student=student, teacher=teacher, data=data)
    if out.exists():
        raise RecipeError("--out", f"{out} exists; name another file")
    write_text(out, text)
    print(f"wrote {out}; look at it, then: limbeck plan {out}")


@app.command()
def plan(
    recipe: RecipePath,
    settings: Settings = None,
    time: Annotated[
        bool,
        typer.Option("--time", help="Also time a few steps of shallow models, and tell how long."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Show what RECIPE would do and how much memory it would take; loads no weights."""
    from limbeck.recipe.plan import plan as make_plan

    document, resolved = _resolve(recipe, settings)
    made = make_plan(resolved, document)
    _console().print(made.render())
    if time:
        from limbeck.recipe.calibrate import step_time

        print(step_time(resolved, made.facts).render(resolved.train.steps))


@app.command()
def run(
    recipe: RecipePath,
    out: Out,
    settings: Settings = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in DIR.")
    ] = False,
    demo: Annotated[
        bool,
        typer.Option("--demo", help="Try the method offline: the embedded models and data."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Distil as RECIPE says; DIR receives the student, the metrics and the report.

    For several processes: torchrun --nproc-per-node 2 -m limbeck run RECIPE --out DIR
    """
    from limbeck.recipe.folder import look
    from limbeck.recipe.run import run as run_recipe

    if demo:
        look(out, resume)  # before the data is written there
    document, resolved = _resolve(recipe, settings, out / ".data" if demo else None)
    if demo:
        from limbeck.recipe.cache import make_caches
        from limbeck.recipe.generate import generate as make_rows

        make_rows(document)
        make_caches(resolved, document)
    report = run_recipe(resolved, out, resume, document)
    _show(report.to_markdown(), out)


@app.command()
def cache(recipe: RecipePath, settings: Settings = None, debug: Debug = False) -> None:
    """Let each cached teacher of RECIPE read the training rows once, and keep what it says.

    It can be stopped and started again, and started several times at once to share the work.
    """
    from limbeck.recipe.cache import make_caches

    document, resolved = _resolve(recipe, settings)
    caches = make_caches(resolved, document)
    if not caches:
        raise document.error(
            "teachers",
            "none of them is a cache; write one as: big: {kind: cache, path: FOLDER, of: {name: "
            "...}, keep: sampled, k: 50}",
        )
    for made in caches:
        print(made.render())


@app.command()
def generate(
    recipe: RecipePath,
    settings: Settings = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the first prompts and the price; send nothing."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Make the rows of RECIPE's `generated` sources with the help of its teachers.

    It can be stopped and started again: what a teacher has said is recorded, and never asked for
    twice.
    """
    from limbeck.recipe.document import override, read
    from limbeck.recipe.generate import dry_run as show
    from limbeck.recipe.generate import generate as make

    document = override(read(recipe), settings or ())
    if dry_run:
        print(show(document))
        return
    cards = make(document)
    if not cards:
        raise RecipeError("source", "no source of this recipe is of kind `generated`")
    for card in cards:
        print(f"{card.recipe['source']['path']}: {card.render()}")


@app.command()
def iterate(
    recipe: RecipePath,
    out: Out,
    settings: Settings = None,
    rounds: Annotated[int, typer.Option(min=1, help="How many; more may follow later.")] = 3,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Train the recipe's own student in each round."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Generate and run, again and again, each time with the student of the round before.

    DIR receives a folder for each round, and a table of them. Run again, it goes on where it
    stopped.
    """
    from limbeck.campaigns.iterate import iterate as make_rounds
    from limbeck.recipe.document import override, read

    campaign = make_rounds(override(read(recipe), settings or ()), rounds, out, restart=restart)
    print(campaign.to_markdown())
    print(f"rounds: {out / 'rounds.md'}   student: {out / f'round-{rounds}' / 'student'}")


@app.command(name="mock-teacher")
def mock_teacher(
    model: Annotated[
        Path | None, typer.Option(help="Answer with the model in this folder.")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Answer with the embedded teacher.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    fault_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests that go wrong.")
    ] = 0.0,
    faults: Annotated[
        str | None, typer.Option(metavar="KIND,...", help="Which: 429,500,cut,bad_json ...")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of faults and canned answers.")] = 0,
    latency: Annotated[float, typer.Option(min=0, help="Seconds before each answer.")] = 0.0,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="More get 429.")] = None,
    log: Annotated[Path | None, typer.Option(help="Write every request there.")] = None,
    debug: Debug = False,
) -> None:
    """Serve an OpenAI-compatible teacher on this machine, to try a recipe without a bill.

    It answers canned words, or with a real model; and it misbehaves as often as it is told.
    """
    from limbeck.teachers.mock.command import serve

    settings = {"rate": fault_rate, "seed": seed}
    serve(
        folder=model,
        demo=demo,
        faults=settings | ({"kinds": faults.split(",")} if faults else {}),
        port=port,
        latency_seconds=latency,
        requests_per_minute=requests_per_minute,
        log_path=log,
    )


@app.command()
def continual(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="One for each way to learn.")
    ],
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            metavar="NAME=TRAIN,TEST",
            help="Rows to learn, and problems with answers; once for each task, in order.",
        ),
    ],
    out: Out,
    match: Annotated[str, typer.Option(help="How answers are compared.")] = "last_number",
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    replay: Annotated[
        list[str] | None,
        typer.Option(
            "--replay",
            metavar="RECIPE=SHARE",
            help="Mix so many of the earlier tasks' rows in, for the recipe of this name.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Learn tasks one after the other, and show what is kept of the earlier ones.

    Each RECIPE is an arm; its data, evaluations and, behind the first task, its student are those
    of the task. Run again, it goes on where it stopped.
    """
    from limbeck.campaigns.continual import Stage, page
    from limbeck.campaigns.continual import continual as learn
    from limbeck.core.registry import did_you_mean
    from limbeck.recipe.document import read

    stages: list[Stage] = []
    for text in task:
        name, _, files = text.partition("=")
        train, _, test = files.partition(",")
        if not (name and train and test):
            raise RecipeError("--task", f"{text!r} is not NAME=TRAIN,TEST")
        stages.append(Stage(name=name, train=train, test=test))
    names = [path.stem for path in recipes]
    if twice := [name for index, name in enumerate(names) if name in names[:index]]:
        raise RecipeError("RECIPE", f"two recipes are called {twice[0]!r}; rename one")
    shares: dict[str, float] = {}
    for text in replay or ():
        name, _, share = text.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise RecipeError("--replay", f"{text!r} is not RECIPE=SHARE") from None
        if name not in names:
            raise RecipeError("--replay", f"no recipe {name!r}; {did_you_mean(name, names)}")
        if not 0 <= shares[name] < 1:
            raise RecipeError("--replay", f"{text!r}: a share is at least 0 and less than 1")
    arms = {path.stem: read(path) for path in recipes}
    settings = {"match": match, "max_tokens": max_tokens}
    print(page(learn(arms, stages, out, test=settings, replay=shares)))
    print(f"continual.md, continual.json and continual.png are in {out}")


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs with different seeds.")] = 3,
    debug: Debug = False,
) -> None:
    """Distil the teacher that ships with limbeck into a student an eighth of its size."""
    from limbeck.demo_run import run_demo

    _show(run_demo(out, seeds), out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: every failure becomes one line on stderr and an exit code."""
    _ready_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    libraries = ("httpx", "httpx2", "transformers", "datasets", "matplotlib", "filelock")
    for noisy in (*libraries, "fsspec", "bitsandbytes"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # They use names of each other that will change, which is no news to our users.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    # datasets logs what it then raises, which would be told twice; it reads this on import.
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    if given[:1] == ["--debug"]:  # before the command is as good as after it
        del given[0]
    if "--version" in given:
        from limbeck import __version__

        print(f"limbeck {__version__}")
        sys.exit(0)
    try:
        code = app(given, standalone_mode=False)
        if code == INTERRUPTED:  # typer swallows Ctrl-C
            advice = "; if a checkpoint was written, --resume goes on from it"
            _fail("interrupted" + (advice if given[:1] == ["run"] else ""), code, debug)
        sys.exit(code if isinstance(code, int) else 0)
    except Interrupted as error:
        _fail(str(error), INTERRUPTED, debug)
    except (RecipeError, DataError, ModelError) as error:
        _fail(str(error), 2, debug)
    except LimbeckError as error:
        _fail(str(error), 1, debug)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.errno not in REFUSED or error.filename is None:
            _crash(error, debug)
        _fail(f"{error.filename}: {error.strerror}", 2, debug)
    except Exception as error:  # the last resort: say what happened, not how Python got there
        if hasattr(error, "format_message"):  # a usage error of click, which typer may bundle
            _fail(f"{error.format_message() or 'a command is missing'} (limbeck --help)", 2, debug)  # pyright: ignore
        _crash(error, debug)


def _resolve(
    path: Path, settings: Sequence[str] | None, embedded: Path | None = None
) -> tuple[Any, Any]:
    """The recipe; on the embedded models and data where `embedded` says where the data goes."""
    from limbeck.recipe.document import override, read
    from limbeck.recipe.embedded import on_embedded
    from limbeck.recipe.resolve import resolve

    document = read(path)
    if embedded is not None:
        document = on_embedded(document, embedded)
    document = override(document, settings or ())
    return document, resolve(document)


def _console() -> Any:
    """Where tables go: as wide as the terminal, and with whole lines into a pipe or a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _show(page: str, out: Path) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    if int(os.environ.get("RANK", "0")):
        return
    console = Console()
    shown = page.split("\n## Plots")[0]  # a terminal shows no images
    if console.is_terminal:
        console.print(Markdown(shown))
    else:
        print(shown)
    print(f"\nreport: {out / 'report.md'}   student: {out / 'student'}")


def _ready_streams() -> None:
    """What is said into a closed stream is lost, and what an encoding has no letter for is a `?`.

    A closed one is replaced, since the next file to be opened would take its place.
    """
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "limbeck"


def _crash(error: Exception, debug: bool) -> NoReturn:
    place = _place(error)
    _fail(f"{type(error).__name__}: {error} (in {place}; --debug shows more)", 1, debug)


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(one_line(message), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
