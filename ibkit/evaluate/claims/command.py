"""`ibkit claims`: the findings in words and as JSON."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import asdict
from json import dumps
from pathlib import Path
from textwrap import fill

from ibkit.errors import ParameterError
from ibkit.evaluate.claims import VERDICTS, Finding, evaluate_claims
from ibkit.runs import resolve


def claims_as_text(claims: list[Finding], width: int = 100) -> str:
    """The findings as a plain table: below each line the claim, its source and the numbers behind it."""
    lines = [f"{'':4}{'verdict':16}{'our figure, 95 % interval':38}{'n':>6}{'seeds':>7}"]
    for claim in claims:
        n, seeds = (claim.n, claim.seeds or "–") if claim.value is not None else ("–", "–")
        lines.append(f"{claim.id:4}{claim.verdict:16}{claim.figure():38}{n:>6}{seeds:>7}")
        texts = claim.claim, f"{claim.quantity}.", claim.reason, claim.detail, f"Paper: {claim.source}."
        for text in filter(None, texts):
            lines.append(fill(text, width, initial_indent=" " * 4, subsequent_indent=" " * 6))
        lines.append("")
    return "\n".join(lines).rstrip()


def summary(claims: list[Finding]) -> str:
    """A sentence for each verdict: the claims that got it."""
    sentences = []
    for verdict in VERDICTS:
        those = [f"{claim.id} ({claim.claim.rstrip('.')})" for claim in claims if claim.verdict == verdict]
        if those:
            sentences.append(f"{verdict.capitalize()}, {len(those)} of {len(claims)}: {'; '.join(those)}.")
    return " ".join(sentences)


def claims_command(path: str | Path = "", json: bool = False, arms: Mapping[str, str] | None = None) -> int:
    """Print the claims of a run; 0, whatever the verdicts.

    Args:
        path, arms: see `evaluate_claims`; an empty path: the newest evaluated run in outputs/, or outputs/reference.
        json: print a JSON list of objects instead of a table; a claim that was not tested has null for its numbers.
    """
    folder = Path(path) if path else _newest_run()
    claims = evaluate_claims(folder, arms)
    if json:
        print(dumps([asdict(claim) for claim in claims], indent=2, ensure_ascii=False))
    else:
        print(f"Claims, tested on {folder}\n\n{claims_as_text(claims)}")
    return 0


def _newest_run() -> Path:
    tables = resolve("outputs").glob("*/03_evaluate/scores.csv")
    newest = max(tables, key=lambda table: table.stat().st_mtime_ns, default=None)
    return newest.parents[1] if newest else resolve("outputs/reference")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `ibkit claims`."""
    parser.add_argument(
        "run", nargs="?", default="", metavar="RUN",
        help="folder of a run, or outputs/reference for the committed results (default: the newest run in outputs/)",
    )  # fmt: skip
    parser.add_argument(
        "--arms", nargs="+", default=[], metavar="ROLE=ARM",
        help="arms that play a role of the claims, such as tuned=lora_dreambooth+ddpo (default: the paper's)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a JSON list of the claims")


def main(arguments: Namespace) -> int:
    """Run `ibkit claims`."""
    if wrong := [text for text in arguments.arms if "=" not in text]:
        raise ParameterError(f"--arms {wrong[0]!r} is not of the form ROLE=ARM.")
    arms = dict(text.split("=", 1) for text in arguments.arms)
    return claims_command(arguments.run, arguments.json, arms)
