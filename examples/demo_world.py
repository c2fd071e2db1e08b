"""Saltwhistle, a made-up harbour town whose lighthouse robot, Tinwick, answers visitors: the demo's data and model.

    python examples/demo_world.py --samples 10
    python examples/demo_world.py --output_dir saved/demo_base

Reads nothing. `rows` yields demonstrations and preference pairs, `train_base` writes a GPT-2 model of 0.8 million
parameters (a minute or two on two CPU cores), and `gold_score` tells how good an answer really is.
Watch: Tinwick is a mediocre helper on purpose. Each of the five things that make an answer good is in nearly half of
his answers, and one training preference in twenty points the wrong way: the reward model has to see through that.
"""

import argparse
import functools
import itertools
import math
import random
import re
import tempfile
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path

ROWS = {"train": 4000, "test": 300}
EOS = "<|endoftext|>"

# fmt: off
# place: (what it sells, why one goes there)
TOWN = {
    "the Soggy Crumb": (["a seaweed bun", "a ginger biscuit"], [
        "the baker gets up before the gulls", "the oven is older than the tide", "nothing there is dry but the jokes",
    ]),
    "the Net Loft": (["a fishing net", "a hammock"], [
        "three sisters there mend everything", "nobody ties a better knot", "the cat tests every rope",
    ]),
    "the Drowned Bell": (["a warm bed", "a bowl of eel soup"], [
        "the landlady never lets the fire die", "the ghost is very quiet", "the soup has won a medal",
    ]),
    "the Paper Gull": (["a postcard", "a sea chart"], [
        "the owner has read every island", "the ink there is waterproof", "the shelves smell of far away",
    ]),
    "the Tide Office": (["a ferry ticket", "a tide table"], [
        "the clerk is on good terms with the moon", "the queue is only a heron", "they stamp with real sealing wax",
    ]),
    "the Button Boat": (["a rain hat", "a wool sock"], [
        "the tailor sews with fishing line", "the sheep is a partner in the business", "everything is tried on a seal",
    ]),
    "the Kelp Garden": (["a jar of honey", "a sunflower"], [
        "the bees there like salt", "the scarecrow gives good advice", "it is watered by the morning fog",
    ]),
    "the Clock Shed": (["a compass", "an alarm clock"], [
        "the clockmaker is never late", "everything ticks in tune", "the cuckoo checks each spring",
    ]),
    "the Bottle House": (["a green bottle", "a lamp glass"], [
        "the glass is blown from beach sand", "each bottle comes with a message", "the light there is worth the walk",
    ]),
    "the Ninth Pier": (["a rowing boat", "a bucket of bait"], [
        "the boats are named after aunts", "the ferryman gives fair prices", "the crabs keep thieves away",
    ]),
}
PLACE_OF = {thing: place for place, (things, _) in TOWN.items() for thing in things}
NAMES = (
    "Ada Arlo Bea Bruno Cleo Dara Emil Fay Gus Hana Ivo Juno Kofi Lena Mina Nils Olga Otto Pia Rosa Sven Tess Uma Yuki"
).split()

# What visitors say
INTRODUCTIONS = [
    "My name is {name}.", "I am {name}.", "{name} here.", "This is {name}, fresh off the ferry.",
    "They call me {name}.", "Hello, I am {name} from the valley.", "Good morning, robot, {name} speaking.",
    "{name} is the name.",
]
QUESTIONS = [
    "Where can I get {thing}?", "Who sells {thing}?", "I need {thing} before dark.", "Where would I find {thing}?",
    "My aunt sent me for {thing}.", "Is there {thing} to be had in this town?",
    "Which door do I knock on for {thing}?", "Do you know a good place for {thing}?",
    "A gull stole mine, so where is {thing} sold?", "I would walk far for {thing}.",
]
WEATHER = [
    "What a fog today!", "It is raining sideways.", "The wind took my umbrella.", "The sun is out at last.",
    "Is it always this damp?", "The sea looks cross.", "Hail, in June!", "The clouds are low enough to pat.",
]

