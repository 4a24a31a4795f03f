"""What the documentation shows exists: commands, options, names, files, tables of presets and options."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import gzip
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import rehearsal
from rehearsal.agents.protocol import Protocol
from rehearsal.algorithms import OPTION_NAMES, PRESETS, Options, preset
from rehearsal.cli.parser import dotted_options, make_parser, without_dotted
from rehearsal.environments import registry
from rehearsal.environments.tasks import VerifiedTasks, close_pools
from rehearsal.errors import RecipeError, SandboxError
from rehearsal.rewards.registry import _factory as verifier_factory
from rehearsal.rewards.registry import _options as verifier_options
from rehearsal.rewards.registry import verifiers
from rehearsal.sandbox import strongest
from rehearsal.training.base_config import BaseConfig
from rehearsal.training.recipe import built_in_recipes, option_names, resolve_recipe

ROOT = Path(__file__).resolve().parent.parent
# The results are written by a script and name the options of other scripts.
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "results.md"})
KNOWN_OPTIONS = option_names()
DICTIONARIES = (
    "environment.params", "model.template_options", "algorithm.options", "filter.options", "tools.options",
    "tools.per_tool",
)  # fmt: skip

# Names that a reader is to replace: they need not exist.
PLACES = ("path/to/your/model", "./my-base", "my_recipe.toml", "MODEL")


class Block(NamedTuple):
    """A fenced block of code."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    language, begin, lines = None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, begin, lines = line[3:].strip(), number, []
        else:
            yield Block(page, begin, language, "\n".join(lines) + "\n")
            language = None
    assert language is None, f"{page.name}:{begin} opens a block that never ends"


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_language(*languages: str) -> Any:
    return pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in languages], ids=str)


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without the table's own head."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert f"\n{heading}\n" in text, f"{page} has no heading {heading!r}"
    lines = iter(text.split(f"\n{heading}\n", 1)[1].splitlines())
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            break
    return rows[2:]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "index.md", "troubleshooting.md"} <= {page.name for page in PAGES}
    assert len([b for b in BLOCKS if b.language == "sh"]) > 10


# Links


def slug(heading: str) -> str:
    """The anchor that a heading gets on common hosts."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose_of(file), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links to {target}, which has no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        waiting += [
            (page.parent / t.partition("#")[0]).resolve() for t in re.findall(r"\]\(([^)\s:]+)\)", prose_of(page))
        ]
    assert set(PAGES) <= seen, f"no way leads to {sorted(page.name for page in set(PAGES) - seen)}"


# Python


@of_language("python")
def test_python_blocks_name_what_exists(block: Block) -> None:
    tree = ast.parse(block.text, filename=str(block))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rehearsal":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block}: {node.module} has no {alias.name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rh":
            assert node.attr in rehearsal.__all__, f"{block}: rehearsal has no {node.attr}"
        if isinstance(node, ast.Call):
            check_call(block, node)


def check_call(block: Block, call: ast.Call) -> None:
    """Keyword arguments of ``rh.NAME(...)`` are parameters of it, and dotted overrides are options."""
    name = ast.unparse(call.func)
    if not name.startswith("rh.") or name == "rh.make":
        return
    function = getattr(rehearsal, name.removeprefix("rh."))
    parameters = inspect.signature(function).parameters
    for keyword in call.keywords:
        assert keyword.arg in parameters, f"{block}: {name} has no parameter {keyword.arg}"
        if keyword.arg == "overrides":
            check_dotted(block, ast.literal_eval(keyword.value))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_in_the_text_exist(page: Path) -> None:
    for code in code_in(prose_of(page)):
        # Classes and calls; plain words behind the package's name are modules, or keys of files.
        for name in re.findall(r"\b(?:rh|rehearsal)\.([A-Z]\w*|\w+(?=\())", code):
            assert name in rehearsal.__all__, f"{page.name} names rehearsal.{name}, which does not exist"
        for keywords in re.findall(r"^rh\.(\w+)\((.*)\)$", code):
            parameters = inspect.signature(getattr(rehearsal, keywords[0])).parameters
            for given in re.findall(r"(\w+)=", keywords[1]):
                assert given in parameters, f"{page.name}: rh.{keywords[0]} has no parameter {given}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_in_the_text_exist(page: Path) -> None:
    for code in code_in(prose_of(page)):
        if re.fullmatch(r"(rehearsal|tests|examples|benchmarks|experiments)/[\w./]*", code):
            assert (ROOT / code).exists(), f"{page.name} names {code}, which does not exist"


def test_the_readme_shows_the_example_as_it_is() -> None:
    example = (ROOT / "examples" / "own_environment.py").read_text(encoding="utf-8")
    shown = next(b.text for b in BLOCKS if b.page.name == "README.md" and "class Corridor" in b.text)
    without_docstring = example.split('"""', 2)[2].lstrip("\n")
    assert shown == without_docstring, "\n".join(difflib.unified_diff(shown.split("\n"), without_docstring.split("\n")))


