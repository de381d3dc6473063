"""The committed results give the numbers that they gave when they were made, whatever the code around them becomes."""

import json
from pathlib import Path

import pytest

from ibkit.cli import main

REFERENCE = Path(__file__).parents[1] / "outputs" / "reference"
GOLDEN = json.loads(Path(__file__).with_name("golden_reference.json").read_text(encoding="utf-8"))


def test_claims_on_the_reference_keep_their_numbers_and_verdicts(capsys):
    main(["claims", str(REFERENCE), "--json"])
    found = {claim["id"]: claim for claim in json.loads(capsys.readouterr().out)}
    assert found.keys() == GOLDEN["claims"].keys()
    for name, golden in GOLDEN["claims"].items():
        for key, value in golden.items():
            wanted = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
            assert found[name][key] == wanted, (name, key)


def test_tables_of_the_reference_are_the_same_text(capsys):
    main(["tables", str(REFERENCE)])
    assert capsys.readouterr().out.splitlines() == GOLDEN["tables"]