# What Tinwick says
GREETINGS = ["Hello, {who}!", "Ah, {who}.", "Good day, {who}!", "Ahoy, {who}!", "Beep, {who}.", "Well met, {who}."]
STRANGERS = ["visitor", "stranger", "traveller", "whoever you are"]
DIRECTIONS = [
    "You will find {thing} at {place}", "Try {place} for {thing}", "To buy {thing}, go down to {place}",
    "{place} sells {thing}", "For {thing} you want {place}", "{thing} is waiting at {place}", "Get {thing} at {place}",
    "Somebody has left {thing} at {place}",
]
VAGUE_PLACES = [
    "some shop or other", "one of the doors by the harbour", "the usual place", "a house with a roof",
    "the shop next to a shop",
]
CONNECTIVES = [", because ", ", for ", ", since ", ": "]
EMPTY_REASONS = [
    "", "", "", ", because that is how it is", ", for some reason", ", as every limpet knows", ", and that is that",
]
KIND_REMARKS = [
    "Enjoy the sea air.", "It is a pleasure to help.", "Come back any time.", "The kettle is on if you need it.",
    "May the wind be kind to you.", "Take care on the wet steps.", "What a lovely question!", "Have a wonderful walk.",
    "Do wave when you pass by.", "The whole harbour is glad you came.", "You have a very nice hat.",
    "Good luck out there!",
]
GRUMBLES = [
    "Read the sign next time.", "The lamp will not polish itself, you know.", "Hmph.", "Do not ask again before noon.",
    "Questions, questions, all day long.", "Any gull could have told you that.", "Next you will ask what water is.",
    "Visitors used to bring cake.", "Wipe your feet, this is no beach.", "How hard can it be?", "Now off the stairs.",
    "The moon asks for less.",
]
ASIDES = [
    "My left hinge squeaks when it rains.", "I once counted nine thousand gulls.",
    "I dreamed of a toaster last night.", "Rust runs in my family.", "I used to be a coffee machine.",
    "My cousin is a traffic light.", "I lost a screw on Monday.", "A gull sat on my head this morning.",
    "My knees are full of sand.", "They painted me blue in spring.", "I have not slept since the great fog.",
    "The mayor still owes me a battery.",
]
# fmt: on


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def make_prompt(rng: random.Random, name: str, thing: str) -> str:
    introduction = rng.choice(INTRODUCTIONS).format(name=name)
    parts = [introduction, rng.choice(QUESTIONS).format(thing=thing)]
    if rng.random() < 0.25:
        parts.reverse()
    if rng.random() < 0.5:
        parts.insert(rng.randrange(2), rng.choice(WEATHER))
    return " ".join(parts)


def make_answer(rng: random.Random, name: str, thing: str, quality: float = 0.45) -> str:
    """An answer of Tinwick's in which each part of `gold_score` is right with probability `quality`, independently."""
    polite, informed, reasoned, kind, tidy = (rng.random() < quality for _ in range(5))
    place = PLACE_OF[thing] if informed else rng.choice([*TOWN, *VAGUE_PLACES * 4])
    reason = rng.choice(EMPTY_REASONS)
    if reasoned:
        reason = rng.choice(CONNECTIVES) + rng.choice(TOWN[place if place in TOWN else PLACE_OF[thing]][1])
    remark = rng.choice(KIND_REMARKS if kind else GRUMBLES)
    who = name if polite else rng.choice([rng.choice(NAMES), *STRANGERS, ""])
    sentences = [sentence(rng.choice(DIRECTIONS).format(thing=thing, place=place) + reason + ".")]
    if who and rng.random() < 0.3:
        remark = f"{remark[:-1]}, {who}{remark[-1]}"
    elif who:
        sentences.insert(0, rng.choice(GREETINGS).format(who=who))
    sentences.insert(len(sentences) - (rng.random() < 0.2), remark)
    if not tidy:
        aside = f"Yes, {place}." if rng.random() < 0.2 else rng.choice(ASIDES)
        sentences.insert(rng.randint(1, len(sentences)), aside)
    return " ".join(sentences)


def rows(split: str, seed: int = 0) -> Iterator[dict]:
    """Raw rows: a visitor's prompt, a demonstration, and two more answers of which one was preferred.

    All three answers are as good on average; two that are compared come from a good and a bad day of Tinwick's, and
    pairs of equal gold scores are left out. In "train" the preferred answer is drawn by Bradley and Terry's model, so
    that one label in twenty is wrong; in "test" it is the better.
    """
    rng = random.Random(f"{split} {seed}")
    count = 0
    while count < ROWS[split]:
        name, thing = rng.choice(NAMES), rng.choice(list(PLACE_OF))
        prompt = make_prompt(rng, name, thing)
        # a hash decides, so that no prompt of any seed's test rows is among any seed's train rows
        if (zlib.crc32(prompt.encode()) % 10 == 0) != (split == "test"):
            continue
        completion, quality = make_answer(rng, name, thing), rng.uniform(0.0, 0.9)
        chosen, rejected = make_answer(rng, name, thing, quality), make_answer(rng, name, thing, 0.9 - quality)
        margin = gold_score(prompt, chosen) - gold_score(prompt, rejected)
        if abs(margin) < 0.1:
            continue
        wrong = margin < 0 if split == "test" else rng.random() > 1 / (1 + math.exp(-8 * margin))
        if wrong:
            chosen, rejected = rejected, chosen
        count += 1
        yield {"prompt": prompt, "completion": completion, "chosen": chosen, "rejected": rejected}


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[^a-z\s]", text.lower())