# Commands


def commands_of(block: Block) -> Iterator[list[str]]:
    for line in block.text.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check_dotted(where: object, values: dict[str, Any]) -> None:
    for name in values:
        known = name in KNOWN_OPTIONS or name.startswith(tuple(f"{prefix}." for prefix in DICTIONARIES))
        assert known, f"{where}: there is no option {name}"


@of_language("sh")
def test_commands_exist(block: Block) -> None:
    for words in commands_of(block):
        match words:
            case ["rehearsal", *given]:
                check_command(block, given)
            case ["make", target]:
                assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"{block}: there is no target {target}"
            case ["pip", "install", *packages]:
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                for extra in re.findall(r"rehearsal\[([\w-]+)\]", " ".join(packages)):
                    assert extra in extras, f"{block}: there is no extra {extra}"
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module) is not None, f"{block}: there is no module {module}"
            case ["inspect", "eval", task, *_]:
                project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
                package, _, name = task.partition("/")
                file = ROOT / (project["entry-points"]["inspect_ai"][package].replace(".", "/") + ".py")
                assert f"\n@task\ndef {name}(" in file.read_text(), f"{block}: there is no task {task}"
            case ["python", script, *_]:
                assert (ROOT / script).is_file(), f"{block}: there is no {script}"
            case ["source", ".venv/bin/activate"] | ["pre-commit", "install"]:
                pass
            case _:
                pytest.fail(f"{block}: nobody checks {shlex.join(words)}; teach this test how")


def check_command(block: Block, given: list[str]) -> None:
    try:
        parser, flags = make_parser()
        plain, dotted = without_dotted(given, flags)
        options, rest = parser.parse_known_args(plain)
        rest = [*dotted, *rest]
    except SystemExit:
        pytest.fail(f"{block}: the command line does not take: rehearsal {shlex.join(given)}")
    assert given[0] in cli_options()
    if rest:
        assert options.takes_dotted, f"{block}: rehearsal {given[0]} does not take {rest[0]}"
    dotted = dotted_options(rest)
    if given[0] in ("train", "eval"):
        check_dotted(block, dotted)
        recipe = getattr(options, "recipe", None)
        assert recipe in (None, *PLACES, *built_in_recipes()), f"{block}: there is no recipe {recipe}"
        resolve_recipe(None if recipe in PLACES else recipe, dotted)
    elif given[0] in ("check", "play") and ":" not in options.environment:
        rehearsal.make(options.environment, **dotted)
    elif given[0] == "base":
        BaseConfig.from_options(dotted)


def test_a_wrong_command_would_be_found() -> None:
    with pytest.raises(pytest.fail.Exception):
        check_command(Block(ROOT, 0, "sh", ""), ["trian", "frozenlake"])
    with pytest.raises(AssertionError, match="no option"):
        check_command(Block(ROOT, 0, "sh", ""), ["train", "frozenlake", "--training.stepz", "3"])
    with pytest.raises(RecipeError):
        check_command(Block(ROOT, 0, "sh", ""), ["check", "frozenlake", "--slips", "1"])


