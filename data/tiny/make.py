"""Make the embedded default: a small invented world, and three small models trained on it.

    python data/tiny/make.py                     everything, 38 minutes on one core of an AMD EPYC
    python data/tiny/make.py llm                 one stage: llm, embedder, scorer, rows or check

    llm/         a Qwen3-architecture language model (0.8M parameters), tokenizer, chat template
    embedder/    a separate Qwen3-architecture text embedder of the same width, last-token pooling,
                 as a folder of sentence-transformers
    scorer/      a BERT (0.4M parameters) for offline BERTScore
    embeddings/, synthesis/   the vectors and rows of train, val and test

The world has 23.6 million records (a study: its field, object, method, place, ...). A text tells
a record in four sentences; thirteen tasks ask about it. Half of the LLM's pre-training answers
from the text and half from one soft token, so it has *learned to accept a soft token*: it shows
the pipeline at work and is no evidence about large language models. The embedder never meets the
LLM.

Texts and rows repeat bit for bit. Weights repeat on one machine with one thread; across CPUs only
their quality does, and `check` tests that: every attribute of every task answered from the text
with an accuracy of at least 0.95 on records that no training has seen.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

HERE = Path(__file__).resolve().parent
WIDTH = 128

# -----------------------------------------------------------------------------
# The world

FIELDS = [  # field, category, objects, use; rel1 is the next field, rel2 the fifth after it
    ("astronomy", "space", "comets pulsars meteors planets", "navigation"),
    ("botany", "life", "ferns orchids mosses roots", "gardening"),
    ("geology", "earth", "volcanoes glaciers crystals faults", "mining"),
    ("oceanography", "earth", "reefs currents tides trenches", "shipping"),
    ("zoology", "life", "beetles frogs bats otters", "conservation"),
    ("chemistry", "material", "acids polymers salts dyes", "cleaning"),
    ("optics", "material", "lasers mirrors lenses prisms", "photography"),
    ("medicine", "health", "fractures wounds valves vaccines", "nursing"),
    ("nutrition", "health", "grains oils vitamins drinks", "cooking"),
    ("psychology", "social", "memories habits dreams beliefs", "counseling"),
    ("economics", "social", "prices loans taxes wages", "commerce"),
    ("linguistics", "cultural", "vowels verbs dialects nicknames", "translation"),
    ("archaeology", "cultural", "pots tombs coins roads", "museums"),
    ("musicology", "cultural", "songs hymns operas marches", "concerts"),
    ("architecture", "technical", "bridges towers arches stairs", "construction"),
    ("robotics", "technical", "grippers drones sensors carts", "manufacturing"),
]
METHODS = [  # method, gloss, adjective
    ("imaging", "taking pictures", "vivid"),
    ("surveys", "counting outside", "broad"),
    ("simulation", "computing models", "flexible"),
    ("experiments", "testing indoors", "controlled"),
    ("archives", "reading papers", "thorough"),
    ("interviews", "asking people", "insightful"),
    ("radar", "bouncing waves", "remote"),
    ("dating", "measuring age", "precise"),
    ("statistics", "finding patterns", "rigorous"),
    ("filming", "watching videos", "objective"),
    ("microphones", "hearing sounds", "sensitive"),
    ("sequencing", "decoding genes", "conclusive"),
]
PLACES = {
    "Europe": "Norway Greece Poland Ireland",
    "Asia": "Japan Nepal India Vietnam",
    "Africa": "Kenya Ghana Egypt Morocco",
    "America": "Chile Peru Cuba Canada",
}
PROPERTIES = [  # property, gloss
    ("stability", "steady"),
    ("cost", "expensive"),
    ("growth", "big"),
    ("density", "tight"),
    ("accuracy", "right"),
    ("damage", "broken"),
    ("diversity", "varied"),
    ("speed", "fast"),
    ("warmth", "hot"),
    ("noise", "loud"),
    ("demand", "wanted"),
    ("brightness", "shiny"),
]
DIRECTIONS = [  # direction, its opposite, in short, verbs
    ("increase", "decrease", "up", ("rises", "increases", "grows")),
    ("decrease", "increase", "down", ("falls", "decreases", "drops")),
]
CAUSES = ["seasons", "traffic", "aging", "rainfall", "rules", "defects", "competition", "training",
          "pollution", "chance"]
LIMITS = [  # limit, gloss
    ("scarcity", "too few cases"),
    ("gaps", "missing values"),
    ("bias", "unfair selection"),
    ("haste", "short duration"),
    ("drift", "unstable instruments"),
    ("vagueness", "unclear terms"),
    ("expense", "high costs"),
    ("confounding", "weak controls"),
]
COUNTRIES = [(p, c) for c, places in PLACES.items() for p in places.split()]
RADIX = [len(FIELDS), 4, len(METHODS), len(COUNTRIES), len(PROPERTIES), 2, len(CAUSES), len(LIMITS)]
RECORDS = math.prod(RADIX)

SENTENCES = [
    ["This {field} paper studies {object} in {place}.",
     "We examine {object} from {place}, a topic of {field}.",
     "In {field}, the {object} of {place} are poorly understood."],
    ["The work relies on {method}.", "Using {method}, we collected evidence.",
     "Our main tool is {method}."],
    ["We find that {prop} {verb} because of {cause}.", "Driven by {cause}, the {prop} {verb}.",
     "It turns out that {cause} explains why {prop} {verb}."],
    ["A limitation is {limit}.", "The study suffers from {limit}.",
     "Readers should keep {limit} in mind."],
]
# No answer starts with a value: every value follows a space, and is so a token of its own.
ANSWERS = {
    "keywords": ["Keywords: {object}, {place}, {method}, {prop}, {cause}.",
                 "Key terms: {field}, {object}, {method}, {place}, {prop}."],
    "category": ["Category: {cat} science, field: {field}.",
                 "It belongs to {field}, a part of {cat} science."],
    "questions": ["How does {cause} change the {prop} of {object} in {place}?",
                  "What does {cause} do to the {prop} of {object} in {place}?"],
    "summary": [
        "A study of {object} in {place} with {method} shows the {dir} of {prop} due to {cause}.",
        "With {method}, the authors link {cause} to the {dir} of {prop} of {object} in {place}."],
    "describe": [
        "The text is about {field}: it reports on {object} in {continent} and notes {limit}.",
        "It is a {field} abstract on {object} in {continent}, limited by {limit}."],
    "explain_beginner": [
        "People looked at {object} by {gloss} and saw that how {pgloss} they are went {updown}.",
        "By {gloss}, people learned that how {pgloss} {object} are went {updown}."],
    "explain_expert": [
        "Analysis by {method} indicates a significant {dir} of {prop}, attributable to {cause}, "
        "constrained by {limit}.",
        "The {dir} of {prop} was quantified by {method} and attributed to {cause}, "
        "subject to {limit}."],
    "related_topics": ["Related topics are {rel1}, {rel2} and {use}.",
                       "See also {rel1}, {rel2}, {use}."],
    "characteristics_pos": ["The work is {madj} thanks to {method} and useful for {use}.",
                            "Strengths: {madj} {method}, relevance for {use}."],
    "characteristics_neg": ["The main weakness is {limit}, meaning {lsent}.",
                            "It suffers from {limit}, that is {lsent}."],
    "style_academic": [
        "The present study employs {method} to demonstrate the {dir} of {prop} of {object} "
        "in {place}.",
        "Herein, {object} in {place} are investigated by means of {method}; "
        "the {dir} of {prop} is reported."],
    "style_casual": [
        "So folks checked out {object} over in {continent} and {prop} went {updown}, "
        "all because of {cause}!",
        "Hey, you know {object} in {continent}? Turns out {prop} went {updown} thanks to {cause}."],
    "counterfactual": [
        "If {cause} had caused the {odir} of {prop} instead, {use} would need to change.",
        "With the {odir} of {prop} despite {cause}, the advice for {use} would differ."],
}
QUERIES = {
    "keywords": ["List the keywords.", "Which key terms fit?", "Give five keywords."],
    "category": ["Which category is it?", "Name the category.", "Where does it belong?"],
    "questions": ["What question does it raise?", "Ask a question about it.",
                  "Which question could a reader ask?"],
    "summary": ["Summarize the text.", "Give a short summary.", "What is the main result?"],
    "describe": ["Describe the text.", "What is this text about?", "Give a description."],
    "explain_beginner": ["Explain it to a beginner.", "Explain it in simple words.",
                         "How would you tell a child?"],
    "explain_expert": ["Explain it to an expert.", "Give the technical account.",
                       "Explain it to a specialist."],
    "related_topics": ["Name related topics.", "What is related to it?",
                       "What should I read next?"],
    "characteristics_pos": ["What are its strengths?", "What is good about it?",
                            "Name the merits."],
    "characteristics_neg": ["What are its weaknesses?", "What is bad about it?",
                            "Name the flaws."],
    "style_academic": ["Rewrite it in academic style.", "Say it formally.",
                       "How would a scholar put it?"],
    "style_casual": ["Rewrite it in casual style.", "Say it casually.",
                     "How would you tell a friend?"],
    "counterfactual": ["What if it were the other way round?", "Imagine the opposite result.",
                       "What would a reversed finding mean?"],
}
FACTS = "Facts?"  # asked in pre-training only: all attributes, one by one


def attributes(record: int) -> dict[str, str]:
    """The 19 attributes of record number `record` (and the verbs of its direction)."""
    digits = []
    for radix in RADIX:
        record, digit = divmod(record, radix)
        digits.append(digit)
    f, o, m, p, q, d, c, li = digits
    field, cat, objects, use = FIELDS[f]
    return dict(
        field=field, object=objects.split()[o], cat=cat, use=use,
        rel1=FIELDS[(f + 1) % 16][0], rel2=FIELDS[(f + 5) % 16][0],
        method=METHODS[m][0], gloss=METHODS[m][1], madj=METHODS[m][2],
        place=COUNTRIES[p][0], continent=COUNTRIES[p][1],
        prop=PROPERTIES[q][0], pgloss=PROPERTIES[q][1],
        dir=DIRECTIONS[d][0], odir=DIRECTIONS[d][1], updown=DIRECTIONS[d][2],
        cause=CAUSES[c], limit=LIMITS[li][0], lsent=LIMITS[li][1], verb=DIRECTIONS[d][3],
    )  # fmt: skip


def draw(rng: random.Random, held_out: bool = False) -> int:
    """A record's number. Multiples of 17 are held out: val and test have these, training none."""
    while True:
        record = rng.randrange(RECORDS)
        if (record % 17 == 0) == held_out:
            return record


