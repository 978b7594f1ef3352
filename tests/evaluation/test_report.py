"""The pages of a run: complete, escaped, from one file, and no larger than they need to be."""

import html.parser
import json
import random
import re
import shutil
import subprocess

import pytest

from dlf_ray.evaluation import report
from dlf_ray.evaluation.report import write_report
from dlf_ray.evaluation.results import Results

EXPERTS = ["math", "facts", "<b>odd</b>"]
METHODS = ["large", "expert:math", "static", "dynamic", "dynamic:blend", "upper-bound"]
EVIL = "</p><script>alert('x')</script> & <img src=http://evil.example/x.png>"


def fake_run(folder, items=12, length=20, tasks=("sums", "articles", "choices"), **more):
    """Three kinds of tasks: right or wrong, a share, and a choice by likelihood in groups."""
    rng = random.Random(0)
    with Results(folder, {"seed": 0, "note": EVIL}) as run:
        for task in tasks:
            for item in range(items):
                for skill, method in enumerate(METHODS, 1):
                    row = answer(rng, task, method, length)
                    row |= {"task": task, "method": method, "item": f"{task}-{item}"}
                    score = float(rng.random() < skill / 7)
                    row["scores"] = {"match": score}
                    if task == "articles":
                        row["scores"] = {"rouge": rng.random(), "loss": 5 * rng.random()}
                    if task == "choices":
                        row |= {"group": "ab"[item % 2], "choice": 1, "logprobs": [-2.5, -1.5]}
                    row |= {"prompt_hash": f"hash{item}", "shots": 5, "shots_for": "large", **more}
                    run.add(row)
    return folder


def answer(rng, task, method, length):
    if task == "choices":
        return {"pieces": [], "experts": []}
    pieces = ["The", EVIL, " a\x00\n"] + [f" {i}" for i in range(rng.randrange(length))]
    row = {"text": "".join(pieces), "pieces": pieces, "tokens": len(pieces), "seconds": 0.5}
    if method in ("large", "expert:math", "upper-bound"):
        return row
    weights = [[0.5, 0.5, 0.5] for _ in pieces]
    if method != "static":
        weights = [rng.choice([[1.3, 0, 0], [0, 0.4, 0], [0, 0, 0.7], [0, 0, 0]]) for _ in pieces]
    loudest = [EXPERTS[own.index(max(own))] if any(own) else None for own in weights]
    return row | {"expert_names": EXPERTS, "weights": weights, "experts": loudest}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("report") / "my_run", commit="c0ffee", models="{}")


@pytest.fixture(scope="module")
def pages(folder):
    markdown, page = write_report(folder)
    assert (markdown, page) == (folder / "report.md", folder / "report.html")
    return markdown.read_text(), page.read_text()