@of_language("toml")
def test_toml_blocks_are_recipes(block: Block) -> None:
    resolve_recipe(tomllib.loads(block.text))


def params_of_tasks() -> list[Any]:
    """The parameters of all recipes on these pages whose environment is ``tasks``."""
    recipes = [(block, tomllib.loads(block.text)) for block in BLOCKS if block.language == "toml"]
    return [pytest.param(block, recipe["environment"]["params"], id=str(block)) for block, recipe in recipes
            if recipe.get("environment", {}).get("name") == "tasks"]  # fmt: skip


@pytest.mark.parametrize(("block", "params"), params_of_tasks())
def test_recipes_of_tasks_name_what_exists(block: Block, params: dict[str, Any]) -> None:
    known = inspect.signature(VerifiedTasks).parameters
    assert set(params) <= set(known), f"{block}: tasks has no parameter {sorted(set(params) - set(known))[0]}"
    assert params["verifier"] in verifiers(), f"{block}: there is no verifier {params['verifier']}"
    taken, takes_any = verifier_options(verifier_factory(params["verifier"]))
    assert takes_any or set(params.get("options", {})) <= set(taken), f"{block}: an option that it has not"


def test_three_whole_recipes_are_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the published form, an answer as an agent writes it, and what becomes of it."""
    try:
        strongest()
    except SandboxError as error:
        pytest.skip(str(error))
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    code = {"task_id": "HumanEval/0", "prompt": "def twice(n):\n", "entry_point": "twice", "canonical_solution": "",
            "test": "def check(candidate):\n    assert candidate(2) == 4\n"}  # fmt: skip
    text = {"key": 1, "prompt": "Be brief.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    for n in range(30):  # so that every split has some
        write(Path("gsm8k/train.jsonl"), {"question": f"{n} + 1?", "answer": f"#### {n + 1}"})
        write(Path("gsm8k/test.jsonl"), {"question": f"{n} + 2?", "answer": f"#### {n + 2}"})
        write(Path("HumanEval.jsonl"), {**code, "prompt": f"# {n}\ndef twice(n):\n"})
        write(Path("ifeval.jsonl"), {**text, "prompt": f"Be brief, {n}."})
    Path("HumanEval.jsonl.gz").write_bytes(gzip.compress(Path("HumanEval.jsonl").read_bytes()))
    answers = {
        "gsm8k": ("It is {}.", "It is 99."),
        "humaneval": ("```python\ndef twice(n):\n    return 2 * n  # || this\n```", "def twice(n): return n"),
        "ifeval": ("No comma || here.", "Well, no."),
    }
    played = []
    for block in (block for block in BLOCKS if block.language == "toml" and block.page.name == "rewards.md"):
        recipe = resolve_recipe(tomllib.loads(block.text))
        if recipe.name not in answers:
            continue
        played.append(recipe.name)
        env = rehearsal.make(recipe.environment.name, **recipe.environment.params, timeout=300.0)
        for answer, reward in zip(answers[recipe.name], (1.0, 0.0), strict=True):
            shown, _ = env.reset(seed=0, options={"split": "test"})
            if recipe.name == "gsm8k":
                answer = answer.format(int(shown.split()[0]) + 2)
            parsed = Protocol(free_text=True).parse(f"<think>Well, 1, 2, 3.</think><answer>\n{answer}\n</answer>")
            assert env.step(*parsed.actions)[1] == reward, (recipe.name, answer)
    assert played == list(answers)
    close_pools()


def write(file: Path, row: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def cli_options() -> dict[str, set[str]]:
    """The options of each command."""
    parsers = next(a for a in make_parser()[0]._actions if isinstance(a, argparse._SubParsersAction)).choices
    return {name: {o for a in parser._actions for o in a.option_strings} for name, parser in parsers.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page: Path) -> None:
    plain = {option for options in cli_options().values() for option in options}
    sections = {name.split(".")[0] for name in KNOWN_OPTIONS if "." in name}
    for code in code_in(prose_of(page)):
        for option in re.findall(r"(?<![\w-])--([\w.-]+)", code):
            if f"--{option}" in plain or (page.name == "CONTRIBUTING.md" and option == "quick"):
                continue
            check_dotted(page.name, {option: None})
        if re.fullmatch(r"[a-z]+\.[a-z_.]+", code) and code.split(".")[0] in sections:
            check_dotted(page.name, {code: None})


@pytest.mark.parametrize("command", sorted(cli_options()))
def test_the_command_line_page_has_every_option(command: str) -> None:
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    part = next((part for part in parts if command in part.splitlines()[0].split(", ")), None)
    assert part is not None, f"the command line page does not tell of {command}"
    for option in cli_options()[command] - {"-h", "--help"}:
        assert option in part, f"the command line page does not tell of {command} {option}"


def test_every_argument_without_dashes_is_explained() -> None:
    parsers = next(a for a in make_parser()[0]._actions if isinstance(a, argparse._SubParsersAction)).choices
    for name, parser in parsers.items():
        for action in parser._actions:
            assert action.option_strings or action.help, f"rehearsal {name} --help does not say what {action.dest} is"


# Tables


def test_the_table_of_sections_of_a_recipe() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text[text.index("| section | what it holds |") :].partition("\n\n")[0]
    sections = {name.partition(".")[0] for name in KNOWN_OPTIONS if "." in name} | {"mixture"}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sections


def test_figures_of_information_and_of_the_policy_are_described() -> None:
    """By the names that runs write."""
    page = (ROOT / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    for name in ("first/empty", "first/ceiling", "first/tokens", "all/ceiling", "all/tokens"):
        assert f"`information/{name}`" in page
    assert "information/first/sequence/empty" not in page
    for name in ("correction", "dual_clipped", "kl"):
        assert f"| `policy/{name}` |" in page


def test_the_table_of_presets() -> None:
    rows = {code_in(row[0])[0]: row for row in rows_of("docs/algorithms.md", "## Presets")}
    assert set(rows) == set(PRESETS)
    for name, (_, advantage, loss, aggregation, *_) in rows.items():
        options = preset(name).options
        shown = (code_in(advantage)[0], loss, code_in(aggregation)[0])
        assert shown == (options["advantage"], options["loss"], options["aggregation"]), name


def test_the_table_of_algorithm_options() -> None:
    rows = {code_in(row[0])[0]: code_in(row[1])[0] for row in rows_of("docs/algorithms.md", "## All options")}
    assert tuple(rows) == OPTION_NAMES
    assert rows == {name: str(getattr(Options(), name)) for name in OPTION_NAMES}


def test_the_table_of_environments() -> None:
    rows = {code_in(row[0])[0]: row for row in rows_of("docs/environments.md", "## Built-in environments")}
    # Built-in environments are registered by their place in the package; those of other tests are classes.
    assert set(rows) == {name for name, target in registry._registered.items() if isinstance(target, str)}
    for name, (_, shown, limits) in rows.items():
        factory: Any = registry._factory(name)
        defaults = {
            parameter.name: parameter.default
            for parameter in inspect.signature(factory).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        }
        given = dict(code.split("=", 1) for code in code_in(shown) if "=" in code)
        assert {key: ast.literal_eval(value) for key, value in given.items()} == {
            key: value for key, value in defaults.items() if value is not inspect.Parameter.empty
        }, name
        assert limits == f"{factory.max_turns} x {factory.max_actions_per_turn}", name


def test_the_options_of_the_base_model() -> None:
    rows = rows_of("docs/base-model.md", "## Options")
    shown = {name for row in rows for name in code_in(row[0])}
    own = {field.name for field in dataclasses.fields(BaseConfig)} - {"mix", "scenes"}
    mix = {f"mix.{field.name}" for field in dataclasses.fields(BaseConfig().mix)}
    assert shown == own | mix


def test_nothing_speaks_of_machines_and_helpers() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(work|tmp|home|root)/", text), f"{page.name} names a path of some machine"
