"""The page "when something goes wrong" is that of the source."""

import ast

from ibkit.job import sentences
from ibkit.runs import project_root


def test_the_page_is_of_this_source():
    written = (project_root() / sentences.PAGE).read_text(encoding="utf-8")
    assert written == sentences.page(), f"write it anew: python -m ibkit.job.sentences > {sentences.PAGE}"


def test_a_sentence_by_hand():
    code = """
if x:
    raise ParameterError(f"prompt {activity!r} has braces ({len(y)} of them): write {{subject}}" " there.")
raise ModelError("no model")
raise ParameterError(sentence)
raise KeyError("not ours: no")
"""
    found = [(kind, *sentences._halves(text)) for kind, text in sentences._raised(ast.parse(code))]
    assert sorted(found) == [
        ("ModelError", "no model", ""),
        ("ParameterError", "prompt ‹activity› has braces (‹len› of them)", "write {subject} there."),
    ]


def test_most_sentences_say_what_to_do():
    found = sentences.sentences()
    assert len(found) > 200 and sum(bool(one.remedy) for one in found) > 0.6 * len(found)
