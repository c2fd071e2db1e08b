r"""Datasets for every stage: `load_datasets` turns names into rows, and this command shows what they will be.

    python prepare_data.py --list
    python prepare_data.py --dataset_names uc:0.1,hh --task sft --count
    python prepare_data.py --dataset_names my_pairs.jsonl.gz --task preference \
        --output_dir saved/pairs

Reads the hub's datasets by their short names below (or by any id), local files and folders. Writes nothing, or
train.jsonl and test.jsonl into --output_dir, which `load_dataset` and every script here read back.
Watch: the reasons for which rows are dropped. To add a dataset, add a function like those below.
"""

import html
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from rlhf.data.layouts import comparison, conversation, instruction, oasst_tree, ranks_of
from rlhf.data.loading import check_names, load_datasets
from rlhf.data.messages import BadRow, Skip, assistant, user
from rlhf.data.mixing import describe
from rlhf.data.rows import SERVES, Demonstration, Preference, Prompt, Ranking, demonstration, kind_for, kinds_of
from rlhf.data.sources import DATASETS, dataset
from rlhf.data.trees import KEYS, trees_of
from rlhf.user_error import ToolParser, UserError, check_folder, missing_path, number, run_tool, visible


@dataset(
    "HuggingFaceH4/ultrachat_200k",
    splits={"sft": ("train_sft", "test_sft"), "prompt": ("train_gen", "test_gen")},
    unused="prompt prompt_id",
    known_by="prompt prompt_id messages",
)
def uc(row) -> Demonstration:
    """UltraChat: conversations of several turns written by ChatGPT (231k, MIT)."""
    same_prompt(row, row["messages"])
    return demonstration(row["messages"])


def same_prompt(row, messages) -> None:
    """Raises a BadRow where a file that has UltraChat's columns says something else in `prompt` than in the turns."""
    first = next((turn["content"] for turn in messages if turn["role"] == "user"), None)
    if row.get("prompt") not in (None, "", first):
        raise BadRow("'prompt' is not the conversation's first question")


@dataset(
    "HuggingFaceH4/ultrafeedback_binarized",
    splits={
        "sft": ("train_sft", "test_sft"),
        "preference": ("train_prefs", "test_prefs"),
        "prompt": ("train_gen", "test_gen"),
    },
    unused="prompt prompt_id messages",
    known_by="prompt prompt_id messages chosen rejected score_chosen score_rejected",
)
def ufb(row) -> Preference:
    """UltraFeedback: the best of four models' answers and another one, scored by GPT-4 (63k pairs, MIT)."""
    same_prompt(row, row["chosen"])
    return comparison({key: row[key] for key in ("chosen", "rejected", "score_chosen", "score_rejected")})


@dataset("Anthropic/hh-rlhf", data_dir="{subset}")
def hh(row) -> Preference:
    """Dialogues where people chose the more helpful or harmless answer; @helpful-base etc. (169k pairs, MIT)."""
    return comparison({"chosen": row["chosen"], "rejected": row["rejected"]})


@dataset(
    "stanfordnlp/SHP",
    ("train", "validation"),
    keep=lambda row: row["score_ratio"] >= 2,
    max_pairs=5,
    unused="post_id domain upvote_ratio c_root_id_A c_root_id_B created_at_utc_A created_at_utc_B score_A score_B "
    "seconds_difference",
    known_by="history human_ref_A human_ref_B labels score_A score_B score_ratio",
    data_dir="{subset}",
)
def shp(row) -> Preference:
    """Reddit answers, one upvoted at least twice as often; @askculinary etc. (386k pairs, Reddit's terms)."""
    if row["labels"] not in (0, 1):
        raise BadRow("'labels' is neither 0 nor 1")
    better, worse = ("A", "B") if row["labels"] == 1 else ("B", "A")
    return {
        "prompt": [user(plain(row["history"]))],
        "chosen": [assistant(plain(row[f"human_ref_{better}"]))],
        "rejected": [assistant(plain(row[f"human_ref_{worse}"]))],
        "score": row[f"score_{better}"],
    }