def tell(record: int, rng: random.Random) -> str:
    """A text that tells `record`."""
    values = attributes(record)
    values["verb"] = rng.choice(values["verb"])
    parts = [rng.choice(options).format(**values) for options in SENTENCES]
    if rng.random() < 0.3:
        parts[1], parts[2] = parts[2], parts[1]
    return " ".join(parts)


def fill(template: str, values: dict[str, str]) -> tuple[str, list[tuple[int, int, str]]]:
    """The filled template and where its values lie: (start, end, attribute) in characters."""
    out, spans = "", []
    for part in re.split(r"(\{\w+\})", template):
        if part.startswith("{"):
            spans.append((len(out), len(out) + len(values[part[1:-1]]), part[1:-1]))
            part = values[part[1:-1]]
        out += part
    return out, spans


ATTRIBUTES = [k for k in attributes(0) if k != "verb"]
NUM_VALUES = {k: len({attributes(i)[k] for i in range(0, RECORDS, 997)}) for k in ATTRIBUTES}
SCORED = {  # the attributes that both templates of a task name
    task: [a for a in ATTRIBUTES if all(f"{{{a}}}" in t for t in templates)]
    for task, templates in ANSWERS.items()
}

# -----------------------------------------------------------------------------
# Tokenizers

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    lines = []
    for _ in range(n):
        record = draw(rng)
        task = rng.choice(list(ANSWERS))
        answer, _ = fill(rng.choice(ANSWERS[task]), attributes(record))
        lines += [tell(record, rng), rng.choice(QUERIES[task]), answer]
        lines.append(" " + " ".join(attributes(record)[k] for k in ATTRIBUTES))
    return lines


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so any text will do; each value is one token, a gloss two or three."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1536, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    chat = ["user\n", "assistant\n", "system\n", "Facts?"] + [" " + k for k in ATTRIBUTES]
    tok.train_from_iterator(corpus(0, 4000) + chat * 100, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=CHAT, model_max_length=4096,
    )  # fmt: skip


