"""The report's page in a real browser, skipped without one: `pytest tests/evaluation/test_page_browser.py`."""

import json
import math
import re
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import evaluate_model
from rlhf.data.votes import load_votes
from rlhf.evaluation.people import people_report
from rlhf.models.rewards import load_reward
from tests.conftest import make_tokenizer, run_script
from tests.evaluation.chromium import open_browser, page_of, requests_of

ARROW = {"left": "\ue012", "right": "\ue014"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = open_browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.quit()


@pytest.fixture(autouse=True)
def no_errors(request):
    """Nothing goes wrong in the page's scripts, and nothing is refused by its policy."""
    yield
    if "browser" in request.fixturenames and "refused" not in request.node.name:
        assert request.getfixturevalue("browser").get_log("browser") == []


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    for key in keys:
        time.sleep(0.16)  # for so long a key says nothing of a pair that has just come
        ActionChains(browser).send_keys(key).perform()


def text(browser, selector):
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def choose(browser, name, value):
    script = "const f = document.getElementById(arguments[0]); f.value = arguments[1]; "
    browser.execute_script(script + "f.dispatchEvent(new Event('input', {bubbles: true}))", name, value)


def start(browser, address, what=None, name="Ann"):
    """Opens the page at its desk and starts; what was kept of others is forgotten before."""
    browser.get("about:blank")  # an address that differs in its end alone would not be loaded
    browser.get(f"{address}#judge")
    if what:
        choose(browser, "what", what)
    choose(browser, "judge-name", name)
    browser.find_element("css selector", "#setup .main").click()


def shown(browser):
    return [text(browser, f"#pair section:nth-child({i}) .text") for i in (1, 2)]


def saved_lines(browser, folder):
    """The file that "Save" gives."""
    folder.mkdir(exist_ok=True)
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    browser.find_element("css selector", "#voting .save").click()
    path, deadline = folder / "votes.jsonl", time.time() + 20
    while not path.exists() and time.time() < deadline:
        time.sleep(0.05)
    return path, [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A real evaluation of four models on 200 prompts: the folder and the flags."""
    root = tmp_path_factory.mktemp("evaluated")
    for seed in range(4):
        tokenizer = make_tokenizer(root / f"model_{seed}")
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=1, n_head=1,
                            bos_token_id=0, eos_token_id=0, initializer_range=0.2)  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(root / f"model_{seed}")
    rows = [{"prompt": f"Who mends net {i}?", "completion": "I do."} for i in range(200)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "judges.py").write_text(
        "def letters(prompts, completions, **columns):\n    return [len(c[0]['content']) for c in completions]\n"
        "def terse(prompts, completions, **columns):\n    return [-len(c[0]['content']) for c in completions]\n"
    )
    flags = {
        "model_name_or_path": ",".join(str(root / f"model_{seed}") for seed in range(1, 4)),
        "baseline": root / "model_0",
        "reward_model_name_or_path": f"{root}/judges.py:letters,{root}/judges.py:terse",
        "eval_dataset_names": root / "prompts.jsonl",
        "response_length": 12,
        "output_dir": root / "report",
    }
    evaluate_model.main(evaluate_model.make_parser().parse_args([f"--{key}={value}" for key, value in flags.items()]))
    return root / "report", flags


def test_filters_and_the_keyboard_find_prompts(browser, evaluated):
    browser.get((evaluated[0] / "report.html").as_uri() + "#read-17")
    assert "Prompt 17 of 200" in text(browser, "#prompt") and "200 of 200" in text(browser, "#found")
    assert len(browser.find_elements("css selector", "#prompt .card")) == 5  # four models, and the data
    press(browser, "j", ARROW["right"], "k")
    assert browser.current_url.endswith("#read-18") and "Prompt 18 of 200" in text(browser, "#prompt")
    press(browser, "/", *"net 19?")
    asked = [e.text for e in browser.find_elements("css selector", "#prompts li span:first-child")]
    assert asked == ["Who mends net 19?"]
    choose(browser, "words", "")
    choose(browser, "order", "differ")
    margins = [float(m) for m in re.findall(r"\+([\d.]+)", text(browser, "#prompts"))]
    assert len(margins) >= 40 and margins == sorted(margins, reverse=True)
    choose(browser, "margin", str(margins[9]))
    assert 10 <= int(text(browser, "#found").split()[0]) < 200
    choose(browser, "won", "-1")
    assert set(re.findall(r"· (\S+) \+", text(browser, "#prompts"))) <= {"model_0"}
    for name, value in (("won", "any"), ("margin", "0"), ("order", "disagree"), ("dataset", "prompts")):
        choose(browser, name, value)  # the two judges always disagree: the clearest difference comes first
    assert float(re.search(r"\+([\d.]+)", text(browser, "#prompts"))[1]) == margins[0]
    assert len(browser.find_elements("css selector", "#prompts li")) == 50


def test_thirty_pairs_are_judged_kept_saved_loaded_and_trained_on(browser, evaluated, tmp_path):
    folder, flags = evaluated
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', (folder / "report.html").read_text())
    samples = [row | {"reference": ""} for row in json.loads(data[1])["rows"]]
    address = (folder / "report.html").as_uri()
    start(browser, address)
    for _ in range(30):  # the longer one is liked better, and equals tie
        left, right = map(len, shown(browser))
        press(browser, ARROW["left"] if left > right else "2" if right > left else "t")
    press(browser, "u")
    assert "29 of " in text(browser, "#counts") and "Undone" in text(browser, "#said")
    left, right = map(len, shown(browser))
    press(browser, "1" if left > right else "2" if right > left else "t")
    assert re.match(r"30 of \d+ pairs · so far the result is known within ±\d+ points", text(browser, "#counts"))
    browser.refresh()
    assert "30 votes of Ann are kept" in text(browser, "#setup-says")
    browser.find_element("css selector", "#setup .main").click()
    assert "30 of " in text(browser, "#counts")
    path, lines = saved_lines(browser, tmp_path / "saved")
    assert len(lines) == 30 and all(line["judge"] == "Ann" and line["seed"] == 42 for line in lines)
    assert {line["left_model"] for line in lines} | {line["right_model"] for line in lines} <= {
        "model_0", "model_1", "model_2", "model_3", "data"}  # fmt: skip
    browser.find_element("id", "end").click()
    result, following = text(browser, "#result-tables"), text(browser, "#next")

    # the same numbers in Python, and a judge that likes what Ann likes is always right
    judges = {name: load_reward(f"{folder.parent}/judges.py:{name}") for name in ("letters", "terse")}
    people = people_report(load_votes([str(path)]), judges, samples, "model_0", 32)
    assert sum(people["votes"].values()) == 30 and people["other_answers"] == 0
    assert people["judges"]["letters"]["accuracy"]["mean"] == 1 and people["judges"]["letters"]["kappa"] == 1
    assert people["judges"]["terse"]["accuracy"]["mean"] == 0 and people["judges"]["terse"]["kappa"] < 0
    rows = re.findall(r"(model_\d|data)(\d+)% \((\d+)–(\d+)\)", result)
    assert len(rows) == 5
    for label, *numbers in rows:
        expected = [100 * people["wins"][label]["against_others"][key] for key in ("mean", "low", "high")]
        assert list(map(int, numbers)) == pytest.approx(expected, abs=0.51)
    assert "letters100%" in result and "terse0%" in result
    assert "dpo_training.py" in following and "--votes=" in following and "MODEL" not in following

    # another browser goes on with the file
    browser.execute_script("localStorage.clear()")
    browser.get("about:blank")
    browser.get(f"{address}#judge")
    assert text(browser, "#setup-says") == ""
    browser.find_element("id", "load").send_keys(str(path))
    assert "30 of " in text(browser, "#counts") and "30 votes of Ann are loaded" in text(browser, "#said")
    press(browser, "s")
    assert len(saved_lines(browser, tmp_path / "again")[1]) == 31

    model = str(Path(flags["baseline"]))
    training = {"dataset_names": str(path), "max_steps": 1, "learning_rate": 1e-2, "validation_split_percentage": 0}
    for script in ("dpo_training", "reward_modeling"):
        run_script(script, model_name_or_path=model, output_dir=str(tmp_path / script), **training)
        assert (tmp_path / script / "adapter_model.safetensors").exists()


MODELS = ("swift-heron", "tall-otter", "grey-badger", "odd-lynx")
# votes in the page itself: what can be seen and found before each of so many
WATCH = """
const seen = [];
for (let n = 0; n < arguments[0]; n++) {
  const texts = [...document.querySelectorAll("#pair .text, #asked .text")];
  const said = texts.map((element) => element.textContent);
  texts.forEach((element) => element.textContent = "");
  seen.push({said: said.slice(0), see: document.body.innerText, html: document.getElementById("voting").outerHTML,
             address: location.href, title: document.title, attributes: document.body.getAttributeNames().join()});
  texts.forEach((element, i) => element.textContent = said[i]);
  document.querySelectorAll("[data-vote]")[n % 5].click();
}
return seen;
"""


def test_nothing_that_is_shown_betrays_the_model_in_500_draws(browser, tmp_path):
    answers = {model: [[f"{i} {model[::-1]}"] for i in range(150)] for model in MODELS}
    address = page_of(tmp_path / "blind", answers, {"judge": {m: [[0.0]] * 150 for m in MODELS}}, baseline=MODELS[0])
    start(browser, address, "models")
    seen = browser.execute_script(WATCH, 500)
    whose = [tuple(said.split()[1][::-1] for said in draw["said"][1:]) for draw in seen]
    for draw in seen:
        for part in ("see", "html", "address", "title", "attributes"):
            assert not any(word in draw[part] for word in (*MODELS, "seed", "sample", "baseline", "saved/"))
        assert all(said.split()[0] == re.search(r"\d+", draw["said"][0])[0] for said in draw["said"][1:])

    def bare(draw):  # without what tells how far one is and what one said oneself
        html = re.sub(r'<span id="counts".*?</span>|<p id="said".*?</p>|value="\d+"|disabled=""', "", draw["html"])
        return html, re.sub(r"\d+ of .*|You said.*|Undone.*", "", draw["see"]), draw["address"], draw["title"]

    assert len(set(map(bare, seen[1:]))) == 1  # whoever wrote the answers, the page is the same

    assert len({(frozenset(pair), draw["said"][0]) for pair, draw in zip(whose, seen, strict=True)}) == 500
    lefts, sides = Counter(left for left, _ in whose), Counter(side for pair in whose for side in pair)
    for model in MODELS:
        assert abs(lefts[model] - sides[model] / 2) < 4 * math.sqrt(sides[model]) / 2, "a model stands on one side"
    order = [frozenset(pair) for pair in whose]
    assert max(Counter(order).values()) < 83 + 4 * math.sqrt(83)  # 500 draws of six comparisons
    for lag in range(1, 13):  # no rhythm: the same two come again by chance alone
        again = sum(a == b for a, b in zip(order, order[lag:], strict=False)) / (500 - lag)
        assert abs(again - 1 / 6) < 4 * math.sqrt(5 / 36 / (500 - lag)), lag

    # another person judges the same pairs in the same order, from sides of their own; all in all each side is as full
    start(browser, address, "models", name="Bob")
    bobs = browser.execute_script(WATCH, 900)
    theirs = [tuple(said.split()[1][::-1] for said in draw["said"][1:]) for draw in bobs]
    assert [frozenset(pair) for pair in theirs][:500] == order
    assert 0.4 < sum(a == b for a, b in zip(whose, theirs, strict=False)) / 500 < 0.6
    whole = Counter(theirs)
    assert sum(whole.values()) == 900 and all(abs(whole[a, b] - whole[b, a]) <= 1 for a, b in whole)


HOSTILE = [
    "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'>",
    "</textarea></script></style></title>--><!-- <svg onload=window.broken=3> ]]>",
    '" onmouseover="window.broken=4" \' ` \\u003cscript\\u003e {{ 7 * 7 }} ${window.broken=5}',
    "<a href='https://example.com/x'>here</a><link rel=stylesheet href=//example.com/y><base href=//example.com>",
    "<meta http-equiv=refresh content='0;url=https://example.com'><iframe src=https://example.com></iframe>",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é é \u200b\u2028\u2029 \ufeff end",
    "مرحبا بالعالم، كيف حالك؟\nLatin in between.\n\u202ereversed\u202c",
    "bell \x07 escape \x1b[31m null \x00 delete \x7f tab\tline\r\nend",
    "```html\n<b>bold</b>\n```\nand `code`",
    "word " * 20_000,
    "港の灯台はとても明るいです。" * 50,
    "x" * 5_000,
]
SHOWN = str.maketrans({c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\t\n"} | {0x7F: "\u2421"})


def test_what_models_wrote_is_shown_as_text_and_nothing_leaves_the_page(browser, tmp_path):
    labels = ["<b>bold</b>", 'a"onclick="window.broken=6']
    answers = {label: [[wrote] for wrote in (HOSTILE if label == labels[0] else HOSTILE[::-1])] for label in labels}
    prompts = [[{"role": "user", "content": wrote}] for wrote in HOSTILE]
    scores = {"</script>": {label: [[float(i)] for i in range(len(HOSTILE))] for label in labels}}
    requests_of(browser)
    address = page_of(tmp_path / "hostile", answers, scores, prompts)
    for i, wrote in enumerate(HOSTILE):
        expected = [said.replace("\r\n", "\n").translate(SHOWN) for said in (wrote, wrote, HOSTILE[-1 - i])]
        browser.get(f"{address}#read-{i + 1}")
        found = [box.get_property("textContent") for box in browser.find_elements("css selector", "#prompt .text")]
        assert found == expected
        assert not browser.find_elements("css selector", "#prompt :is(script, img, [href^=http], svg, iframe, b)")
        width = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1], f"{wrote[:20]!r} makes the page wider than the window"
        if "مرحبا" in wrote:
            box = browser.find_element("css selector", "#prompt .card .text")
            assert box.value_of_css_property("direction") == "rtl"
            assert box.value_of_css_property("unicode-bidi") == "plaintext"
    start(browser, address)
    for _ in range(len(HOSTILE) // 2):
        press(browser, "1")
    _, lines = saved_lines(browser, tmp_path)
    assert lines and all(line["left"] in HOSTILE and line["right"] in HOSTILE for line in lines)  # to the byte
    browser.find_element("id", "end").click()
    for element in ("script", "img"):
        browser.execute_script(f"document.body.append(document.createElement('{element}'))")
    assert browser.execute_script("return window.broken === undefined && !document.querySelector('svg, iframe')")
    assert {asked.split(":")[0] for asked in requests_of(browser)} <= {"file", "blob", "data", "about"}


def test_what_a_page_might_send_is_refused(browser, tmp_path):
    """Should a fault ever let markup in, the policy still holds."""
    browser.get(page_of(tmp_path, {"a": [["x"]], "b": [["y"]]}))
    requests_of(browser)
    script = """
    const done = arguments[0], seen = [];
    document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
    document.body.insertAdjacentHTML("beforeend", "<img src=https://example.com/i.png onerror='window.broken=1'>");
    document.body.append(Object.assign(document.createElement("script"), {textContent: "window.broken = 2"}));
    fetch("https://example.com/").catch(() => setTimeout(() => done([seen, window.broken ?? null]), 300));
    """
    seen, broken = browser.execute_async_script(script)
    assert broken is None and {"connect-src", "img-src", "script-src-elem"} <= set(seen)
    assert not [address for address in requests_of(browser) if address.startswith("http")]
    browser.get_log("browser")


def test_samples_of_one_model_are_judged_too(browser, tmp_path):
    answers = {"tuned": [[f"{i} first", f"{i} second", f"{i} first", f"{i} third"] for i in range(12)]}
    scores = {"judge": {"tuned": [[1.0, 2.0, 1.0, 3.0]] * 12}}
    browser.get(page_of(tmp_path / "one", {"tuned": [["one"]]}) + "#judge")
    assert "evaluate with a --baseline, or with --best_of" in text(browser, "#setup-says")
    start(browser, page_of(tmp_path, answers, scores))  # of a single model they are what is offered
    assert text(browser, "#counts") == "0 of 36 pairs"  # three different samples of each prompt
    pairs = []
    for _ in range(12):
        pair = shown(browser)
        pairs.append({said.split()[1] for said in pair})
        assert len({said.split()[0] for said in pair}) == 1 and len(pairs[-1]) == 2
        worth = [("first", "second", "third").index(said.split()[1]) for said in pair]
        press(browser, "1" if worth[0] > worth[1] else "2")
        assert "±" in text(browser, "#counts")
    assert len(set(map(frozenset, pairs))) == 3
    _, lines = saved_lines(browser, tmp_path / "saved")
    assert {line["left_model"] for line in lines} == {"tuned"}
    assert all(answers["tuned"][int(row["left"].split()[0])][row["left_sample"]] == row["left"] for row in lines)
    browser.find_element("id", "end").click()
    assert "judge100%" in text(browser, "#result-tables") and "saved/tuned" in text(browser, "#next")


def test_a_browser_that_keeps_nothing_says_so(tmp_path, tmp_path_factory):
    browser = open_browser(tmp_path_factory.mktemp("forgetful"))
    try:
        script = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no') }})"
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
        start(browser, page_of(tmp_path, {"a": [["x"], ["y"]], "b": [["z"], ["w"]]}))
        press(browser, "1")
        assert "keeps nothing" in text(browser, "#voting .storage")
        assert browser.find_element("css selector", "#voting .storage").is_displayed()
        assert len(saved_lines(browser, tmp_path / "saved")[1]) == 1
        browser.find_element("id", "end").click()
        browser.find_element("id", "forget").click()
        browser.switch_to.alert.accept()
        assert "nothing in it to delete" in text(browser, "#setup-says")
    finally:
        browser.quit()


def test_two_tabs_lose_no_vote(browser, tmp_path):
    address = page_of(tmp_path, {"a": [[f"a{i}"] for i in range(9)], "b": [[f"b{i}"] for i in range(9)]})
    start(browser, address, name="Tab")
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    start(browser, address, name="Tab")
    press(browser, "1", "2", "t")
    browser.switch_to.window(first)
    press(browser, "B")  # with caps lock, on the pair that the other tab has judged: the later vote counts
    assert "3 of 9 pairs" in text(browser, "#counts")
    press(browser, "1")
    _, lines = saved_lines(browser, tmp_path / "saved")
    assert Counter(line["vote"] for line in lines) == {"right": 1, "tie": 1, "both bad": 1, "left": 1}
    browser.switch_to.window(browser.window_handles[-1])
    browser.close()
    browser.switch_to.window(first)


def test_with_a_baseline_no_prompt_comes_twice_and_the_reach_tells_no_model(browser, tmp_path):
    answers = {model: [[f"{model} {i}"] for i in range(30)] for model in (*MODELS[:3], "constructor")}
    answers[MODELS[1]][3] = answers[MODELS[0]][3]  # no pair: the prompt's next comparison is taken
    start(browser, page_of(tmp_path, answers, baseline=MODELS[0]), "baseline")
    script = """
    const seen = [];
    while (session.shown) {
      seen.push([document.querySelector("#asked .text").textContent, document.getElementById("counts").textContent]);
      document.querySelectorAll("[data-vote]")[0].click();
    }
    return [seen, document.activeElement.id];
    """
    seen, focused = browser.execute_script(script)
    asked, counts = zip(*seen, strict=True)
    assert len(set(asked)) == len(asked) == 30 and focused == "end"
    browser.find_element("id", "end").click()
    assert "constructor" in text(browser, "#result-tables")
    browser.find_element("id", "back").click()
    assert browser.find_element("id", "setup").is_displayed() and "30 votes of Ann" in text(browser, "#setup-says")
    start(
        browser, page_of(tmp_path / "other", {m: a[::-1] for m, a in answers.items()}, baseline=MODELS[0]), "baseline"
    )
    assert [said for _, said in browser.execute_script(script)[0]] == list(counts)


def test_a_key_within_a_moment_of_the_pair_is_none(browser, tmp_path):
    start(browser, page_of(tmp_path, {"a": [["x"], ["y"]], "b": [["z"], ["w"]]}), name="Quick")
    script = """
    for (const key of "12") document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    return session.votes.length;
    """
    time.sleep(0.2)
    assert browser.execute_script(script) == 1


def test_a_file_goes_on_where_it_was_whatever_its_form(browser, tmp_path):
    answers = {model: [[f"{model} {i}"] for i in range(4)] for model in "abc"}
    address = page_of(tmp_path, answers, baseline="a")
    what = '[["b",0],["c",0]]'
    start(browser, address, what, name="Kim")
    press(browser, "1")
    _, (line,) = saved_lines(browser, tmp_path / "saved")
    assert line["held_out"] is False and line["comparison"] == what
    press(browser, "t", "s")
    other = {key: value for key, value in line.items() if key != "judge"}
    other["prompt"] = [{"content": turn["content"], "role": turn["role"]} for turn in line["prompt"]]
    path = tmp_path / "Kim.jsonl"
    later = other | {"vote": "both bad", "time": "2100-01-01T00:00:00.000Z"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (later, other, other)))
    browser.get("about:blank")
    browser.get(f"{address}#judge")
    choose(browser, "what", "baseline")
    browser.find_element("id", "load").send_keys(str(path))
    deadline = time.time() + 5
    while "loaded" not in text(browser, "#said") and time.time() < deadline:
        time.sleep(0.05)
    assert "1 votes of Kim are loaded" in text(browser, "#said") and "3 of 4 pairs" in text(browser, "#counts")
    lines = saved_lines(browser, tmp_path / "again")[1]
    assert [row["vote"] for row in lines] == ["tie", "skip", "both bad"]
    assert {row["comparison"] for row in lines} == {what}


def test_a_file_of_others_is_not_taken_for_ones_own(browser, tmp_path):
    browser.get(page_of(tmp_path, {"a": [["x"]], "b": [["y"]]}) + "#judge")
    line = {"prompt": [{"role": "user", "content": "Question 0?"}], "left": "x", "right": "y", "vote": "left",
            "left_model": "a", "left_sample": 0, "right_model": "b", "right_sample": 0, "judge": "Bo"}  # fmt: skip
    for lines, says in (
        ([line, line | {"judge": "Cy"}], "several people"),
        ([line | {"left": "other"}], "No vote in it"),
        ([line | {"vote": "banana"}, 7, None], "No vote in it"),
        (["{"], "no votes.jsonl"),
    ):
        path = tmp_path / "votes.jsonl"
        path.write_text("\n".join(entry if entry == "{" else json.dumps(entry) for entry in lines))
        browser.find_element("id", "load").send_keys(str(path))
        deadline = time.time() + 5
        while says not in text(browser, "#setup-says") and time.time() < deadline:
            time.sleep(0.05)
        assert says in text(browser, "#setup-says")


def test_all_can_be_reached_and_named_without_a_mouse(browser, evaluated):
    browser.get("about:blank")
    browser.get((evaluated[0] / "report.html").as_uri() + "#judge")
    script = """
    const field = (e) => e.matches("input, select, progress");
    const name = (e) => e.getAttribute("aria-label") || (field(e) ? e.labels[0]?.textContent ?? "" : e.textContent);
    return [...document.querySelectorAll("input, select, button, a, progress, [role=region], section, article")]
      .filter((e) => !name(e).trim()).map((e) => e.outerHTML.slice(0, 80));
    """
    assert browser.execute_script(script) == []
    reached = []
    for _ in range(12):
        press(browser, "\ue004")  # Tab
        found = browser.execute_script(
            "const e = document.activeElement, s = getComputedStyle(e.id === 'load' ? e.parentElement : e);"
            " return [e.id || e.textContent, s.outlineStyle, parseFloat(s.outlineWidth)]"
        )
        if found[0] in ("", "main") or "Evaluation" in found[0]:
            break
        reached.append(found)
    names = [name for name, *_ in reached]
    assert names[:4] == ["Skip to the content", "Report", "Read", "Judge"]
    assert {"judge-name", "what", "keys", "Start", "load"} <= set(names)
    assert all(style == "solid" and width >= 2 for _, style, width in reached), reached
    live = [e.get_attribute("id") for e in browser.find_elements("css selector", "[aria-live], [role=status]")]
    assert {"found", "said", "setup-says"} <= set(live)
