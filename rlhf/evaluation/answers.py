"""Answers of models to held-out prompts: sampled, kept in a file as they come, measured and judged.

Models are compared by text, so they may have different tokenizers. All draw with the same random numbers, which follow
from seed, prompt and sample alone: not from the batch, nor from what was interrupted where.
"""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from rlhf.models.fingerprints import tokenizer_sha256, weights_sha256
from rlhf.models.loading import load_frozen_policy, load_tokenizer, max_positions, resolve_model
from rlhf.models.rendering import Unrenderable, encode_demonstration, encode_dialogue, encode_prompt
from rlhf.models.rollout import generate, logits_of, read_answers, stop_ids
from rlhf.models.templates import split_template
from rlhf.user_error import UserError, visible


class Answer(NamedTuple):
    ids: list[int]  # as the model sampled them, with the stop token
    text: str
    ended: bool  # by itself, with a stop token


class Contestant:
    """A policy that answers, with its tokenizer.

    Raises:
        UserError: if its positions leave no room for a prompt beside an answer of `response_length` tokens.
    """

    def __init__(
        self,
        name: str,
        label: str,
        response_length: int,
        max_prompt_length: int | None,
        device="cpu",
        system_prompt: str | None = None,
    ):
        self.name, self.label, self.response_length = name, label, response_length
        self.refused = Counter()  # prompts that cannot be rendered, by reason
        self.tokenizer = load_tokenizer(name, system_prompt=system_prompt)
        if system := split_template(self.tokenizer.chat_template)[0]:
            print(f"{label}: system prompt of rows without one: {visible(system)[:200]!r}")
        self.policy = load_frozen_policy(name, self.tokenizer).to(device)
        self.stop_ids = stop_ids(self.policy, self.tokenizer)
        self.positions = max_positions(self.policy)
        if self.positions - response_length < 8:
            raise UserError(
                f"--response_length {response_length} leaves no room for a prompt in the {self.positions} positions of"
                f" {name}"
            )
        self.room = min(self.positions - response_length, max_prompt_length or self.positions)

    def fingerprint(self, **settings) -> str:
        """A hash of all that decides the answers: weights, tokenizer, and how they are sampled."""
        base, adapter = resolve_model(self.name)
        hashes = [weights_sha256(name) or name for name in (base, adapter) if name]
        limits = [sorted(self.stop_ids), self.response_length, self.room]
        parts = [*hashes, tokenizer_sha256(self.tokenizer), *limits, settings]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def prompt_ids(self, prompt) -> list[int] | None:
        """The prompt's tokens, shortened to leave room for the answer; None if it cannot be rendered."""
        try:
            return encode_prompt({"prompt": prompt}, self.tokenizer, max_prompt_length=self.room)["prompt_ids"]
        except Unrenderable as reason:
            self.refused[str(reason)] += 1
            return None

    def sample(self, prompts: list[list[int]], noise, temperature: float, **narrow) -> list[Answer]:
        options = {"stop_ids": self.stop_ids, "pad_id": self.tokenizer.pad_token_id, "temperature": temperature}
        tokens = generate(self.policy, prompts, noise, **options, **narrow)[0]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
        return [Answer(ids, text, ids[-1] in self.stop_ids) for ids, text in zip(tokens, texts, strict=True)]