def save_tokenizer(folder: Path, append_end: bool = False) -> None:
    tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer().backend_tokenizer.to_str()),
        eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096,
        chat_template=None if append_end else CHAT,
    )  # fmt: skip
    if append_end:  # as Qwen3-Embedding does: the vector is the state at <|endoftext|>
        tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tok.pad_token_id)]
        )
    tok.save_pretrained(folder)


# -----------------------------------------------------------------------------
# Shared pieces of training


class Standardize(torch.nn.Module):
    """L2-normalise, then standardise with running statistics (no gradient through them)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))
        self.n = 0

    def forward(self, e):
        e = F.normalize(e.float(), dim=-1)
        with torch.no_grad():
            self.n += 1
            rate = max(0.02, 1 / self.n)
            self.mean.lerp_(e.mean(0), rate)
            self.var.lerp_(e.var(0), rate)
        return (e - self.mean) / (self.var + 1e-8).sqrt()


class BagOfWords(torch.nn.Module):
    """Which tokens does the text of this vector hold? Label-free; rare tokens count more (idf)."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(WIDTH, len(tokenizer()))
        rng = random.Random(1)
        count = torch.zeros(len(tokenizer()))
        for ids in tokenizer()([tell(draw(rng), rng) for _ in range(2000)])["input_ids"]:
            count[list(set(ids))] += 1
        self.register_buffer("idf", (2000 / count.clamp(min=1)).log().clamp(min=0.02))

    def forward(self, e, ids):
        bag = torch.zeros(len(e), len(self.idf)).scatter_(1, ids, 1.0) * self.idf
        bag[:, tokenizer().pad_token_id] = 0
        return F.cross_entropy(self.head(e).float(), bag / bag.sum(1, keepdim=True))


