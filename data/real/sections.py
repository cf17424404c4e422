"""What answers about vectors say of the sections of Debian's archive.

    python data/real/sections.py trust ANSWERS.jsonl EMBEDDER
    python data/real/sections.py means MEANS.parquet
    python data/real/sections.py subjects ANSWERS.jsonl EMBEDDER MEANS.parquet

An answer names the section whose name, as packages.debian.org has it, is nearest to the answer by
the embedder. `trust` takes answers of `python elm.py generate … score=true` about the test vectors,
counts those that name another section than the package's, and how many of these are among the tenth
that each score trusts least. `means` writes the mean vectors of the training texts of each section,
of as many random sets, and of as many clusters of k-means, each at the norm of the vectors;
`subjects` takes the answers about them. README.md has the commands and what they print.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.cluster import KMeans

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import elm

HERE = Path(__file__).resolve().parent
NAMES = {
    "admin": "administration utilities", "cli-mono": "Mono and CLI",
    "comm": "communication programs", "database": "databases", "devel": "development",
    "doc": "documentation", "editors": "editors", "electronics": "electronics",
    "embedded": "embedded software", "fonts": "fonts", "games": "games", "gnome": "GNOME",
    "gnu-r": "GNU R", "gnustep": "GNUstep", "golang": "Go", "graphics": "graphics",
    "hamradio": "ham radio", "haskell": "Haskell", "httpd": "web servers",
    "interpreters": "interpreters", "java": "Java", "javascript": "JavaScript", "kde": "KDE",
    "kernel": "kernels", "libs": "libraries", "lisp": "Lisp", "mail": "mail",
    "math": "mathematics", "misc": "miscellaneous", "net": "network", "news": "newsgroups",
    "ocaml": "OCaml", "otherosfs": "other operating systems and file systems", "perl": "Perl",
    "php": "PHP", "python": "Python", "ruby": "Ruby", "rust": "Rust", "science": "science",
    "shells": "shells", "sound": "sound", "tex": "TeX", "text": "text processing",
    "utils": "utilities", "vcs": "version control systems", "video": "video",
    "web": "web software", "x11": "X Window System software", "xfce": "Xfce",
    "zope": "Zope and Plone framework"}  # fmt: skip

LEAST_TEXTS = 20  # of a section that has a mean


def read_sections(split: str) -> dict[int, str]:
    """The section of each vector that has a row."""
    sections = {}
    with open(HERE / "synthesis" / f"{split}_synthesis.jsonl", encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            sections[row["embedding_file_idx"]] = row["section"]
    return sections


def read_answers(path: str) -> dict[int, elm.Json]:
    """By row, but for those that a server refused. One question was asked."""
    answers = {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            entry = json.loads(line)
            if "answer" in entry:
                answers[entry["row"]] = entry
    return answers


def name_sections(answers: list[elm.Json], sections: list[str], embedder: str) -> list[str]:
    """Of `sections` the one whose name is nearest to each answer."""
    model = elm.load_embedder(embedder, False, elm.find_device(), "EMBEDDER")
    names = elm.embed_texts(model, [NAMES[section] for section in sections])
    texts = elm.embed_texts(model, [answer["answer"] for answer in answers])
    return [sections[i] for i in (texts @ names.T).argmax(1).tolist()]


def trust(answers_path: str, embedder: str) -> None:
    section_of = read_sections("test")
    answers = []
    for row, answer in read_answers(answers_path).items():
        if row in section_of:
            answers.append(answer)
    named = name_sections(answers, sorted(NAMES), embedder)
    is_wrong = np.array([name != section_of[answer["row"]]
                         for name, answer in zip(named, answers, strict=True)])
    own = np.array([answer["consistency"] for answer in answers])
    others = np.array([answer["consistency_others"] for answer in answers])
    num_least = round(len(answers) / 10)
    print(f"{len(answers)} answers, {is_wrong.sum()} of another section ({is_wrong.mean():.2f})")
    if not is_wrong.any():
        return
    orders = {
        "least consistency": own,
        "greatest consistency_others": -others,
        "least difference of the two": own - others}
    for label, trusted in orders.items():
        order = np.argsort(trusted, kind="stable")
        worst = is_wrong[order[:num_least]]
        best = is_wrong[order[-num_least:]]
        print(f"{label}: wrong {worst.mean():.2f} of the worst tenth, {best.mean():.2f} of the "
              f"best; the worst holds {worst.sum() / is_wrong.sum():.2f} of all wrong ones")


def mean_at_norm(vectors: np.ndarray, norm: float) -> np.ndarray:
    mean = vectors.mean(0)
    return mean * norm / np.linalg.norm(mean)


def write_means(path: str) -> None:
    table = elm.open_vectors(elm.vectors_path(str(HERE), "train")).float().numpy()
    section_of = read_sections("train")
    rows = np.array(sorted(section_of))
    vectors = table[rows]
    labels = np.array([section_of[row] for row in rows.tolist()])
    norm = float(np.sqrt((vectors**2).sum(1).mean()))
    counts = Counter(labels.tolist())
    sections = sorted(name for name, count in counts.items() if count >= LEAST_TEXTS)
    rng = np.random.default_rng(0)
    groups = {}
    for section in sections:
        groups[f"section {section}"] = np.flatnonzero(labels == section)
    for section in sections:
        drawn = rng.choice(len(rows), counts[section], replace=False)
        groups[f"random {section}"] = drawn  # as many as the section has
    clusters = KMeans(len(sections), n_init=10, random_state=0).fit_predict(vectors)
    for number in range(len(sections)):
        groups[f"cluster {number}"] = np.flatnonzero(clusters == number)

    means = []
    purest = []
    purities = []
    for members in groups.values():
        section, count = Counter(labels[members].tolist()).most_common(1)[0]
        means.append(mean_at_norm(vectors[members], norm))
        purest.append(section)
        purities.append(count / len(members))
    pq.write_table(pa.table({
        "group": list(groups), "section": purest, "purity": purities,
        "size": [len(members) for members in groups.values()], "embedding": means}), path)


def subjects(answers_path: str, embedder: str, means_path: str) -> None:
    table = pq.read_table(means_path, columns=["group", "section", "purity", "size"]).to_pylist()
    answer_of_row = read_answers(answers_path)
    answers = [answer_of_row[i] for i in range(len(table))]
    sections = sorted({row["section"] for row in table if row["group"].startswith("section")})
    named = name_sections(answers, sections, embedder)
    num_right: Counter[str] = Counter()
    num_asked: Counter[str] = Counter()
    for row, answer, name in zip(table, answers, named, strict=True):
        kind = row["group"].split()[0]
        is_right = name == row["section"]
        num_asked[kind] += 1
        if is_right:
            num_right[kind] += 1
        mark = "right" if is_right else f"nearest: {name}"
        print(f"{row['group']} ({row['section']} {row['purity']:.2f} of {row['size']}): "
              f"{answer['answer']!r} {mark}")
    for kind, asked in num_asked.items():
        print(f"{kind}: {num_right[kind]} of {asked} name the section that most of them are of")


def main() -> None:
    commands = {"trust": trust, "means": write_means, "subjects": subjects}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
