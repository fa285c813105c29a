"""The layout: which file may import which, and how long all of it may be."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = """support/runtime.py support/ranges.py support/processes.py model.py support/decoding.py support/checkpoint.py
    support/text.py data.py eval.py support/runs.py support/sizes.py looprpt.py sample.py lab/study.py lab/harness.py
    lab/bench.py""".split()


def lines(name: str) -> list[str]:
    return (ROOT / name).read_text().splitlines()


def imported(name: str) -> set[str]:
    """Our own files that a file imports, at its top or inside a function."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {f"{module.replace('.', '/')}.py" for module in modules} & {*ORDER}


def test_every_import_goes_to_a_file_above():
    files = {
        str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("lab/*.py"))
    }
    assert files - {"support/__init__.py", "lab/__init__.py"} == {*ORDER}
    for place, name in enumerate(ORDER):
        assert imported(name) <= {*ORDER[:place]}, name
    assert not any("lab/" in other for name in ORDER if "lab/" not in name for other in imported(name))
    top = {"data.py", "eval.py", "looprpt.py", "sample.py"}
    assert not any(imported(name) & top for name in ORDER if name.startswith("support/"))


def test_the_ceilings_hold():
    assert {path.name for path in ROOT.glob("*.py")} == {"looprpt.py", "model.py", "data.py", "eval.py", "sample.py"}
    assert sum(len(lines(name)) for name in ORDER) <= 4300
    assert sum(len(lines(name)) for name in ("model.py", "data.py", "looprpt.py")) <= 1260
    assert lines("looprpt.py").index("# Training") < 430
