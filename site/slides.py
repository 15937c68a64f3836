"""A talk from a notebook: its figures, formulas, what there is to notice, and its exercises.

Nothing is written twice. A section of the notebook is a column of slides: the question, then its
formulas, figures and what to notice in them, in the notebook's order. Exercises are slides to stop
at, and the summary is the last one. `revealjs-break` begins a slide under the same question.
"""

from __future__ import annotations

import re

from nbformat import NotebookNode

MOST_WORDS = 75
"""Of the text on a slide: more cannot be read while somebody is speaking."""

BREAK = ":::{revealjs-break}\n:notitle:\n:::"
PICTURE = r"^!\[[^\n]*\]\([^)\n]*\)"
PARTS = re.compile(
    rf"^# (?P<title>.+)$|^## (?P<section>.+)$|^### (?P<exercise>Exercise .+)\n+(?P<task>(?:.+\n?)+)"
    rf"|(?P<picture>{PICTURE})|^(?P<formula>\$\$(?:.|\n)+?\$\$)"
    r"|^\*\*What to notice\.\*\*(?P<notice>(?:.|\n)+?)(?=^#|\Z)",
    flags=re.MULTILINE,
)


def text_of_slide(text: str) -> str:
    """The first paragraphs of `text`, at most MOST_WORDS, without links; if need be, sentences."""
    text = re.sub(r"(?<!!)\[([^\]]+)\]\([^)]*\)", r"\1", text).strip()
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\d\. |- )", text):
        if len(" ".join([*kept, paragraph]).split()) > MOST_WORDS:
            break
        kept.append(paragraph)
    if kept:
        return "\n\n".join(kept)
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z*“\"])", text.split("\n\n")[0])
    while len(sentences) > 1 and len(" ".join(sentences).split()) > MOST_WORDS:
        sentences.pop()
    return " ".join(sentences)


def stacked(formula: str) -> str:
    """A formula whose parts, with wide spaces between them, stand below one another."""
    lines = re.split(r"\s*\\q?quad\s*", formula.strip("$ \n"))
    return "$$\\begin{gathered}" + r"\\[1em] ".join(lines) + "\\end{gathered}$$"


def markdown_of(notebook: NotebookNode) -> str:
    """All that a notebook's page shows, but for code and printed text."""
    texts = []
    for cell in notebook.cells:
        texts += [cell.source] if cell.cell_type == "markdown" else []
        texts += [o.get("data", {}).get("text/markdown", "") for o in cell.get("outputs", [])]
    return "\n\n".join(texts)


def slides(notebook: NotebookNode) -> str:
    """The slides of a staged notebook (see staging.py), as Markdown for sphinx-revealjs."""
    text = markdown_of(notebook)
    blocks = ["---\norphan: true\n---"]  # in no table of contents
    for part in PARTS.finditer(text):
        if part["title"]:
            blocks.append(f"# {part['title']}")
        elif part["section"]:
            if part["section"] == "Summary":
                summary = text[part.end() :].split("\n## ")[0]
                return "\n\n".join([*blocks, "## Summary", text_of_slide(summary), ""])
            blocks.append(f"## {part['section']}")
        elif part["exercise"]:
            blocks.append(f"### {part['exercise']}\n\n{text_of_slide(part['task'])}")
        else:
            formula = part["formula"] and stacked(part["formula"])
            body = part["picture"] or formula or text_of_slide(part["notice"])
            below_picture = part["notice"] and blocks[-1].startswith("![")
            if not below_picture and (not blocks[-1].startswith("#") or "\n" in blocks[-1]):
                blocks.append(BREAK)
            blocks.append(body)
    return "\n\n".join([*blocks, ""])