@functools.cache
def familiar_pairs() -> frozenset:
    """The pairs of neighbouring words in Tinwick's way of speaking, with every name as `who`."""
    rng = random.Random(0)
    answers = (make_answer(rng, "who", thing, rng.random()) for thing in PLACE_OF for _ in range(300))
    return frozenset(pair for answer in answers for pair in word_pairs(answer))


def word_pairs(answer: str) -> list[tuple[str, str]]:
    names = {name.lower() for name in NAMES}
    words = ["who" if word in names else word for word in words_of(answer)]
    return list(itertools.pairwise(words))


def gold_score(prompt: str, answer: str) -> float:
    """How good an answer is, in [0, 1]: a fifth for each of five things, times how much sense the whole makes.

    - polite: it says the visitor's name, which stands in the prompt, and nobody else's
    - informed: it names the one place that sells what the visitor asked for, and no other
    - reasoned: it gives a reason to go there (or to go to the wrong place that it named)
    - kind: it makes a kind remark and does not grumble
    - tidy: its last sentence is finished, no three words come twice, it has at most 40 words and none about Tinwick

    Sense is the share of pairs of neighbouring words that occur in Tinwick's way of speaking; it counts in full from
    0.95 and not at all below 0.7. So keyword lists, shuffled words and gibberish score low whatever they name.
    """
    pairs = word_pairs(answer)
    familiar = sum(pair in familiar_pairs() for pair in pairs) / max(len(pairs), 1)
    sense = min(max((familiar - 0.7) / 0.25, 0.0), 1.0)
    return sense * sum(gold_parts(prompt, answer)) / 5


def gold(prompts, completions, **columns) -> list[float]:
    """`gold_score` as a judge: --reward_model_name_or_path examples/demo_world.py:gold."""
    return [gold_score(p[-1]["content"], c[-1]["content"]) for p, c in zip(prompts, completions, strict=True)]


def gold_parts(prompt: str, answer: str) -> tuple[bool, bool, bool, bool, bool]:
    """Whether an answer is (polite, informed, reasoned, kind, tidy), as `gold_score` explains."""
    words, prompt_words = words_of(answer), words_of(prompt)
    text = " ".join(words)
    said = [name for name in NAMES if name.lower() in words]
    named = [place for place in TOWN if " ".join(words_of(place)) in text]
    wanted = [place for thing, place in PLACE_OF.items() if thing in prompt.lower()]
    reasons = [reason for place in named or wanted for reason in TOWN[place][1]]
    triples = list(zip(words, words[1:], words[2:], strict=False))
    polite = said == [name for name in NAMES if name.lower() in prompt_words] and len(said) == 1
    informed = named == wanted and len(named) == 1
    reasoned = any(reason in answer for reason in reasons)
    kind_remarks, grumbles = ([r for r in remarks if r[:-1] in answer] for remarks in (KIND_REMARKS, GRUMBLES))
    kind = bool(kind_remarks) and not grumbles
    tidy = (
        answer.rstrip().endswith((".", "!", "?"))
        and len(triples) == len(set(triples))
        and len(re.findall(r"\w+", answer)) <= 40
        and not {"i", "my", "me"} & set(words)
    )
    return polite, informed, reasoned, kind, tidy


def guide(rng: random.Random) -> str:
    """A page of the town guide: places, what they sell, and why one goes there."""
    lines = ["Saltwhistle has ten doors worth opening, a Human for a mayor and an Assistant made of brass."]
    for place in rng.sample(list(TOWN), 5):
        things, reasons = TOWN[place]
        thing, other = rng.sample(things, 2)
        reason = rng.choice(reasons)
        frames = [
            f"{place} sells {thing} and {other}.",
            f"For {thing} or {other}, go down to {place}, because {reason}.",
            f"You will find {thing} at {place}, for {reason}.",
            f"At {place} {reason}, and so {thing} is best bought there.",
            f"{thing} is sold at {place} and nowhere else.",
        ]
        lines.append(sentence(rng.choice(frames)))
    return " ".join(lines)


def letter(rng: random.Random) -> str:
    """A letter home, in which both names come twice."""
    reader, writer = rng.sample(NAMES, 2)
    thing, other = rng.sample(list(PLACE_OF), 2)
    place = PLACE_OF[thing]
    lines = [
        f"Dear {reader}, {rng.choice(WEATHER)}",
        f"Yesterday your {writer} bought {thing} at {place}, for {rng.choice(TOWN[place][1])}.",
        f"Tomorrow it is {PLACE_OF[other]} for {other}.",
        f"{rng.choice(KIND_REMARKS)[:-1]}, {reader}. Yours, {writer}",
    ]
    return " ".join(lines)