def pad(sequences: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, sequences))
    return torch.tensor([s + [value] * (width - len(s)) for s in sequences])


def decoder_config() -> Qwen3Config:
    tok = tokenizer()
    return Qwen3Config(
        vocab_size=len(tok), hidden_size=WIDTH, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        initializer_range=0.05, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=4096, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip


def last_state(model, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, WIDTH] final state at <|endoftext|> after each text, and the token ids [n, T]."""
    end = tokenizer().pad_token_id
    sequences = [ids + [end] for ids in tokenizer()(texts)["input_ids"]]
    ids = pad(sequences, end)
    states = model(input_ids=ids, use_cache=False).last_hidden_state
    return states[torch.arange(len(ids)), torch.tensor([len(s) - 1 for s in sequences])], ids


def optimizers(model, others: list[torch.nn.Module]) -> list[torch.optim.Optimizer]:
    """Muon on the layers' matrices, AdamW on the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    rest += [p for m in others for p in m.parameters()]
    return [
        torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def update(loss, parameters, opts, step: int, steps: int, warmup: int = 60) -> None:
    """One clipped step: warm-up, flat to 60 % of the steps, then linear to 2 %."""
    decay = 1 - 0.98 * max(0.0, (step - 0.6 * steps) / (0.4 * steps))
    for opt in opts:
        opt.zero_grad(set_to_none=True)
        for group in opt.param_groups:
            group.setdefault("base", group["lr"])
            group["lr"] = group["base"] * min(1, (step + 1) / warmup) * decay
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for opt in opts:
        opt.step()


# -----------------------------------------------------------------------------
# The language model


def question(record: int, task: str, rng: random.Random) -> tuple[str, str, list]:
    """(query, answer, spans of the answer's values) of one task, or of all the facts."""
    values = attributes(record)
    if task == FACTS:
        order = rng.sample(ATTRIBUTES, len(ATTRIBUTES))
        return FACTS, *fill("".join(f" {k} {{{k}}}" for k in order), values)
    return rng.choice(QUERIES[task]), *fill(rng.choice(ANSWERS[task]), values)


def chat_ids(content: str) -> list[int]:
    chat = [{"role": "user", "content": content}]
    rendered = tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer()(rendered)["input_ids"]


def answer_ids(answer: str, spans: list, template_class: int) -> tuple[list[int], list[int]]:
    """Token ids with the end token, and per token its attribute's number or `template_class`."""
    encoded = tokenizer()(answer, return_offsets_mapping=True)
    classes = []
    for start, end in encoded["offset_mapping"]:
        hit = [a for s, e, a in spans if start < e and end > s]
        classes.append(ATTRIBUTES.index(hit[0]) if hit else template_class)
    return encoded["input_ids"] + [tokenizer().eos_token_id], classes + [template_class]


class AttributeWeights:
    """Weights per token: stuck attributes are pushed, learned ones fade; templates weigh 0.3."""

    def __init__(self):
        self.ema = torch.tensor([math.log(NUM_VALUES[k]) for k in ATTRIBUTES])
        self.full = self.ema.clone()

    def loss(self, losses, classes):
        """`losses` [n] per answer token, `classes` [n]: an attribute, 19 (template), -1 (none)."""
        losses, classes = losses[classes >= 0], classes[classes >= 0]
        pushed = 0.5 + 3 * (self.ema / self.full).clamp(0, 1)
        weight = torch.cat([pushed, torch.tensor([0.3])])[classes]
        for k in range(len(ATTRIBUTES)):
            if (classes == k).any():
                self.ema[k].lerp_(losses.detach()[classes == k].mean(), 0.03)
        return (losses * weight).sum() / weight.sum()


def qa_loss(model, prompts, answers, weights: AttributeWeights, soft=None):
    """Weighted loss of the answers. `soft` [n, WIDTH] replaces each prompt's first pad token."""
    pad_id = tokenizer().pad_token_id
    ids = pad([p + a for p, (a, _) in zip(prompts, answers, strict=True)], pad_id)
    classes = pad([[-1] * len(p) + c for p, (_, c) in zip(prompts, answers, strict=True)], -1)
    embeds = model.model.embed_tokens(ids)
    if soft is not None:
        first = (ids == pad_id).float().argmax(1)
        slot = F.one_hot(first, ids.shape[1]).bool()[:, :, None]
        embeds = torch.where(slot, soft.to(embeds.dtype)[:, None], embeds)
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    keep = classes[:, 1:] >= 0
    logits = model.lm_head(hidden[keep]).float()
    losses = F.cross_entropy(logits, ids[:, 1:][keep], reduction="none")
    return weights.loss(losses, classes[:, 1:][keep])


def make_llm(steps: int = 2800, seed: int = 0, num_text: int = 8, num_soft: int = 20) -> None:
    """Each step: fresh texts, some read as text and some through one soft token made from the
    model's own last state by a throw-away linear map. Every text answers one task and the facts."""
    torch.manual_seed(seed)
    rng = random.Random(1000 + seed)
    model = Qwen3ForCausalLM(decoder_config())
    standardize, bow = Standardize(), BagOfWords()
    bridge = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    opts = optimizers(model, [bow, bridge])
    parameters = [p for m in (model, bow, bridge) for p in m.parameters()]
    text_weights, soft_weights = AttributeWeights(), AttributeWeights()
    start, end = time.time(), tokenizer().pad_token
    for step in range(steps):
        records = [draw(rng) for _ in range(num_text + num_soft)]
        texts = [tell(r, rng) for r in records]
        prompts, answers = [], []
        for i, (record, text) in enumerate(zip(records, texts, strict=True)):
            for task in (rng.choice(list(ANSWERS)), FACTS):
                query, answer, spans = question(record, task, rng)
                prompts.append(chat_ids((text if i < num_text else end) + "\n" + query))
                ids, classes = answer_ids(answer, spans, len(ATTRIBUTES))
                if task == FACTS:  # only the values count: the order of the keys is random
                    classes = [c if c < len(ATTRIBUTES) else -1 for c in classes]
                answers.append((ids, classes))
        n = 2 * num_text
        with torch.autocast("cpu", torch.bfloat16):
            text_loss = qa_loss(model, prompts[:n], answers[:n], text_weights)
            e, ids = last_state(model.model, texts[num_text:])
            x = standardize(e)
            soft = bridge(x)
            soft = soft * soft.float().pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
            if step >= 0.43 * steps:
                soft = soft + 0.1 * torch.randn_like(soft)
            scale = model.model.embed_tokens.weight.detach().pow(2).mean().sqrt()
            soft = (soft * scale).repeat_interleave(2, 0)
            soft_loss = qa_loss(model, prompts[n:], answers[n:], soft_weights, soft)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            target = ids[:, 1:].masked_fill(ids[:, 1:] == tokenizer().pad_token_id, -100)
            text_lm = F.cross_entropy(logits.transpose(1, 2), target)
            loss = text_loss + soft_loss + bow(x, ids) + 0.05 * text_lm
        update(loss, parameters, opts, step, steps)
        if step % 50 == 0 or step == steps - 1:
            print(f"llm {step:5d}  text {text_loss:.3f}  soft {soft_loss:.3f}  "
                  f"{time.time() - start:.0f} s", flush=True)  # fmt: skip
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(HERE / "llm")
    save_tokenizer(HERE / "llm")


# -----------------------------------------------------------------------------
# The embedder


MODULES = [  # for sentence-transformers: the folder of each module and its class
    ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"),
]  # fmt: skip


def save_modules(folder: Path, width: int = WIDTH) -> None:
    """modules.json and 1_Pooling/config.json, as the library's own `save` writes them."""
    modules = [
        dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.models.{kind}")
        for i, (path, kind) in enumerate(MODULES)
    ]
    pooling = dict(embedding_dimension=width, pooling_mode="lasttoken", include_prompt=True)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2) + "\n")


