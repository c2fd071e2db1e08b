"""The tables of an evaluation's report: `pytest tests/evaluation/test_report.py`."""

from rlhf.evaluation import report

NAMES = ["saved/run_1/gpt2_medium_uc_sft", "saved/run_2/gpt2_medium_ufb_dpo"]
FIGURES = {"kl": None, "tokens": 9, "words": 7, "ended": 1, "distinct_1": None, "distinct_2": None, "rouge1": None,
           "rouge2": None, "rougeL": None, "rouge_avg": None, "perplexity": 2, "reference_perplexity": None,
           "kl_by": None, "empty": 0}  # fmt: skip


def of_models(names, judge="judge"):
    score = {"mean": -12.1, "low": -12.22, "high": -11.98, "rows": 4}
    judged = {judge: {"score": score, "against_baseline": score, "against_data": None}}
    return {
        "prompts": {"demo": 4},
        "groups": {"demo": {name: FIGURES | {"judged": judged} for name in names}},
        "baseline": names[0],
        "judges": [judge],
        "best_of": {},
        "data": {"notes": ["a note"]},
        "settings": {"response_length": 8, "temperature": "0.5", "top_p": None, "top_k": None, "seed": 1},
        "raw": {"words": {name: [7] for name in names}, "samples": []},
    }


def test_tables_of_long_names_stay_within_80_columns_and_lose_nothing(capsys):
    found = of_models(NAMES, judge="[red]gold[/red]")
    curve = {2**i: -12.1 for i in range(6)}
    gain = found["groups"]["demo"][NAMES[0]]["judged"]["[red]gold[/red]"]["score"]
    found["best_of"] = {
        name: {"picker": "gold", "curve": {"[red]gold[/red]": curve}, "gain": {"[red]gold[/red]": gain}}
        for name in NAMES
    }
    report.print_report(found, "folder")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "by [red]gold[/red]:" in printed
    assert printed.count("-12.10 (-12.22 to -11.98)") == 4 and printed.count("-12.10") == 4 + 2 * 6
    first_words = "".join(line.split()[0] for line in printed.splitlines() if line.strip())
    assert all(first_words.count(name) == 4 for name in NAMES)


def test_the_markdown_is_whole():
    text = str(report.page(of_models(["a|b", "c"], judge="gold")))
    assert text.startswith("# Evaluation\n\n![](report.png)\n\n## demo, 4 prompts\n\n**by gold**\n\n| model | score |")
    assert (
        "| model | score | wins against a\\|b |\n|---|---:|---:|\n| a\\|b | -12.10 (-12.22 to -11.98) | - |\n" in text
    )
    assert text.endswith("of one tokenizer\n") and "- a note\n- answers of up to 8 tokens at temperature 0.5" in text
    assert "\n\n\n" not in text


def test_numbers_are_short():
    assert [report.number(value) for value in (None, 0, -0.001, -2.345, 123456)] == [
        "-",
        "0.00",
        "0.00",
        "-2.35",
        "1.2e+05",
    ]