def plain(text: str) -> str:
    """The text without HTML entities and the zero-width spaces that Reddit leaves in."""
    return re.sub("[\u200b\ufeff]", "", html.unescape(text))


def tldr_prompt(text: str) -> list[dict]:
    """Both summary sets' prompts end with "TL;DR:", so that a policy and its reward model see the same text."""
    return [user(text.strip().removesuffix("TL;DR:").rstrip() + "\nTL;DR:")]


@dataset("CarperAI/openai_summarize_tldr", ("train", "valid"))
def tldr(row) -> Demonstration:
    """Reddit posts and their writers' own summaries (130k, CC-BY-4.0)."""
    return {"prompt": tldr_prompt(row["prompt"]), "completion": [assistant(row["label"])]}


@dataset("CarperAI/openai_summarize_comparisons", ("train", "valid1"))
def cmp(row) -> Preference:
    """Pairs of summaries of Reddit posts, compared by people; the reward data to tldr (177k pairs, CC-BY-4.0)."""
    chosen, rejected = (row[side].strip().removeprefix("TL;DR:") for side in ("chosen", "rejected"))
    if min(len(chosen.split()), len(rejected.split())) < 5:
        raise Skip("a summary of fewer than five words")
    return {"prompt": tldr_prompt(row["prompt"]), "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


@dataset(
    "HuggingFaceH4/stack-exchange-preferences",
    ("train", None),
    unused="qid date metadata answer_id author author_id author_profile selected",
    known_by="qid question answers",
    data_dir="data/{subset}",
)
def se(row) -> Ranking:
    """Stack Exchange answers by votes; all is 22 GB, @stats.stackexchange.com one site (10.7M, CC-BY-SA-4.0)."""
    answers = row["answers"]
    return {
        "prompt": [user(from_html(row["question"]))],
        "responses": [from_html(answer["text"]) for answer in answers],
        "ranks": ranks_of([answer["pm_score"] for answer in answers]),
    }


def from_html(text: str) -> str:
    """The text of a post's HTML, its code kept between backticks."""
    text = re.sub(r"<pre[^>]*><code>(.*?)\n?</code></pre>", r"\n```\n\1\n```\n", text, flags=re.DOTALL)
    text = re.sub(r"</?code>", "`", text)
    text = re.sub(r"<li>", "- ", text)
    text = re.sub(r"<br\s*/?>|</(p|li|h\d|blockquote)>", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", html.unescape(re.sub(r"<[^>]+>", "", text)))


@dataset("OpenAssistant/oasst1", ("train", "validation"), regroup=trees_of, unused=KEYS)
def oasst1(row, subset="") -> Iterator[Demonstration | Ranking | Prompt]:
    """Volunteers' ranked trees, no deleted, rejected or synthetic messages; @en+top2 picks some (89k, Apache-2.0)."""
    return oasst_tree(row, subset)


@dataset("OpenAssistant/oasst2", ("train", "validation"), regroup=trees_of, unused=KEYS)
def oasst2(row, subset="") -> Iterator[Demonstration | Ranking | Prompt]:
    """The second release of oasst1, with the same options (135k messages, Apache-2.0)."""
    return oasst_tree(row, subset)


@dataset("yizhongw/self_instruct", ("train", None), data_dir="self_instruct", revision="refs/convert/parquet")
def self_instruct(row) -> Demonstration:
    """Instructions and answers that GPT-3 made up (83k, Apache-2.0)."""
    return {
        "prompt": [user(row["prompt"])],
        "completion": [assistant(row["completion"].strip().removesuffix("<|endoftext|>"))],
    }


@dataset("Open-Orca/SlimOrca-Dedup", ("train", None))
def slimorca(row) -> Demonstration:
    """FLAN questions answered by GPT-4 under various system prompts (363k, MIT)."""
    return conversation(row)


@dataset("tatsu-lab/alpaca", ("train", None), unused="text")
def alpaca(row) -> Demonstration:
    """Self-Instruct with text-davinci-003 (52k, CC-BY-NC-4.0)."""
    return instruction(row)


@dataset("yahma/alpaca-cleaned", ("train", None))
def alpaca_cleaned(row) -> Demonstration:
    """alpaca with its wrong and empty answers mended (52k, CC-BY-4.0)."""
    return instruction(row)


@dataset("databricks/databricks-dolly-15k", ("train", None), unused="category")
def dolly(row) -> Demonstration:
    """Instructions and answers that Databricks' employees wrote (15k, CC-BY-SA-3.0)."""
    return instruction(row | {"context": without_citations(row["context"])})


def without_citations(text: str) -> str:
    """The text without marks such as [1] or [2, 3]."""
    return re.sub(r"\s?\[\d+(?:,\s*\d+)*\]", "", text)


@dataset(
    "openai/webgpt_comparisons",
    ("train", None),
    unused="dataset id quotes_0 quotes_1 tokens_0 tokens_1",
    known_by="question answer_0 answer_1 score_0 score_1",
    revision="refs/convert/parquet",
)
def webgpt(row) -> Preference:
    """Pairs of researched answers, compared by people (20k pairs, no licence stated)."""
    margin = row["score_0"] - row["score_1"]
    if margin == 0:
        raise Skip("tie")
    better, worse = ("0", "1") if margin > 0 else ("1", "0")
    return {
        "prompt": [user(row["question"]["full_text"])],
        "chosen": [assistant(without_citations(row[f"answer_{better}"]))],
        "rejected": [assistant(without_citations(row[f"answer_{worse}"]))],
        "score": row[f"score_{better}"],
    }


@dataset("Dahoas/rm-static", unused="response")
def rm_static(row) -> Preference:
    """HH's helpful dialogues with the prompt apart (81k pairs, MIT)."""
    return comparison({key: row[key] for key in ("prompt", "chosen", "rejected")})


@dataset("Dahoas/full-hh-rlhf", unused="response")
def full_hh(row) -> Preference:
    """hh with the prompt apart (125k pairs, MIT)."""
    return comparison({key: row[key] for key in ("prompt", "chosen", "rejected")})


def demo_rows(split: str, subset: str) -> Iterator[dict]:
    from examples.demo_world import rows

    if not (subset or "0").isdigit():
        raise UserError(f"demo@{subset}: a demo world goes by a number, as in demo@1")
    return rows(split, seed=int(subset or 0))


@dataset(demo_rows)
def demo(row) -> Iterator[Demonstration | Preference]:
    """A made-up town whose robot answers visitors, good and bad answers known; @1 is another such town."""
    prompt = [user(row["prompt"])]
    yield {"prompt": prompt, "completion": [assistant(row["completion"])]}
    yield {"prompt": prompt, "chosen": [assistant(row["chosen"])], "rejected": [assistant(row["rejected"])]}


def export(train, evals: dict, folder: Path):
    """Writes train.jsonl, and test.jsonl with all evaluation rows, which `load_dataset(folder)` reads back."""
    from datasets import concatenate_datasets, disable_progress_bars

    disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    sides = {"train": train} | ({"test": concatenate_datasets(list(evals.values()))} if evals else {})
    for side, rows in sides.items():
        rows.to_json(folder / f"{side}.unfinished", force_ascii=False)
    for side in sides:
        (folder / f"{side}.unfinished").replace(folder / f"{side}.jsonl")


def listing() -> str:
    """The registered datasets: name, tasks, description and where from."""
    lines = []
    for name, entry in DATASETS.items():
        tasks = " ".join(task for task in SERVES if kind_for(task, kinds_of(entry.convert)))
        source = entry.path if isinstance(entry.path, str) else "made here"
        about = textwrap.fill(
            inspect.getdoc(entry.convert), 80, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
        lines.append(f"{name:<16}{tasks:<24}{source}\n{about}")
    return "\n".join(lines)


def preview(rows, count: int) -> str:
    """The first rows as roles and texts."""
    texts = []
    for row in rows.select(range(min(count, len(rows)))):
        texts.append(f"--- {row['dataset']}")
        for column in (column for column in row if column != "dataset"):
            value = row[column]
            turns = value if isinstance(value, list) else [{"role": "", "content": str(value)}]
            texts += [f"{column} {turn['role']}: {visible(turn['content'])}" for turn in turns]
    return "\n".join(texts)


def show_with_model(train, report: dict, args):
    """The table with tokens, lengths, and rows just as the model's tokenizer and template will have them."""
    from rlhf.models.loading import load_tokenizer
    from rlhf.models.preview import limits, measure, show_row

    tokenizer = load_tokenizer(args.model_name_or_path, system_prompt=args.system_prompt)
    allowed = limits(args.task, args.max_length, args.max_prompt_length)
    report["tokenized"], lengths = measure(train, args.task, tokenizer, **allowed)
    print(describe(report), lengths, sep="\n")
    for row in train.select(range(min(args.preview, len(train)))):
        print(show_row(row, args.task, tokenizer, **allowed))


def make_parser() -> ToolParser:
    parser, whole, percent = ToolParser(__doc__), number(int, 1), number(float, 0, 100)
    add = parser.add_argument
    add("--list", action="store_true", help="list the datasets that have a short name")
    add("--dataset_names", help="uc, hh@helpful-base, uc:0.1, ufb#20000, file.jsonl.gz, owner/name")
    add("--eval_dataset_names", help="evaluate on these instead of on each set's own test rows")
    add("--task", choices=list(SERVES), default="sft", help="what the rows are for (default: sft)")
    add("--count", action="store_true", help="print rows read, kept and dropped (the default)")
    add("--preview", type=number(), default=0, metavar="N", help="print the first N rows")
    add("--model_name_or_path", help="count tokens, and show rows as this model will see them")
    add("--max_length", type=number(int, 2), default=1024, help="longest row in tokens, with a model (1024)")
    add("--max_prompt_length", type=whole, help="longest prompt in tokens, with a model")
    add("--system_prompt", help="as in training, with a model: the system turn of rows that have none")
    add("--output_dir", type=Path, help="write train.jsonl and test.jsonl into this folder")
    add("--overwrite_output_dir", action="store_true", help="replace the rows in it")
    add("--validation_split_percentage", type=percent, default=5.0, help="prompts held out (5)")
    add("--max_eval_samples", type=whole, help="at most so many evaluation rows of a dataset")
    add("--max_bad_percentage", type=percent, default=5.0, help="stop above this share of broken rows (5)")
    add("--ignore_columns", help="do without these columns: source,messages.tool_calls")
    add("--max_pairs_per_prompt", type=whole, help="at most so many, by --seed (all; 10 of a ranking)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="decides sampling and order (42)")
    return parser


def main(args):
    if args.list or args.dataset_names is None:
        print(listing())
        return
    check_names(args.task, args.dataset_names, args.eval_dataset_names, args.ignore_columns)
    missing_path("model_name_or_path", args.model_name_or_path)
    if args.system_prompt is not None and not args.model_name_or_path:
        raise UserError("--system_prompt needs --model_name_or_path, whose template writes it: rows do not hold it")
    if args.output_dir:
        check_folder("--output_dir", args.output_dir)
    if args.output_dir and not args.overwrite_output_dir and any(args.output_dir.glob("*.jsonl")):
        raise UserError(
            f"{args.output_dir} has data in it already\nname another folder, or add --overwrite_output_dir"
        )
    train, evals, report = load_datasets(
        args.dataset_names,
        args.task,
        eval_dataset_names=args.eval_dataset_names,
        validation_split_percentage=args.validation_split_percentage,
        max_eval_samples=args.max_eval_samples,
        seed=args.seed,
        max_bad_percentage=args.max_bad_percentage,
        ignore_columns=args.ignore_columns,
        max_pairs_per_prompt=args.max_pairs_per_prompt,
    )
    if args.model_name_or_path:
        show_with_model(train, report, args)
    else:
        print(describe(report))
        if args.preview:
            print(preview(train, args.preview))
    if args.output_dir:
        export(train, evals, args.output_dir)
        print(f"wrote {args.output_dir}; to train on it: --dataset_names={args.output_dir}")


if __name__ == "__main__":
    run_tool(main, make_parser)
