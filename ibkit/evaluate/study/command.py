"""`ibkit study`: a rating page for people without Jupyter, as one file."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ibkit.runs import newest_run, notebook_runs, read_run, resolve


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `ibkit study`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    export = actions.add_parser(
        "export", help="write the page", allow_abbrev=False,
        description="Write one HTML file that works offline; raters open it, answer, and send back the file it saves, "
        "which notebook 07_human_study merges (ratings=[...]; give it the same run_evaluate, n_items and seed).",
    )  # fmt: skip
    export.add_argument("file", metavar="FILE.html", help="to write")
    export.add_argument(
        "--run", nargs="+", default=[], metavar="RUN", help="evaluated runs, or grids (default: the newest)"
    )
    export.add_argument(
        "--n-items", type=int, default=0, metavar="N", help="items a question and arm; 0 = all (default)"
    )
    export.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of items (default: 0)")


def main(arguments: Namespace) -> int:
    """Write the page and say what it holds; returns 0."""
    from ibkit.data.subject import PersonalizedSubject, personalization_of
    from ibkit.evaluate.study.export import export_page
    from ibkit.evaluate.study.items import Evaluated, make_items, study_name
    from ibkit.runs import input_of

    evaluations = []
    for place in map(resolve, arguments.run):
        evaluations += notebook_runs(place, "03_evaluate")[0] or [read_run(place, "03_evaluate")]
    evaluated = []
    for run in evaluations or [newest_run("03_evaluate")]:
        personalized = personalization_of(input_of(run, "run0", "01_personalize", "02_rl_finetune"))
        evaluated.append(Evaluated(run, personalized, PersonalizedSubject.read(personalized)))
    items = make_items(evaluated, arguments.n_items, arguments.seed)
    path = Path(arguments.file).expanduser().resolve()
    n = export_page(items, {one.subject.name: one.references for one in evaluated}, path)
    print(
        f"study {study_name(items)}: {n} items, {path.stat().st_size / 2**20:.1f} MiB, about {n * 4 / 60:.0f} minutes"
    )
    print(f"send {path} to raters; the files that they send back go into ratings of notebook 07_human_study")
    return 0
