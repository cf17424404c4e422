"""Choose the texts of data/real: descriptions of Debian packages.

    apt-get -o Acquire::Languages=en update
    python data/real/texts.py data/real/texts.jsonl

Writes lines of {"text", "split", "group", "package", "section"} for data/prepare.py synthesize: the
synopsis and the whole description of the first package of source packages that are drawn at random,
always the same ones of the same package lists. The group is the source package.
"""

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NUM_TEXTS = {"train": 2000, "val": 100, "test": 200}
FEWEST_WORDS = 15
MOST_WORDS = 300
SEED = 42
APT_CACHE = ["apt-cache", "-o", "Acquire::Languages=en"]
PACKAGES_PER_CALL = 2000  # of apt-cache: a command line has a greatest length

# Sections whose descriptions say how a package belongs to another, not what it is for.
LEFT_OUT = {"debug", "introspection", "libdevel", "localization", "metapackages", "oldlibs",
            "translations"}


def run_apt_cache(*arguments: str) -> str:
    return subprocess.run(
        [*APT_CACHE, *arguments], capture_output=True, check=True, text=True).stdout


def read_packages() -> Iterator[dict[str, str]]:
    """Yield the fields of every package, by the order of its name."""
    names = sorted(set(re.findall(r"^Package: (\S+)", run_apt_cache("dumpavail"), re.MULTILINE)))
    for start in range(0, len(names), PACKAGES_PER_CALL):
        part = names[start : start + PACKAGES_PER_CALL]
        for record in run_apt_cache("show", "--no-all-versions", *part).split("\n\n"):
            # A field's value goes on in lines that begin with a space.
            yield dict(re.findall(r"^([\w-]+): ?(.*(?:\n .*)*)", record, re.MULTILINE))


def describe(fields: dict[str, str]) -> str:
    """The synopsis and the description as one text. A line of a dot alone parts paragraphs."""
    synopsis, _, description = fields["Description-en"].partition("\n")
    lines = [line for line in description.split("\n") if line.strip() != "."]
    return f"{synopsis.strip()}. {' '.join(' '.join(lines).split())}"


def read_texts() -> list[dict[str, str]]:
    """A text for each source package: of the first of its packages that is not left out."""
    entries: dict[str, dict[str, str]] = {}
    for fields in read_packages():
        section = fields.get("Section", "").rpartition("/")[2]
        if "Description-en" not in fields or not section or section in LEFT_OUT:
            continue
        source = fields.get("Source", fields["Package"]).split()[0]
        text = describe(fields)
        if source not in entries and FEWEST_WORDS <= len(text.split()) <= MOST_WORDS:
            entries[source] = {
                "text": text, "group": source, "package": fields["Package"], "section": section}
    return list(entries.values())


def main(out: Path) -> None:
    entries = read_texts()
    random.Random(SEED).shuffle(entries)
    lines = []
    for split, num_texts in NUM_TEXTS.items():
        for entry in entries[:num_texts]:
            lines.append(json.dumps(entry | {"split": split}, ensure_ascii=False) + "\n")
        entries = entries[num_texts:]
    out.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