class Elements(html.parser.HTMLParser):
    """Every element with its attributes and the text in it, and whether all are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open, self.wrong = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))
        if tag not in ("meta", "wbr"):
            self.open.append((tag, self.found[-1][2]))

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1][0] != tag:
            self.wrong.append((tag, self.getpos()))
        else:
            self.open.pop()

    def handle_data(self, data):
        for _, texts in self.open:
            texts.append(data)

    def of(self, tag, kind=""):
        return [
            "".join(texts)
            for name, attributes, texts in self.found
            if name == tag and kind in ["", *(attributes.get("class") or "").split()]
        ]


def test_both_pages_name_every_task_and_method(pages):
    for page in pages:
        shown = ("items/s", "tokens/s")
        for name in ("sums", "articles", "choices", *METHODS, "math", "facts", "c0ffee", *shown):
            assert name.replace("_", r"\_") in page or name in page.replace("<wbr>", "")
    elements = Elements(pages[1])
    assert elements.of("h2")[1:] == ["articles", "choices", "sums"]
    assert len(elements.of("details", "item")) == 3 * report.ANSWERS
    assert len(elements.of("article")) == 3 * report.ANSWERS * len(METHODS)


def test_the_html_is_well_formed_and_runs_nothing_that_a_model_wrote(pages):
    elements = Elements(pages[1])
    assert elements.wrong == []
    assert elements.open == []
    tags = {tag for tag, _, _ in elements.found}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "form"}
    assert any(EVIL in text for text in elements.of("p", "said"))
    assert EVIL in elements.of("pre")[0].replace('\\"', '"')
    assert "<b>odd</b>" in elements.of("span", "key")


def test_the_html_needs_no_other_file(pages):
    for tag, attributes, _ in Elements(pages[1]).found:
        assert not {"src", "srcset", "data", "action", "style", "onclick"} & set(attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
    style = re.search(r"<style>(.*)</style>", pages[1], re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in pages[1]


def test_tokens_have_the_colour_of_their_expert_and_their_weights(pages):
    spans = [
        (attributes.get("class"), attributes["title"])
        for tag, attributes, _ in Elements(pages[1]).found
        if tag == "span" and "title" in attributes
    ]
    names = dict(zip(("e0", "e1", "e2"), EXPERTS, strict=True))
    assert {kind for kind, _ in spans} == {None, *names}
    for kind, title in spans:
        if kind:
            assert title.startswith(names[kind])
        else:  # nobody's, or of all three alike
            assert title in ("large alone", "math 0.50, facts 0.50, <b>odd</b> 0.50")


def test_control_characters_and_line_ends_are_shown(pages):
    assert "\x00" not in pages[1]
    assert "a␀↵\n" in pages[1]


def test_figures_are_those_of_the_summary(folder, pages):
    row = next(each for each in report.summary(report.read(folder)) if each.method == "dynamic")
    assert row.task == "articles"
    rouge, loss = row.scores["rouge"], row.scores["loss"]
    cells = [
        cell.strip() for cell in pages[0].split("## articles")[1].split("| dynamic |")[1].split("|")
    ]
    assert cells[0] == rf"{100 * rouge.mean:.1f} \[{100 * rouge.low:.1f}, {100 * rouge.high:.1f}\]"
    assert cells[1] == rf"{loss.mean:.3g} \[{loss.low:.3g}, {loss.high:.3g}\]"
    assert f"{row.weights['math']:.2f}" in cells
    assert f"{row.gap_closed['rouge']:.1%}" in cells


def test_markdown_tables_are_tables(pages):
    for block in re.findall(r"(?:^\|.*\n)+", pages[0], re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert "<script" not in pages[0]


def test_the_average_closes_the_gap(folder, pages):
    rows = report.summary(report.read(folder))
    means = {
        method: [next(iter(row.scores.values())).mean for row in rows if row.method == method]
        for method in ("dynamic", "upper-bound")
    }
    share = 100 * sum(means["dynamic"]) / sum(means["upper-bound"])
    (line,) = [
        line for line in pages[0].split("## articles")[0].splitlines() if "| dynamic |" in line
    ]
    assert line.endswith(f"| {100 * sum(means['dynamic']) / 3:.1f} | {share:.1f} |")


def test_the_same_rows_give_the_same_pages(folder, pages):
    assert tuple(path.read_text() for path in write_report(folder)) == pages


def test_the_answers_shown_are_those_the_methods_disagree_on(tmp_path):
    with Results(tmp_path, {}) as run:
        for item, scores in {"a": (1, 1), "b": (0, 0), "c": (0, 1), "d": (1, 0)}.items():
            for method, score in zip(("large", "dynamic"), scores, strict=True):
                run.add({"task": "t", "method": method, "item": item, "scores": {"match": score}})
    items = Elements(write_report(tmp_path)[1].read_text()).of("summary")
    assert [text.strip() for text in items[1:]] == ["c", "d", "a", "b"]


def test_large_runs_make_small_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ALL_TOKENS", 3000)
    small = write_report(fake_run(tmp_path / "small", 12, 2000, ("sums",)))[1]
    large = write_report(fake_run(tmp_path / "large", 60, 2000, ("sums",)))[1]
    assert "more tokens" in large.read_text()
    assert large.stat().st_size < 1.2 * small.stat().st_size < 300_000


def test_rows_with_next_to_nothing_make_a_page(tmp_path):
    with Results(tmp_path, {}) as run:
        run.add({"task": "t", "method": "m", "item": "1", "error": "<died>"})
        run.add({"task": "u", "method": "m", "item": "1", "scores": {"match": 1}, "text": "yes"})
        fused = {"expert_names": ["math"], "experts": ["math"], "pieces": ["yes"]}
        run.add({"task": "u", "method": "one", "item": "1", "weights": [[-0.5]], **fused})
        run.add({"task": "u", "method": "one", "item": "2", "weights": [[0.25]], **fused})
    page = write_report(tmp_path)[1].read_text()
    assert Elements(page).wrong == []
    assert "failed: &lt;died&gt;" in page
    assert "1 failed" in page


def test_more_experts_than_colours_are_dashed(tmp_path):
    names = [f"expert{i}" for i in range(report.COLOURS + 2)]
    with Results(tmp_path, {}) as run:
        for item in range(3):
            weights = [[(item + i + j) % 3 / 2 for j in range(len(names))] for i in range(4)]
            row = {"expert_names": names, "weights": weights, "pieces": list("abcd")}
            run.add({"task": "t", "method": "dynamic", "item": str(item), **row})
    page = write_report(tmp_path)[1].read_text()
    assert 'class="key e1 again">expert9' in page
    assert Elements(page).wrong == []


def test_rows_of_two_origins_are_pointed_out(tmp_path):
    with Results(tmp_path, {}) as run:
        run.add({"task": "t", "method": "m", "item": "1", "commit": "aa", "rule": "grid"})
        run.add({"task": "t", "method": "n", "item": "1", "commit": "bb", "rule": "static"})
    (warning,) = Elements(write_report(tmp_path)[1].read_text()).of("p", "warning")
    assert warning.endswith("they differ in commit.")


def test_models_are_listed_once_and_pointed_out_where_they_differ(tmp_path):
    """A method says only which models it needs; each task may have an upper bound of its own."""

    def page(*models):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with Results(folder, {}) as run:
            for number, each in enumerate(models):
                row = {"task": "t", "method": f"m{number}", "item": "1"}
                run.add({**row, "models": json.dumps(each)})
        markdown, html = (path.read_text() for path in write_report(folder))
        return markdown, Elements(html).of("p", "warning")

    family = {"large": "big", "base": "small", "math": "sums"}
    bounds = [{"upper-bound": "tuned-a"}, {"upper-bound": "tuned-b"}]
    markdown, warnings = page({"math": "sums"}, family, {"large": "big"}, *bounds)
    listed = "large: big; base: small; math: sums; upper-bound: tuned-a; upper-bound: tuned-b"
    assert f"- models: {listed}" in markdown
    assert warnings == []
    _, (warning,) = page(family, {"large": "other"})
    assert warning.endswith("they differ in model large.")


def test_a_folder_without_results_makes_no_page(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["1200,1000", "500,1000"])
def test_a_browser_draws_it(pages, folder, tmp_path, size):
    """That it draws something at all, and that no page is wider than its window."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium")
    probe = tmp_path / "probe.html"
    # Only the copy may run a script: it says how wide the page is.
    says = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    page = re.sub(r"<meta http-equiv.*?>", "", pages[1]).replace("</body>", says)
    probe.write_text(page)
    quiet = "no-first-run disable-background-networking disable-component-update disable-sync"
    flags = ["headless", "no-sandbox", "disable-gpu", "hide-scrollbars", "dump-dom", *quiet.split()]
    flags += [f"user-data-dir={tmp_path / 'profile'}", f"window-size={size}"]
    done = subprocess.run(
        [browser, *(f"--{flag}" for flag in flags), probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    width = re.search(r"<title>(\d+)</title>", done.stdout)
    assert width, done.stdout[:500]
    assert int(width[1]) <= int(size.split(",")[0])
