"""The documentation is run: README blocks, examples, the generated pages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli import VERBS

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "README.zh-CN.md", "docs/guide.md", "docs/guide.zh-CN.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "tasks").glob("*.md"))
BLOCKS = [
    (file, number, block)
    for file in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.S))
]


def needs_minilm(text):
    return '"minilm"' in text or " minilm " in text


def run(command, folder):
    environment = {**os.environ, "PYTHONWARNINGS": "default", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("file", "number", "block"), BLOCKS, ids=[f"{file}-{number}" for file, number, _ in BLOCKS])
def test_python_blocks_run(file, number, block, tmp_path):
    run([sys.executable, "-c", block], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(example, tmp_path):
    run([sys.executable, str(example)], tmp_path)


@pytest.mark.slow
def test_the_generated_pages_are_up_to_date():
    """`python docs/generate.py` writes them; they hold every --help and the tables of the registries."""
    out = run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], ROOT)
    assert "up to date" in out


def test_every_verb_stands_in_the_docs():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"## lorakit {verb}" in page


def test_the_file_tree_of_the_readme_names_what_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for entry in (ROOT / "src" / "lorakit").iterdir():
        if entry.name.startswith("_") or entry.name == "py.typed":
            continue
        name = entry.name + ("/" if entry.is_dir() else "")
        assert name in text, f"{name} is not in the README's tree"


def test_links_between_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_no_page_names_a_path_of_a_machine():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "dev").glob("*.md")]:
        assert not re.search(r"(^|[^\w.])/(root|home|work|Users)/", page.read_text(encoding="utf-8")), page
