"""Who may know whom: the imports of every file, read from its syntax tree."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from tiny import ROOT

from fusion import pipeline

PACKAGES = ("fusion", "data_prep", "launch")
ROOMS = ("align", "capture", "distill", "merge", "release")
SHARED = [
    *("fusion.records", "fusion.cluster", "fusion.artifact", "fusion.config", "fusion.tracking"),
    *("fusion.hub", "fusion.corpus", "fusion.compiled", "fusion.tokens", "fusion.measure", "fusion.spread"),
]
# who → whom it may know; `package` stands for all within it, and whoever has no line of its own has its package's
MAY_KNOW = {
    "fusion": [],
    "fusion.records": [],
    "fusion.compiled": [],
    "fusion.cluster": [],
    "fusion.spread": [f"fusion.{name}" for name in ("config", "cluster", "hub")],
    "fusion.artifact": ["fusion", "fusion.records"],
    "fusion.config": ["fusion.records"],
    "fusion.config_file": ["fusion.config"],
    "fusion.tracking": ["fusion.records", "fusion.config", "fusion.cluster"],
    "fusion.corpus": ["fusion.records", "fusion.artifact"],
    "fusion.hub": ["fusion.records", "fusion.artifact", "fusion.config", "fusion.cluster"],
    "fusion.measure": [
        f"fusion.{name}" for name in ("records", "config", "cluster", "tracking", "hub", "spread", "tokens")
    ],
    "fusion.tokens": ["fusion.records", "fusion.tokens"],
    "fusion.repair": SHARED,
    "fusion.pipeline": [*SHARED, "fusion.config_file", "fusion.repair"],
    "fusion.sizes": ["fusion.config"],
    "fusion.survey": [*SHARED, "fusion.pipeline", "fusion.sizes"],
    "fusion.costs": [*SHARED, "fusion.config_file", "fusion.pipeline", "fusion.sizes", "fusion.survey"],
    **{f"fusion.{room}": [*SHARED, f"fusion.{room}"] for room in ROOMS},
    "fusion.align.stage": [*SHARED, "fusion.align", "fusion.capture.cache"],
    "fusion.distill": [*SHARED, "fusion.distill", "fusion.align", "fusion.capture.cache"],
    "data_prep": [*SHARED, "data_prep"],
    "launch.fuse": [*SHARED, "fusion.config_file", "fusion.pipeline", "fusion.costs"],
    "launch.merge": [
        *SHARED,
        *(f"fusion.merge.{part}" for part in ("recipe", "engine", "outcome", "pools", "report", "writer")),
    ],
    "launch.collect": [*SHARED, "fusion.merge.collect", "data_prep.samples"],
    "launch.evaluate": [*SHARED, "fusion.release.tasks", "data_prep.samples"],
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a tree imports, at any depth; `from package import module` is the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def ours(tree: ast.AST) -> list[str]:
    return [name for name in imports(tree) if name.partition(".")[0] in PACKAGES]


def within(module: str, package: str) -> bool:
    return module == package or package != "fusion" and module.startswith(package + ".")


def line_of(module: str) -> list[str]:
    while module not in MAY_KNOW:
        module, dot, _ = module.rpartition(".")
        assert dot, "every file has a line"
    return MAY_KNOW[module]


def test_the_walk_sees_what_it_should() -> None:
    assert len(FILES) > 40 and {"fusion", "fusion.merge.methods.sce", "launch.fuse"} <= set(MODULES)
    code = "def f():\n from fusion import hub, cluster\n import fusion.align.spans\n from fusion.config import Config\n"
    assert list(imports(ast.parse(code))) == ["fusion.hub", "fusion.cluster", "fusion.align.spans", "fusion.config"]
    assert "fusion.capture.cache" in list(imports(tree_of(MODULES["fusion.distill.dataset"])))


@pytest.mark.parametrize("module", MODULES)
def test_imports_stay_within_the_rules(module: str) -> None:
    strangers = [n for n in ours(tree_of(MODULES[module])) if not any(within(n, known) for known in line_of(module))]
    assert not strangers


def test_rules_are_no_wider_than_they_look() -> None:
    assert line_of("fusion.release.card") == [*SHARED, "fusion.release"]
    assert not any(within("fusion.capture.cache", known) for known in line_of("fusion.align.vocabulary"))
    assert not any(within("fusion.capture.stage", known) for known in line_of("fusion.distill.stage"))
    assert not any(within("fusion.pipeline", known) for known in line_of("fusion.artifact"))


@pytest.mark.parametrize("module", MODULES)
def test_only_the_pipeline_knows_the_stages(module: str) -> None:
    assert [name for name in ours(tree_of(MODULES[module])) if name.endswith(".stage")] == []
    words = [n.value for n in ast.walk(tree_of(MODULES[module])) if isinstance(n, ast.Constant)]
    named = [w for w in words if isinstance(w, str) and re.fullmatch(r"(fusion|data_prep)\.([a-z_]+\.)*stage", w)]
    if module == "fusion.pipeline":
        assert named == [name for name, _ in pipeline.STAGES.values()] and len(named) == 6
    else:
        assert named == []


def test_every_stage_has_the_same_door() -> None:
    rooms = {module for module in MODULES if module.endswith(".stage")}
    assert rooms == {name for name, _ in pipeline.STAGES.values()}
    for name in rooms:
        run = importlib.import_module(name).run
        assert list(inspect.signature(run).parameters) == ["config", "inputs", "out"]


@pytest.mark.parametrize(
    ("library", "homes"), [("deepspeed", ["fusion.cluster", "fusion.spread"]), ("wandb", ["fusion.tracking"])]
)
def test_heavy_libraries_have_a_home_and_come_late(library: str, homes: list[str]) -> None:
    users = {m for m, p in MODULES.items() for n in imports(tree_of(p)) if n.partition(".")[0] == library}
    assert users == set(homes)
    for home in homes:
        at_top = [node for node in tree_of(MODULES[home]).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert library not in [name.partition(".")[0] for node in at_top for name in imports(node)]


@pytest.mark.parametrize(
    "module",
    [
        *(f"fusion.{n}" for n in ["records", "config", "artifact", "cluster", "hub", "pipeline", "tracking"]),
        *(f"fusion.{n}" for n in ["costs", "sizes", "survey"]),
        "launch.fuse",
    ],
)
def test_the_plan_needs_no_torch(module: str) -> None:
    at_top = [node for node in tree_of(MODULES[module]).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.partition(".")[0] for node in at_top for name in imports(node)}
    assert not names & {"torch", "transformers", "datasets", "deepspeed", "wandb", "accelerate"}


def test_nothing_imports_in_a_circle() -> None:
    graph = {module: set(ours(tree_of(path))) - {"fusion", module} for module, path in MODULES.items()}
    while graph:
        free = {module for module, known in graph.items() if not known & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {module: known for module, known in graph.items() if module not in free}


def test_mathematics_is_pure() -> None:
    """Files of mathematics read and write nothing and know no rank and no config."""
    pure = [
        "align.spans",
        "align.project",
        "align.vocabulary",
        "align.spelling",
        "align.trie",
        "align.follow",
        "align.kernel",
        "align.fidelity",
        "align.edit",
        "align.warp",
        "align.paper",
        "capture.sample",
        "distill.loss",
        "distill.divergence",
        "distill.gate",
        "distill.cost",
        "distill.order",
        "tokens.place",
        "tokens.batch",
        "tokens.windows",
    ]
    for module in [f"fusion.{name}" for name in pure] + [m for m in MODULES if m.startswith("fusion.merge.methods.")]:
        known = set(imports(tree_of(MODULES[module])))
        assert not known & {"fusion.cluster", "fusion.config", "fusion.tracking", "fusion.artifact", "pathlib", "os"}
        called = {
            n.func.id
            for n in ast.walk(tree_of(MODULES[module]))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert "open" not in called