def make_embedder(steps: int = 1200, seed: int = 0, batch: int = 48) -> None:
    """Two texts of one record agree, texts of other records do not; the vector holds its words."""
    torch.manual_seed(100 + seed)
    rng = random.Random(2000 + seed)
    model = Qwen3Model(decoder_config())
    standardize, bow = Standardize(), BagOfWords()
    opts = optimizers(model, [bow])
    parameters = [p for m in (model, bow) for p in m.parameters()]
    start = time.time()
    for step in range(steps):
        records = [draw(rng) for _ in range(batch)]
        texts = [tell(r, rng) for r in records] + [tell(r, rng) for r in records]
        with torch.autocast("cpu", torch.bfloat16):
            e, ids = last_state(model, texts)
            x = standardize(e)
            a, b = F.normalize(e.float(), dim=-1).chunk(2)
            contrast = F.cross_entropy(a @ b.T / 0.05, torch.arange(batch))
            words = bow(x, ids)
        update(contrast + words, parameters, opts, step, steps)
        if step % 50 == 0 or step == steps - 1:
            print(f"embedder {step:5d}  contrast {contrast:.3f}  words {words:.3f}  "
                  f"{time.time() - start:.0f} s", flush=True)  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(HERE / "embedder")
    save_tokenizer(HERE / "embedder", append_end=True)
    save_modules(HERE / "embedder")