def batches(sizes: list[int], batch_size: int, what: str):
    """Indices of rows in batches of like size, the largest first (what does not fit in memory fails at once)."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    with tqdm(total=len(order), desc=what, unit=" rows", leave=False, dynamic_ncols=True) as bar:
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]
            bar.update(len(order[start : start + batch_size]))


def prompt_key(prompt) -> str:
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]


def noise_for(seed: int, key: str, sample: int, length: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {key} {sample}".encode()).digest()
    return torch.rand(length, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")))


def answer_line(place: tuple[str, int], made: Answer) -> str:
    """A line of the file of kept answers, with its own hash."""
    row = {"prompt": place[0], "sample": place[1], **made._asdict()}
    return json.dumps(row | {"hash": prompt_key(row)}) + "\n"


def stored_answers(path: Path) -> dict[tuple[str, int], Answer]:
    """The answers in a file, by prompt and sample; lines that are not as they were written are cut out, and said."""
    if not path.exists():
        return {}
    lines = path.read_bytes().decode(errors="replace").split("\n")
    found, damaged = {}, 0
    for line in filter(None, lines):
        try:
            row = json.loads(line)
            place, made = (row["prompt"], row["sample"]), Answer(row["ids"], row["text"], row["ended"])
        except (ValueError, TypeError, KeyError):
            made = None
        if made and answer_line(place, made) == f"{line}\n":
            found[place] = made
        else:
            damaged += 1
    if damaged or lines[-1]:
        print(f"{path}: {damaged} kept answers are cut short or damaged and are sampled anew")
        path.write_text("".join(answer_line(*item) for item in found.items()), encoding="utf-8")
    return found


def answer(model: Contestant, rows: list[dict], folder: Path, *, samples, temperature, seed, batch_size, **narrow):
    """Each row's answers, `samples` of them, or None for a row whose prompt the model cannot render.

    They are appended to a file in the folder batch by batch, named by all that decides them, and read from there
    by the next evaluation with the same settings; `narrow` has top_p and top_k where they are on.

    Raises:
        KeyboardInterrupt: with a message that says what there is.
    """
    fingerprint = model.fingerprint(temperature=temperature, seed=seed, **narrow)
    path = folder / f"{model.label.replace('/', '_')}_{fingerprint}.jsonl"
    found = stored_answers(path)
    prompts = {prompt_key(row["prompt"]): model.prompt_ids(row["prompt"]) for row in rows}
    wanted = [(key, i) for key, ids in prompts.items() if ids for i in range(samples)]
    missing = [place for place in wanted if place not in found]
    if len(missing) < len(wanted):
        print(f"{model.label}: {len(wanted) - len(missing)} of {len(wanted)} answers are in {path} already")
    try:
        with path.open("a", encoding="utf-8") as file:
            for chosen in batches([len(prompts[key]) for key, _ in missing], batch_size, f"answers of {model.label}"):
                places = [missing[i] for i in chosen]
                noise = torch.stack([noise_for(seed, *place, model.response_length) for place in places])
                sampled = model.sample([prompts[key] for key, _ in places], noise, temperature, **narrow)
                for place, made in zip(places, sampled, strict=True):
                    found[place] = made
                    file.write(answer_line(place, made))
                file.flush()
    except KeyboardInterrupt:
        done = sum(place in found for place in wanted)
        raise KeyboardInterrupt(
            f"{done} of {len(wanted)} answers of {model.label} are in {path}; the same command goes on"
        ) from None
    keys = [prompt_key(row["prompt"]) for row in rows]
    return [[found[key, i] for i in range(samples)] if prompts[key] else None for key in keys]


@torch.no_grad()
def measure(model: Contestant, baseline: Contestant | None, rows, answers: list[Answer], temperature, batch_size):
    """What the models think of the answers: a dict a row.

    "logprob" of the answer and its "tokens"; "kl" to the baseline, in nats over the whole answer, "kl_by" tokens or
    text; "reference_logprob" and "reference_tokens" of the data's own answer, at temperature 1, where one fits.

    Where both models have the same tokens, the KL is summed over the answer's tokens of the KL of the next token's
    distributions. Over answers that the model sampled its mean is that of log-ratios, which is the KL of the whole
    answers (the chain rule), with less noise, never negative, and exactly 0 between equals. Other tokenizers leave the
    log-ratio of the texts, each by its own tokens.
    """
    prompts = [model.prompt_ids(row["prompt"]) for row in rows]
    measured = [{} for _ in rows]
    by_tokens = baseline and same_tokens(model, baseline)
    for chosen in batches([len(p) + len(a.ids) for p, a in zip(prompts, answers, strict=True)], batch_size, "measure"):
        ids = [answers[i].ids for i in chosen]
        logprobs, states = read(model, [prompts[i] for i in chosen], ids, temperature)
        kl = [None] * len(chosen)
        if by_tokens:
            theirs = read(baseline, [baseline.prompt_ids(rows[i]["prompt"]) for i in chosen], ids, temperature)[1]
            kl = token_kl(model, baseline, states, theirs, [len(a) for a in ids], temperature)
        elif baseline:
            encoded = [as_own_tokens(baseline, rows[i]["prompt"], answers[i]) for i in chosen]
            theirs = read(baseline, *zip(*encoded, strict=True), temperature)[0]
            kl = [ours - other for ours, other in zip(logprobs, theirs, strict=True)]
        for i, logprob, tokens, divergence in zip(chosen, logprobs, ids, kl, strict=True):
            measured[i] = {"logprob": logprob, "tokens": len(tokens), "kl": divergence}
            if baseline:
                measured[i]["kl_by"] = "tokens" if by_tokens else "text"
    references = [as_demonstration(model, row) for row in rows]
    known = [i for i, reference in enumerate(references) if reference]
    for chosen in batches([sum(map(len, references[i])) for i in known], batch_size, "references"):
        places = [known[i] for i in chosen]
        logprobs = read(model, *zip(*(references[i] for i in places), strict=True), 1.0)[0]
        for i, logprob in zip(places, logprobs, strict=True):
            measured[i] |= {"reference_logprob": logprob, "reference_tokens": len(references[i][1])}
    return measured


def same_tokens(ours: Contestant, theirs: Contestant) -> bool:
    sizes = {model.policy.get_output_embeddings().weight.shape[0] for model in (ours, theirs)}
    return (
        len(sizes) == 1
        and ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
        and ours.tokenizer.eos_token_id == theirs.tokenizer.eos_token_id
    )


def read(model: Contestant, prompts, answers, temperature: float) -> tuple[list[float], torch.Tensor]:
    """Log-probabilities of whole answers (nats), and the states before all their tokens, (tokens, hidden)."""
    # an answer of no tokens is certain, but no tensor: it takes part with one that counts for nothing
    padded = [list(answer) or [model.tokenizer.eos_token_id] for answer in answers]
    logprobs, _, _, states = read_answers(model.policy, prompts, padded, model.tokenizer.pad_token_id, temperature)
    sums = logprobs.double().sum(1).tolist()
    return [total if answer else 0.0 for total, answer in zip(sums, answers, strict=True)], states


def token_kl(ours: Contestant, theirs: Contestant, states, their_states, lengths, temperature) -> list[float]:
    """KL(ours || theirs) of the next token's distributions, summed over each answer, in nats."""
    parts = []
    for a, b in zip(states.split(256), their_states.split(256), strict=True):
        p = logits_of(ours.policy, a, temperature).log_softmax(-1)
        q = logits_of(theirs.policy, b, temperature).log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1).double())
    return [max(part.sum().item(), 0.0) for part in torch.cat(parts).split(lengths)]


