"""What the documents promise exists: links, make targets, files, packages, columns."""

import configparser
import re
from pathlib import Path

import pytest

from experiments.config import load_config
from experiments.plan.plan import make_plan
from experiments.tables.schema import readme_lines

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
CONFIGS = sorted((ROOT / "experiments" / "configs").glob("*.yaml"))
CONFIG_SIZES = {"bits": 1536, "default": 768, "grid": 8192, "kv": 1536, "multi_layer": 288}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


def test_make_targets_named_in_documents_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, document.name


def test_column_readme_is_what_the_schema_generates():
    assert (ROOT / "results" / "README.md").read_text(encoding="utf-8").splitlines() == list(readme_lines())


def test_every_package_is_listed_in_setup():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split("\n")
    names = {line for line in listed if line and not line.startswith("#")}
    roots = ("fault_injection", "bounds", "monitoring", "experiments")
    present = {
        ".".join(path.parent.relative_to(ROOT).parts) for root in roots for path in (ROOT / root).rglob("__init__.py")
    }
    assert names == present


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_have_the_size_they_say(path):
    plan = make_plan(load_config(["--config", str(path)]))
    assert len(plan.runs) == CONFIG_SIZES[path.stem]
    assert plan.config.name == path.stem


def test_no_module_breaks_the_direction_of_dependencies():
    forbidden = {
        "fault_injection": ("bounds", "monitoring", "experiments"),
        "bounds": ("experiments", "monitoring"),
        "monitoring": ("experiments",),
    }
    for package, others in forbidden.items():
        for path in (ROOT / package).rglob("*.py"):
            imports = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert not set(imports) & set(others), path
