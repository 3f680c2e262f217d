"""The documents mirror the code, and their links lead somewhere."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_generated_parts_are_up_to_date():
    done = subprocess.run([sys.executable, "tools/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_captioned_tree_holds_every_module():
    tree = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8").split("<!-- tree: generated -->")[1]
    tree = tree.split("<!-- end -->")[0]
    shown, folder = set(), ""
    for name in re.findall(r"^ +(\S+)", tree, re.MULTILINE):
        if name.endswith("/"):
            folder = name
        else:
            shown.add(folder + name)
    package = ROOT / "src" / "koret"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    # a folder's __init__.py captions the folder itself
    expected = {name for name in modules if "/" not in name or not name.endswith("/__init__.py")}
    assert shown == expected
    assert all(re.search(rf"^ +{re.escape(name.rpartition('/')[2])} +\S", tree, re.MULTILINE) for name in expected)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_local_links_and_pictures_exist(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src(?:set)?="([^"]+)"', text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (document.parent / target).exists(), f"{document.name} points at {target}"


PICTURES = sorted(path for path in (ROOT / "docs").rglob("*") if path.suffix in (".svg", ".png"))
SCRIPTS = [path for folder in ("benchmarks", "tools", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.name)
def test_every_picture_is_made_by_a_script_and_shown(picture):
    makers = [path for path in SCRIPTS if picture.name in path.read_text(encoding="utf-8")]
    assert makers, f"no script in benchmarks, tools or tests names {picture.name}"
    assert any(picture.name in document.read_text(encoding="utf-8") for document in DOCUMENTS)


def test_the_drawing_of_search_is_what_its_script_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import pictures

    drawn = (ROOT / "docs" / "pictures" / "search.svg").read_text(encoding="utf-8")
    monkeypatch.setattr(pictures, "PICTURES", tmp_path)
    assert pictures.draw_search().read_text(encoding="utf-8") == drawn
    ElementTree.fromstring(drawn)


def normalise_drawing(text: str) -> str:
    """An SVG without what differs each time: the date, and the names of its parts."""
    text = re.sub(r"<dc:date>.*?</dc:date>", "", text)
    for order, name in enumerate(dict.fromkeys(re.findall(r"\b[mp][0-9a-f]{10}\b", text))):
        text = text.replace(name, f"part{order}")
    return text


@pytest.mark.parametrize("draw", ["draw_korquad1", "draw_recipes"])
def test_pictures_of_results_are_what_their_script_draws_of_the_results(draw, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import figures

    monkeypatch.setattr(figures, "PICTURES", tmp_path)
    drawn = getattr(figures, draw)()
    kept = (ROOT / "docs" / "pictures" / drawn.name).read_text(encoding="utf-8")
    fresh = drawn.read_text(encoding="utf-8")
    versions = [re.search(r"Matplotlib v[0-9.]+", text)[0] for text in (kept, fresh)]
    if versions[0] != versions[1]:
        pytest.skip(f"the picture was drawn by {versions[0]}, here is {versions[1]}")
    same = normalise_drawing(fresh) == normalise_drawing(kept)
    assert same, f"{drawn.name} is not what benchmarks/figures.py draws of benchmarks/results: run it"


GUIDE = ROOT / "docs" / "ADVANCED.md"


def test_learning_guide_quotes_only_differences_that_stand_in_the_results():
    """Every difference with its interval comes from RESULTS.md, whose tables are checked against benchmarks/results."""
    results = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    quoted = re.findall(r"[+-]0\.\d+ \[[+-]0\.\d+, [+-]0\.\d+\]", GUIDE.read_text(encoding="utf-8"))
    assert len(quoted) >= 20
    assert not [difference for difference in quoted if difference not in results]


def test_learning_guide_names_only_modules_that_exist():
    named = set(re.findall(r"`(koret\.[a-z_.]+)`", GUIDE.read_text(encoding="utf-8")))
    assert len(named) > 20
    for name in named:
        parts = name.split(".")
        whole, inner = ROOT / "src" / Path(*parts), ROOT / "src" / Path(*parts[:-1])
        is_module = whole.is_dir() or whole.with_suffix(".py").is_file()
        if not is_module:  # koret.clean_html_text: a name inside the module before it
            module = importlib.import_module(".".join(parts[:-1]))
            assert hasattr(module, parts[-1]), f"{name} is neither a module nor in {inner}"


def test_learning_guide_papers():
    text = GUIDE.read_text(encoding="utf-8")
    papers = text[text.index("## 15. Papers") :]
    rows = re.findall(r"\]\(https://arxiv\.org/abs/([^)]+)\).*?\| ([0-9.]+) \|", papers)
    assert len(rows) >= 20
    for linked, stated in rows:
        assert linked == stated and re.fullmatch(r"[12][0-9](0[1-9]|1[0-2])\.[0-9]{4,5}", linked), (linked, stated)
        # numbers have five digits since January 2015
        assert len(linked.split(".")[1]) == (5 if linked >= "1501" else 4)
    identifiers = [linked for linked, _ in rows]
    assert len(set(identifiers)) == len(identifiers)
    cited = set(re.findall(r"arxiv\.org/abs/([0-9.]+)", text))
    assert all(re.fullmatch(r"[0-9]{4}\.[0-9]{4,5}", identifier) for identifier in cited)


def test_learning_guide_has_ten_weeks_with_something_to_run_and_to_measure():
    text = GUIDE.read_text(encoding="utf-8")
    weeks = re.split(r"^### Week (\d+):", text[text.index("## 14.") : text.index("## 15.")], flags=re.MULTILINE)[1:]
    assert [int(number) for number in weeks[::2]] == list(range(1, 11))
    for number, week in zip(weeks[::2], weeks[1::2], strict=True):
        assert "```bash" in week and "koret " in week and "*Measure:*" in week, f"week {number}"
        assert re.match(r".*\((beginner|intermediate|advanced)\)", week), f"week {number} names no level"


def test_learning_guide_says_of_every_idea_where_it_lives_and_what_it_gave():
    text = GUIDE.read_text(encoding="utf-8")
    ideas = re.split(r"^### ", text[text.index("## 2.") : text.index("### 11.4")], flags=re.MULTILINE)[1:]
    assert len(ideas) >= 30
    for idea in ideas:
        title = idea.splitlines()[0]
        assert re.search(r"\*\*(In koret|Not in koret)", idea), f"{title}: not said whether koret has it"
        assert "**Here:**" in idea, f"{title}: not said what it gave here"
        assert "$$" in idea, f"{title}: no formula"


WALK = ROOT / "docs" / "tutorial" / "walk.py"


def test_tutorial_page_is_made_from_the_present_source():
    done = subprocess.run([sys.executable, "tools/tutorial.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_tutorial_check_notices_a_changed_cell(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import tutorial

    source = "# %% [markdown]\n# # Title\n\n# %%\nprint(6 * 7)\n"
    page = tutorial.render(source, tutorial.run_cells(tutorial.read_cells(source)))
    assert "# Title" in page and "print(6 * 7)" in page and "```text\n42\n```" in page
    assert tutorial.check(source, page) is None
    assert tutorial.check(source.replace("7", "8"), page)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tutorial_runs_in_less_than_a_quarter_of_an_hour(tmp_path):
    page = tmp_path / "walk.md"
    began = time.perf_counter()
    command = [sys.executable, "tools/tutorial.py", "--out", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.perf_counter() - began < 15 * 60
    assert page.read_text(encoding="utf-8").count("```python") == WALK.read_text(encoding="utf-8").count("# %%\n")


def test_tables_say_what_was_measured():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