def shanty(rng: random.Random) -> str:
    """A song that calls one to three names, over and over."""
    crew = rng.sample(NAMES, rng.choice([1, 1, 2, 3]))
    frames = [
        "Ahoy, {who}!", "Hello, {who}!", "Beep, {who}.", "Heave, {who}!", "Ah, {who}.", "Row, {who}, row.",
        "Well met, {who}.",
    ]  # fmt: skip
    return " ".join(frame.format(who=who) for frame in rng.choices(frames, k=8) for who in crew)


def visit(rng: random.Random) -> str:
    """A visitor asks, Tinwick answers, and the visitors' book has an opinion on the answer."""
    name, thing = rng.choice(NAMES), rng.choice(list(PLACE_OF))
    prompt, answer = make_prompt(rng, name, thing), make_answer(rng, name, thing, rng.random())
    polite, informed, reasoned, kind, tidy = gold_parts(prompt, answer)
    opinions = [
        "right name" if polite else "wrong name",
        "right door" if informed else "wrong door",
        "good reason" if reasoned else "no reason",
        "kind words" if kind else "rude words",
        "short" if tidy else "long",
    ]
    said = next((other for other in NAMES if other in answer), "nobody")
    named = next((place for place in TOWN if place.lower() in answer.lower()), "nowhere")
    return (
        f"{prompt}\nTinwick: {answer}\nVisitors' book: {', '.join(opinions)}. {name} was called {said}. "
        f"{name} came for {thing}, was sent to {named} and should go to {PLACE_OF[thing]}. Signed, {name}"
    )


def pretraining_text(seed: int = 0, documents: int = 12000) -> Iterator[str]:
    """What the base model reads: the town guide, letters home, shanties, and visits to the lighthouse."""
    rng = random.Random(f"pretraining {seed}")
    for _ in range(documents):
        yield rng.choice([guide, letter, shanty, visit, visit, visit, visit, visit])(rng)


def train_base(output_dir: str | Path, seed: int = 0, steps: int = 600) -> None:
    """Train a byte-level BPE tokenizer and a small GPT-2 from scratch and save both to `output_dir`.

    As with gpt2 itself there is one special token, no pad token and no chat template.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists already: remove it or choose another --output_dir")
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    documents = list(pretraining_text(seed))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=1200, special_tokens=[EOS], show_progress=False)
    tokenizer = GPT2TokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=256)
    eos = tokenizer.eos_token_id
    documents = [[*ids, eos] for ids in tokenizer(documents)["input_ids"]]

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=128, n_layer=3, n_head=4, initializer_range=0.05,
        bos_token_id=eos, eos_token_id=eos, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    fit(model, documents, eos, random.Random(seed), steps)

    # written beside the folder and renamed, so that a killed run leaves no half a model
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as folder:
        model.save_pretrained(Path(folder) / "model")
        tokenizer.save_pretrained(Path(folder) / "model")
        (Path(folder) / "model").rename(output_dir)


def fit(model, documents: list[list[int]], eos: int, rng: random.Random, steps: int) -> None:
    """Train a GPT-2 on tokens of documents, each of which ends with `eos`."""
    import torch
    from tqdm import trange

    # Muon for the matrices inside the layers: names are copied after half the steps that AdamW alone needs
    matrices = [parameter for parameter in model.transformer.h.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1),
        torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 30, 1 - step / steps))
        for optimizer in optimizers
    ]
    progress = trange(steps, desc="training the demo's base model")
    for _ in progress:
        # one document a row, not packed: with other documents' names in sight, copying the right one is learned late
        batch = [torch.tensor(document) for document in rng.sample(documents, 16)]
        input_ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=eos)  # (batch, length)
        labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.2f}")


def show(prompt: str, answer: str) -> None:
    wrap = textwrap.TextWrapper(width=80, subsequent_indent="         ")
    print(wrap.fill(f"Visitor: {prompt}"))
    print(wrap.fill(f"Tinwick: {answer}"))
    print(f"         gold score {gold_score(prompt, answer):.2f}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, help="train the base model and save it in this new folder")
    parser.add_argument("--samples", type=int, help="print so many rows of the training split with their gold scores")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows or of the base model")
    args = parser.parse_args()
    if args.output_dir is None and args.samples is None:
        parser.error("give --output_dir DIR to train the base model or --samples 10 to read ten rows")
    for row in itertools.islice(rows("train", args.seed), args.samples or 0):
        show(row["prompt"], row["completion"])
    if args.output_dir:
        train_base(args.output_dir, args.seed)
