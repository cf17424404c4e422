"""Choose the good answers of a synthesized data set by rules.

    python data/real/choose.py data/real/made data/real

Writes the rows that no rule drops, and all vectors, and prints how many each rule drops. The rules
leave out what a reading of a hundred answers called rubbish. marks.jsonl has these, and fifty that
were drawn after the first rules were written, each with its mark and the rule that drops it. (The
rule of the books is of the second draw.)
"""

import re
import shutil
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import prepare

import elm

# What an answer must name that was asked to be about it.
TOPICS = {
    "sailing": re.compile(r"\b(sail|boat|ship|sea\b|seas\b|ocean|nautical|marin|crew|captain)"),
    "cooking": re.compile(r"\b(cook|chef|recipe|kitchen|dish|ingredient|meal|bak|food|flavo)"),
    "law": re.compile(r"\b(law|legal|court|judge|attorney|contract|regulat|statut|justice)")}
SHORT_TASKS = ("category", "keywords", "related_topics", "questions")  # no sentences are asked for
KINDS_OF_ANYTHING = {"package", "software", "library", "program", "utility", "tool"}
MOST_WORDS_OF_A_CATEGORY = 10
FRAME_OF_A_CATEGORY = re.compile(r"^(the|this) (field|category|text|package)\b.*\b(is|from)\b")

BOOK = re.compile(r'" by [A-Z]')


def words_of(text: str) -> list[str]:
    return elm.split_words(prepare.strip_marks(text))


def synopsis_of(text: str) -> str:
    """The text's title: all before the first full stop with a space."""
    return text.partition(". ")[0]


def dropped_by(row: elm.Row) -> str | None:
    """The name of the rule that drops a row; None if it is kept."""
    task = row.task_type
    answer = row.response.casefold()
    words = words_of(answer)
    synopsis_words = set(words_of(synopsis_of(row.text)))
    if task not in SHORT_TASKS and set(words) <= synopsis_words:
        return "repeats the title"
    if task == "category":
        return dropped_category(answer, words, synopsis_words)
    if task == "counterfactual":
        return dropped_counterfactual(answer, words, row)
    if task == "related_topics" and BOOK.search(row.response):
        return "related topics: books, which it invents"
    if task.startswith("style") and is_unchanged(words, words_of(row.text)):
        return "style: the text unchanged"
    return None


def dropped_category(answer: str, words: list[str], synopsis_words: set[str]) -> str | None:
    if len(words) > MOST_WORDS_OF_A_CATEGORY:
        return "category: a sentence"
    if len(words) == 1 and words[0] in KINDS_OF_ANYTHING:
        return "category: that of any package"
    frame = FRAME_OF_A_CATEGORY.match(answer)
    if frame and set(words_of(answer[frame.end() :])) <= synopsis_words:
        return "category: the title for a field"
    return None


def dropped_counterfactual(answer: str, words: list[str], row: elm.Row) -> str | None:
    for topic, pattern in TOPICS.items():
        if topic in row.query and not pattern.search(answer):
            return "counterfactual: not about what was asked"
    long_words = {word for word in words if len(word) > 4}
    if not long_words & set(words_of(row.text)):
        return "counterfactual: not about the text"
    return None


def is_unchanged(words: list[str], text_words: list[str]) -> bool:
    """Whether an answer is word for word of the text: nine in ten of its sequences of four words
    are there."""
    text_sequences = set(sequences_of_four(text_words))
    sequences = sequences_of_four(words)
    num_common = sum(sequence in text_sequences for sequence in sequences)
    return num_common >= 0.9 * max(1, len(sequences))


def sequences_of_four(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + 4]) for start in range(len(words) - 3)]


def main(made: Path, out: Path) -> None:
    counts: Counter[str] = Counter()
    for split in elm.SPLITS:
        table_path = elm.vectors_path(str(made), split)
        num_vectors = len(elm.open_vectors(table_path))
        rows = []
        for line in elm.read_lines(elm.rows_path(str(made), split), elm.TASKS, num_vectors):
            rule = dropped_by(line.row)
            if rule is None:
                rows.append(line.row.model_dump(exclude_unset=True))
                rule = "kept"
            counts[rule] += 1
        elm.write_text(elm.rows_path(str(out), split), elm.jsonl(rows))
        new_table_path = elm.vectors_path(str(out), split)
        new_table_path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(table_path, new_table_path)
    for rule, count in counts.most_common():
        print(f"{count:5}  {rule}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