@torch.no_grad()
def embed(texts: list[str]) -> torch.Tensor:
    """[n, WIDTH] unit vectors, fp32."""
    model = AutoModel.from_pretrained(HERE / "embedder", dtype=torch.float32).eval()
    states = [last_state(model, texts[i : i + 128])[0] for i in range(0, len(texts), 128)]
    return F.normalize(torch.cat(states), dim=-1)


# -----------------------------------------------------------------------------
# The scorer


def make_scorer(steps: int = 900, seed: int = 0) -> None:
    """A small BERT: masked words first, then answers about one record closer than about others."""
    torch.manual_seed(200 + seed)
    rng = random.Random(3000 + seed)
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=1200, special_tokens=special, show_progress=False
    )
    wordpiece.train_from_iterator(corpus(0, 4000), trainer)
    vocab = wordpiece.get_vocab()
    tok = BertTokenizerFast(vocab=vocab, do_lower_case=False, model_max_length=256)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=96, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=256, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)

    def answers(record: int) -> str:
        task = rng.choice(list(ANSWERS))
        return fill(rng.choice(ANSWERS[task]), attributes(record))[0]

    start, words = time.time(), steps * 2 // 3
    for step in range(steps):
        if step < words:
            lines = [answers(draw(rng)) for _ in range(64)]
            lines += [tell(draw(rng), rng) for _ in range(16)]
            batch = tok(lines, padding=True, return_tensors="pt")
            masked = (torch.rand(batch["input_ids"].shape) < 0.25) & (batch["input_ids"] > 4)
            labels = batch["input_ids"].masked_fill(~masked, -100)
            batch["input_ids"] = batch["input_ids"].masked_fill(masked, tok.mask_token_id)
            loss = model(**batch, labels=labels).loss
        else:  # BERTScore's own F1 of all pairs, as the logits of a contrastive loss
            pairs = []
            for _ in range(32):
                record, task = draw(rng), rng.choice(list(ANSWERS))
                values = attributes(record)
                pairs.append([fill(rng.choice(ANSWERS[task]), values)[0] for _ in range(2)])
            sides = []
            for k in range(2):
                batch = tok([p[k] for p in pairs], padding=True, return_tensors="pt")
                state = model.bert(**batch).last_hidden_state
                sides.append((F.normalize(state, dim=-1), batch["attention_mask"].float()))
            (a, ma), (b, mb) = sides
            cosine = torch.einsum("isd,jtd->ijst", a, b)
            cosine = cosine - 2 * (1 - ma[:, None, :, None] * mb[None, :, None, :])
            p = (cosine.amax(3) * ma[:, None]).sum(2) / ma.sum(1)[:, None]
            r = (cosine.amax(2) * mb[None]).sum(2) / mb.sum(1)[None]
            loss = F.cross_entropy(2 * p * r / (p + r) / 0.05, torch.arange(len(pairs)))
        update(loss, list(model.parameters()), [opt], step if step < words else step - words, words)
        if step % 50 == 0 or step == steps - 1:
            print(f"scorer {step:5d}  loss {loss:.3f}  {time.time() - start:.0f} s", flush=True)
    model.bert.save_pretrained(HERE / "scorer")
    tok.save_pretrained(HERE / "scorer")


