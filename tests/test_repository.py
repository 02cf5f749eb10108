"""The files around the package agree with it: workflows, hooks, recipe, container, classifiers, citation."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from trove_classifiers import classifiers

import cellmap_lightning.callbacks

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read_yaml(*parts):
    return yaml.safe_load(ROOT.joinpath(*parts).read_text(encoding="utf-8"))


def jobs(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_limits_and_few_permissions(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert True in workflow  # the key `on`, which YAML 1.1 reads as a boolean
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 180, name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_to_commits(path):
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    for line in lines:
        assert re.fullmatch(r"- (?:id: \w+\n)?uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_checkouts_leave_no_token_behind(path):
    steps = [step for job in jobs(path).values() for step in job["steps"]]
    checkouts = [step for step in steps if step.get("uses", "").startswith("actions/checkout@")]
    for step in checkouts:
        assert step["with"]["persist-credentials"] is False


def test_dependabot_updates_what_is_pinned():
    updates = {entry["package-ecosystem"] for entry in read_yaml(".github", "dependabot.yml")["updates"]}
    assert updates == {"github-actions", "pip", "docker"}


def test_hooks_are_the_checks_of_ci():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    start, end = script.index("ruff check ."), script.index("lint-imports")
    (repo,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in repo["hooks"]] == script[start : end + 1]
    assert all(hook["pass_filenames"] is False for hook in repo["hooks"])


def test_recipe_needs_what_the_project_needs():
    recipe = read_yaml("recipe", "recipe.yaml")
    assert recipe["schema_version"] == 1
    assert recipe["context"]["version"] == cellmap_lightning.__version__
    names = {"torch": "pytorch", "matplotlib": "matplotlib-base"}  # of conda-forge
    wanted = {
        f"{names.get(r.name, r.name)} {r.specifier}"
        for r in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"])
    }
    assert set(recipe["requirements"]["run"]) == wanted | {f"python {PROJECT['requires-python']}"}
    scripts = [f"{name} = {target}" for name, target in sorted(PROJECT["scripts"].items())]
    assert recipe["build"]["python"]["entry_points"] == scripts
    assert recipe["about"]["license"] == PROJECT["license"]


def docker_instructions():
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_dockerfile_uses_constraints_and_no_root():
    lines = docker_instructions()
    assert lines[0][0] == "ARG"
    assert lines[1] == ("FROM", "${BASE}")
    base = lines[0][1].removeprefix("BASE=")
    assert re.fullmatch(r"[\w/]+:[\w.-]+", base)
    assert not base.endswith(":latest")
    users = [argument for instruction, argument in lines if instruction == "USER"]
    assert users
    assert int(users[-1]) > 0  # by number: a name cannot be checked to be no root
    installs = [argument for instruction, argument in lines if instruction == "RUN" and "pip install" in argument]
    assert len(installs) == 2
    assert all("-c constraints.txt" in argument for argument in installs)
    extras = next(a for _, a in lines if a.startswith("EXTRAS=")).removeprefix("EXTRAS=").split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_dockerignore_lets_through_what_is_copied():
    rules = [r for r in (ROOT / ".dockerignore").read_text().splitlines() if r and not r.startswith("#")]
    copied = [name for k, a in docker_instructions() if k == "COPY" for name in a.split()[:-1]]
    assert "constraints.txt" in copied
    for name in copied:
        assert (ROOT / name).exists(), name
        last = [rule for rule in rules if fnmatch(name, rule.lstrip("!"))][-1]
        assert last.startswith("!"), name


def nav_pages(entries):
    """Yield the pages of a part of the navigation."""
    for entry in entries:
        for value in entry.values():
            yield from nav_pages(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation():
    pages = list(nav_pages(read_yaml("mkdocs.yml")["nav"]))
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(pages) == written | notebooks | {"index.md", "changelog.md", "contributing.md", "security.md"}
    assert len(pages) == len(set(pages))


def test_public_names_are_in_the_reference():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    names = set(re.findall(r"^::: cellmap_lightning\.\S*?(\w+)$", text, re.MULTILINE))
    assert {*cellmap_lightning.__all__, *cellmap_lightning.callbacks.__all__} <= names | {"CellMapError"}


def test_metadata_of_the_project():
    assert set(PROJECT["classifiers"]) <= classifiers
    assert PROJECT["authors"] == [{"name": "cellmap_lightning developers"}]
    citation = read_yaml("CITATION.cff")
    assert citation["authors"] == PROJECT["authors"]
    assert citation["version"] == cellmap_lightning.__version__
    assert citation["license"] == PROJECT["license"]


def test_pythons_of_ci():
    tests = jobs(ROOT / ".github" / "workflows" / "tests.yml")["tests"]
    pythons = tests["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    stated = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert stated == pythons[: len(stated)]
    assert tests["steps"][-1]["run"] == ".ci/run"


def test_release_publishes_what_was_built_without_a_password():
    release = jobs(ROOT / ".github" / "workflows" / "release.yml")
    assert release["publish"]["needs"] == "build"
    assert release["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_bug_reports_ask_for_the_data():
    bug = read_yaml(".github", "ISSUE_TEMPLATE", "bug.yml")
    assert any("cellmap-inspect json=true" in part["attributes"].get("description", "") for part in bug["body"])


@pytest.mark.parametrize("name", ["AGENTS.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_of_the_files_at_the_top(name):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).exists(), target
