"""Find phrases in the documentation that are hard to read. Run by `make prose` and `make lint`.

`FORMS` lists the phrases, each with a reason and a plain alternative. Code, links, comments and measured blocks are
skipped.

    python release/check_prose.py             the pages in `PAGES`
    python release/check_prose.py FILE...     other files
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (  # files, or folders of .md files
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CODE_OF_CONDUCT.md",
    ".github",
    "benchmarks",
    "docs",
)
EXEMPT = "docs/reports/"  # commands wrote them
UNREAD = re.compile(
    r"```.*?```|<!-- figures: .*?<!-- end of figures -->|<!--.*?-->|`[^`]*`|\]\([^)]*\)|^(?: {4}|\t)[^\n]*$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Form:
    """A banned phrase, as a regular expression in which a space matches any white space."""

    pattern: str
    reason: str
    plain: str
    example: str  # a sentence with the phrase, for the tests


FORMS = (
    Form("in place of", "readers take it for a location", "instead of; replaces", "A list in place of a text."),
    Form("refuses? to know", "code has no will", "does not depend on", "It refuses to know the loop."),
    Form("knows? (?:nothing|no|neither)", "code has no knowledge", "does not depend on", "It knows no torch."),
    Form(r"(?:who|what|which|where|when)ever", "name the role", "the client that; any file that", "Whoever asks."),
    Form("(?:some|no)body", "name the role", "another user; no client", "Somebody looks at it."),
    Form("(?-i:Of) (?:an?|the|each|what|all|every|those)", "the sentence starts with its end", "subject, verb, object",
         "Of a text the end is cut."),
    Form("(?:it|that|this|which) is (?:said|told)", "nobody is named who says it", "a note says; the plan warns",
         "Where it is guessed, that is said."),
    Form("and (?:so )?(?:is|are) (?:said|told)", "nobody is named who says it", "a note says", "Cut, and is said."),
    Form("for ever", "an old phrase", "permanently", "The number stays for ever."),
    Form("by (?:itself|themselves)", "two meanings: alone, unasked", "automatically; alone", "It goes back by itself."),
    Form("(?:where|if) (?:it is |they are )?left out", "a riddle for a default", "default:", "8 where left out."),
    Form("anew", "rare", "again; from scratch", "It begins anew."),
    Form("beside", "readers take it for besides", "next to; together with", "Metrics beside the version."),
    Form("seldom", "rare", "rarely", "It is seldom so."),
    Form("mends?", "rare", "fixes; repairs", "The same file mends it."),
    Form("go(?:es)? on", "two meanings: continue, switch on", "continues; resumes", "The run goes on."),
    Form("(?:1/[0-9.]+|an? (?:half|third|quarter|fifth|tenth)) (?:of the|the) (?:time|memory|speed)",
         "readers invert a fraction", "4.0x faster; 4.0x less memory", "It takes 1/4.0 of the time."),
    Form("[0-9.]+ times (?:as|faster|slower|less|more)", "unclear: added or multiplied", "4.0x faster",
         "It is 4 times as fast."),
    Form("(?:as|where) (?:it|they) lies?", "no noun to look up", "in place; without copying", "Read as they lie."),
    Form("rooms", "a picture for packages", "packages", "The rooms that train."),
    Form("yardsticks?", "a picture for a baseline", "baseline", "Full fine-tuning is the yardstick."),
    Form("has it", "no noun to look up", "name the thing", "As the paper has it."),
    Form("the doing of", "a riddle", "done by", "It is kept as the doing of a token."),
)  # fmt: skip


def matches(text: str) -> Iterator[tuple[int, str, Form]]:
    """(line number, matched words, form) of each banned phrase in a text, in order."""
    read = UNREAD.sub(lambda found: re.sub(r"[^\n]", "\0", found[0]), text)  # keeps line numbers
    found = []
    for form in FORMS:
        pattern = re.compile(rf"(?<![\w-]){form.pattern}(?![\w-])".replace(" ", r"\s+"), re.IGNORECASE)
        found += [(match.start(), match[0], form) for match in pattern.finditer(read)]
    for start, words, form in sorted(found, key=lambda each: each[0]):
        yield read.count("\n", 0, start) + 1, " ".join(words.split()), form


def pages() -> Iterator[Path]:
    for name in PAGES:
        for path in sorted((ROOT / name).rglob("*.md")) if (ROOT / name).is_dir() else [ROOT / name]:
            if not path.relative_to(ROOT).as_posix().startswith(EXEMPT):
                yield path


def main(arguments: Sequence[str]) -> int:
    """Print a line for each banned phrase. Returns exit status 1 if there is one."""
    count = 0
    for path in [Path(name) for name in arguments] or pages():
        for line, words, form in matches(path.read_text(encoding="utf-8")):
            count += 1
            shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            print(f'{shown}:{line}: "{words}": {form.reason}. Write: {form.plain}')
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
