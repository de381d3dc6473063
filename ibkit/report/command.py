"""`ibkit report`: one page for one run or for many."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ibkit.report.pictures import FIRST, check_choice
from ibkit.runs import resolve


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `ibkit report`."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folders of finished runs: of other subjects, seeds, or methods; or grids",
    )
    parser.add_argument("--out", default="", metavar="FILE", help="of the page (default: outputs/reports/NAMES.html)")
    parser.add_argument(
        "--pictures", default=FIRST, metavar="WHICH",
        help="which pictures are shown of each prompt: first, best, worst, or noise seeds such as 0,3 (default: first)",
    )  # fmt: skip
    parser.add_argument("--against", default="", metavar="ARM", help="an arm to subtract from all others")


def main(arguments: Namespace) -> int:
    """Write the page and say where it is; returns 0."""
    from ibkit.report import build_report

    check_choice(arguments.pictures)
    folders = [resolve(run) for run in arguments.runs]
    names = "+".join(folder.resolve().name for folder in folders)
    if len(names) > 100:
        names = f"{folders[0].resolve().name}+{len(folders) - 1}-more"
    path = Path(arguments.out).expanduser().resolve() if arguments.out else resolve("outputs/reports") / f"{names}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"open {build_report(folders, path, arguments.pictures, arguments.against)}")
    return 0
