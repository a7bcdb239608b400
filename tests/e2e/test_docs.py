"""Documentation leads somewhere: links and their anchors, the index of pages, and the map of the repository."""

import re

import pytest

from support.cli import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, ROOT / "data" / "README.md"]
PACKAGE = ROOT / "src" / "llamafactory_ddm"


def name_of(page):
    return str(page.relative_to(ROOT))


def links(page):
    """Yield (file, anchor) of each link of a page to a file of the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        yield (page.parent / path).resolve() if path else page, anchor


def anchors(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path.name}#{anchor}"


def test_the_index_links_every_page():
    index = ROOT / "docs" / "README.md"
    assert {path for path, _ in links(index)} >= {*DOCS} - {index}
    assert index in {path for path, _ in links(ROOT / "README.md")}


@pytest.mark.parametrize("page", ["glossary.md", "paper_index.md"])
def test_files_that_a_page_names_exist(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for name in re.findall(r"`((?!tests/)\w+(?:/\w+)+\.py)`", text):
        assert (PACKAGE / name).is_file(), name
    for name in re.findall(r"`(tests/\S+\.py)`", text):
        assert (ROOT / name).is_file(), name


def test_the_map_in_contributing_is_what_is_there():
    """Each line of the tree is a path, indented under its folder, and what it holds."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"```text\n(.*?)```", text, re.S)
    named, folders = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        for name in re.findall(r"\S+", re.split(r"\s{2,}", line.strip())[0]):
            path = "/".join([*(folder.rstrip("/") for folder in folders), name.rstrip("/")])
            assert (ROOT / path).is_dir() if name.endswith("/") else (ROOT / path).is_file(), path
            named.add(path)
        folders.append(name)
    there = {str(path.parent.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert there <= named, there - named
    for name in re.findall(r"`((?:src|tests|docs|examples|\.ci)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name