def as_own_tokens(model: Contestant, prompt, answer: Answer) -> tuple[list[int], list[int]]:
    """(prompt, answer) in this model's tokens, from the text that another one wrote; the prompt gives way."""
    message = {"role": "assistant", "content": answer.text}
    try:
        _, ids, _ = encode_dialogue(model.tokenizer, prompt, [message])
        ids = ids[: None if answer.ended else -1][: model.positions - 64]
        room = {"max_prompt_length": model.positions - len(ids)}
        return encode_prompt({"prompt": prompt}, model.tokenizer, **room)["prompt_ids"], ids
    except Unrenderable as reason:
        raise UserError(f"{model.name} cannot read the answer {answer.text[:100]!r}: {reason}") from reason


def as_demonstration(model: Contestant, row) -> tuple[list[int], list[int]] | None:
    """(prompt, the data's own answer) in this model's tokens; None where there is none, or one that does not fit."""
    if not row.get("reference"):
        return None
    completion = [{"role": "assistant", "content": row["reference"]}]
    try:
        encoded = encode_demonstration({**row, "completion": completion}, model.tokenizer, model.positions)
    except Unrenderable:
        return None
    start = sum(label == -100 for label in encoded["labels"])
    return encoded["input_ids"][:start], encoded["input_ids"][start:]


def judge(reward, name: str, prompts, answers: list[Answer], columns: dict[str, list], batch_size: int) -> list:
    """The reward of each answer; None for one that is too long for the judge's positions to be read to its end.

    What was said twice to one prompt is scored once, so that equal answers tie.

    Raises:
        UserError: naming the answer, if a score is no finite number.
    """
    keys = [(prompt_key(prompt), made.text, made.ended) for prompt, made in zip(prompts, answers, strict=True)]
    first_of, scores = {}, {}
    for i, key in enumerate(keys):
        first_of.setdefault(key, i)
    firsts = list(first_of.values())
    for chosen in batches([len(answers[i].text) for i in firsts], batch_size, f"scores of {name}"):
        at = [firsts[i] for i in chosen]
        taken = {column: [values[i] for i in at] for column, values in columns.items()}
        found = judge_batch(reward, [prompts[i] for i in at], [answers[i] for i in at], taken)
        for i, value in zip(at, found, strict=True):
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name} gives {value} to the answer {answers[i].text[:100]!r}")
            scores[keys[i]] = value
    return [scores[key] for key in keys]


def judge_batch(reward, prompts, answers: list[Answer], columns) -> list[float | None]:
    if not hasattr(reward, "encode"):
        return reward(prompts, [made.text for made in answers], [made.ended for made in answers], columns).tolist()

    def encode(prompt, made):
        try:
            ids = reward.encode(prompt, made.text, made.ended)
        except Unrenderable:
            return None
        return None if made.ended and ids[-1] != reward.tokenizer.eos_token_id else ids  # its end was cut off

    encoded = [encode(prompt, made) for prompt, made in zip(prompts, answers, strict=True)]
    found = iter(reward.score_tokens([ids for ids in encoded if ids]).tolist())
    return [next(found) if ids else None for ids in encoded]


def judge_all(judges: dict, rows, answers: dict[str, list[list[Answer]]], batch_size: int) -> dict:
    """The scores {judge: {label: a list of the samples' scores for each row}} of {label: samples of each row}.

    Raises:
        UserError: if a judge cannot read an answer of a model to its end; the data's own may stay without a score.
    """
    places = [
        (label, i, k)
        for label, by_row in answers.items()
        for i, samples in enumerate(by_row)
        for k, made in enumerate(samples)
        if made
    ]
    prompts, given = [rows[i]["prompt"] for _, i, _ in places], [answers[label][i][k] for label, i, k in places]
    columns = {column: [rows[i][column] for _, i, _ in places] for column in ("reference", "dataset")}
    scores = {}
    for name, reward in judges.items():
        scores[name] = {label: [[None] * len(samples) for samples in by_row] for label, by_row in answers.items()}
        found = judge(reward, name, prompts, given, columns, batch_size)
        for (label, i, k), value in zip(places, found, strict=True):
            if value is None and label != "data":
                raise UserError(f"{name} has too few positions for an answer of {label}: lower --response_length")
            scores[name][label][i][k] = value
    return scores
