"""One vocabulary everywhere: README, docs, `--help`, messages and public docstrings.

Every entry of `BANNED` names the term to write instead. A finding shows the words and the sentence
around them.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jax_lora.cli.main import make_parser

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jax_lora"

BANNED = {
    # Terms: the pattern of the word to avoid -> the word to use.
    r"(?:trainable|trained|learned|million|billion) numbers": "parameters",
    r"numbers (?:that are |which are )?(?:trained|learned)": "parameters",
    r"numbers of (?:the|a|every|each) (?:model|leaf|base|adapter)": "parameters, elements, values",
    r"finite numbers|non-finite numbers?": "finite values",
    r"what the factors add": "the update",
    r"meetings?": "low-rank product",
    r"(?:narrow|thin|wide|widened) products?": "low-rank product",
    r"(?:narrow|widen)(?:s|ed|ing)? (?:x|to the rank|convolutions?)": "down-projection",
    r"labelled": "named axes; labeled",
    r"stack axis of W0|layers of a stack": "layer stack, stacked layers",
    r"(?:optimizer|Adam\w*)(?:'s)? moments|moments of (?:the|an) optimizer": "optimizer state",
    r"(?:training|your|data) rows|rows of (?:a |the |your )?(?:data|data set|dataset)": "examples",
    r"rows? of up to": "sequence length, packing",
    r"learned tokens": "target tokens, loss mask",
    r"answers?['’]s? tokens": "completion tokens",
    r"needs? at once": "peak memory",
    r"remember(?:s|ed|ing)?": "KV cache; record",
    r"form(?:s|ed|ing)? (?:the |an? |every )?(?:full |whole |merged )?weights?": "materialize",
    r"weights? (?:is|are|was|were) formed": "materialized",
    r"ledgers?": "training run, checkpoint",
    r"compiled programs?|programs? (?:is|are|was|were) compiled": "compiled function",
    r"no longer a number|loss (?:is|was) no number": "NaN loss, non-finite loss",
    r"wavers?": "perplexity = exp(loss)",
    r"errors\.explain": "format_error",
    # Sentences that were replaced.
    r"in the place of": "instead of",
    r"which Pythons": "Supported versions",
    r"mostly takes": "confuses",
    r"to be rid of": "to silence",
    r"has forgotten": "cannot be recovered",
    r"all else": "any other",
    r"not beside an?": "not compatible with",
    r"go(?:es)? on with (?:a|the) run": "resume",
    r"without a word": "silently",
    # Constructions.
    r"what (?:is|are|was|were) (?:trained|learned|added|frozen|not|known|saved|computed|compiled"
    r"|carried|scanned|constant|stored|missing)": "name the thing",
    r"that is so": "state it",
    r"as (?:it|they) (?:is|are|was|were)(?=[.,;:)]|$| alone)": "unchanged",
    r"as it were": "leave it out",
    r"such that": "so that",
    r"of (?:its|their) own": "a separate, its",
    r"of the same\b[^.]*\bof the same": "split the sentence",
    r"knows": "has, reads, supports",
    r"(?:it|that|which|function|command|trainer|model|loader|PEFT|vLLM|mlx-lm|optimizer|library)"
    r" takes (?!the most|\S+ (?:second|minute|hour|while|moment|long|time))"
    r"(?:an?|any|the|every|all|what|arrays|trees)": "accepts",
    r"takes? [\"“]?at least": "confuses",
    r"(?<!there )(?<!There )(?:is|are|was|were) none": "is not one of",
    r"(?<!there )(?:is|are) no (?:number|integer|whole|list|object|parameter|kernel|matrix|array"
    r"|plain|regular|safetensors|JSON|UTF-8|Optax|LoRA)": "is not a",
    r"(?:: |^)no (?:whole number|number|list of|object|regular expression)": "expected ..., not",
}
_PATTERNS = [
    (re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.I if "none" not in pattern else 0), instead)
    for pattern, instead in BANNED.items()
]


def findings(text: str) -> list[str]:
    """Return a line for every banned phrase: the phrase in its surroundings, and what to write."""
    text = " ".join(text.split())
    return [
        f"{text[max(0, match.start() - 50) : match.end() + 40]!r} -> {instead}"
        for pattern, instead in _PATTERNS
        for match in pattern.finditer(text)
    ]


# -----------------------------------------------------------------------------------------------
# What is read
# -----------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """Return a page without its code blocks and its inline code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the docstrings of public modules, classes and functions, without their examples."""

    def visit(node: ast.AST) -> Iterator[str]:
        if getattr(node, "name", "").startswith("_") and not node.name.startswith("__"):
            return
        text = ast.get_docstring(node) or ""
        yield "\n".join(
            line for line in text.split("\n") if not re.match(r"\s*(>>>|\.\.\. )", line)
        )
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from visit(child)

    yield from visit(tree)


def messages(tree: ast.Module) -> Iterator[str]:
    """Yield the literals in the arguments of errors, format_error(...), warn(...) and raise."""
    for node in ast.walk(tree):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Raise) or name.endswith(("Error", "format_error", "warn")):
            yield from _literals(node)


def _literals(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield "".join(
            part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        if not isinstance(node, ast.JoinedStr) or isinstance(child, ast.FormattedValue):
            yield from _literals(child)


# -----------------------------------------------------------------------------------------------
# The tests
# -----------------------------------------------------------------------------------------------

PAGES = {
    str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
}
MODULES = {str(file.relative_to(ROOT)): file for file in PACKAGE.rglob("*.py")}
HELP = {parser.prog: parser for parser in parsers(make_parser())}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_page_uses_the_vocabulary(page):
    _check(prose(PAGES[page]))


@pytest.mark.parametrize("command", sorted(HELP))
def test_help_uses_the_vocabulary(command):
    _check(HELP[command].format_help())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_messages_and_docstrings_use_the_vocabulary(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    _check("\n\n".join([*docstrings(tree), *messages(tree)]))


def _check(text: str) -> None:
    found = findings(text)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize(
    "sentence",
    [
        "The loss is no number.",
        "Checkpoints hold the adapter alone and know what is trained, as it were.",
        "The full weight is formed there.",
        "Every output has a scale of its own.",
        "The leaf knows\nits path.",
    ],
)
def test_a_sentence_in_dialect_is_found(sentence):
    assert findings(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "`labels` holds the target ids; a matrix has rows and columns.",
        "LoRA freezes W0 and learns a low-rank update to it.",
        "There is no adapter in the folder, and compiling it takes a minute.",
        "A jaxpr is a program; the value is None as it is used twice.",
    ],
)
def test_a_plain_sentence_passes(sentence):
    assert not findings(sentence)


def test_messages_are_found_in_code():
    code = 'raise Error(format_error(f"{path}: no list", got="of its own", fix=fix))\nx = "knows"'
    assert sorted(set(messages(ast.parse(code)))) == ["of its own", "{}: no list"]
    assert sorted(set(messages(ast.parse('x = DataError("a", got="b")')))) == ["a", "b"]