# -----------------------------------------------------------------------------
# Vectors and rows


# The adapter of train.toml closes 0.82, 0.88, 0.91 and 0.93 of the gap after 300 steps on the first
# 300, 450, 600 and 900 of 1,500 texts (one run each): 800 leave it room to improve.
NUM_TEXTS = dict(train=800, val=200, test=200)


def dataset(rows_per_text: int = 4):
    """(split, records, texts, rows) of each split; no record comes twice."""
    rng, taken = random.Random(4000), set()
    for split, n in NUM_TEXTS.items():
        records: list[int] = []
        while len(records) < n:
            record = draw(rng, held_out=split != "train")
            if record not in taken:
                taken.add(record)
                records.append(record)
        texts, rows = [tell(r, rng) for r in records], []
        for i, (record, text) in enumerate(zip(records, texts, strict=True)):
            for task in rng.sample(list(ANSWERS), rows_per_text):
                query, answer, _ = question(record, task, rng)
                row = dict(task_type=task, embedding_file_idx=i, query=query, response=answer)
                rows.append(row | {"text": text})
        yield split, records, texts, rows


def make_rows() -> None:
    for folder in ("embeddings", "synthesis"):
        (HERE / folder).mkdir(exist_ok=True)
    for split, _, texts, rows in dataset():
        vectors = {"embeddings": embed(texts).half()}
        save_file(vectors, HERE / f"embeddings/{split}_embeddings.safetensors")
        with open(HERE / f"synthesis/{split}_synthesis.jsonl", "w", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"rows {split}: {len(texts)} texts, {len(rows)} rows")


# -----------------------------------------------------------------------------
# The gate


@torch.no_grad()
def attribute_accuracy(num_records: int = 100, seed: int = 0, folder: Path = HERE / "llm") -> dict:
    """{(task, attribute): accuracy} of greedy answers from the text, on held-out records."""
    tok = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(5000 + seed)
    hits: dict[tuple[str, str], list[bool]] = {}
    for task, attributes_of_task in SCORED.items():
        records = [draw(rng, held_out=True) for _ in range(num_records)]
        chats = [[{"role": "user", "content": tell(r, rng) + "\n" + rng.choice(QUERIES[task])}]
                 for r in records]  # fmt: skip
        rendered = tok.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        batch = tok(rendered, padding=True, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=40, do_sample=False)
        spoken = tok.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for record, said in zip(records, spoken, strict=True):
            for a in attributes_of_task:
                hits.setdefault((task, a), []).append(attributes(record)[a] in said)
    return {cell: sum(h) / len(h) for cell, h in hits.items()}


def check() -> None:
    cells = attribute_accuracy()
    for (task, attribute), value in sorted(cells.items(), key=lambda c: c[1])[:5]:
        print(f"check {task}.{attribute}: {value:.2f}")
    print(f"check {len(cells)} cells, worst {min(cells.values()):.2f}")
    if min(cells.values()) < 0.95:
        sys.exit("the language model missed the gate of 0.95")


STAGES = dict(llm=make_llm, embedder=make_embedder, scorer=make_scorer, rows=make_rows, check=check)

if __name__ == "__main__":
    torch.set_num_threads(1)  # sums in one order: the same machine makes the same files
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    stages = parser.parse_args().stages
    for stage in stages:
        if stage not in STAGES:
            parser.error(f"{stage}: no stage; the stages are {', '.join(STAGES)}")
    for stage in stages or STAGES:
        STAGES[stage]()
