"""The house itself: who may import whom, what is generated, what must not be there."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import __main__ as experiments
from experiments import _cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "aigc_jax"
FAMILIES = {"vae", "gan", "ddpm", "transformer", "language", "contrastive"}
MAY = {  # the table of docs/design.md, section 1
    **dict.fromkeys(("core", "nn", "metrics", "figures", "data", "interrupt"), set()),
    **dict.fromkeys(FAMILIES, {"core", "nn"}),
    "train": {"core", "data"},
    "__init__": {
        *FAMILIES,
        "core",
        "nn",
        "metrics",
        "figures",
        "data",
        "train",
    },  # when they are asked for
}


def imports(path):
    """Names of aigc_jax's modules (first level) that a file imports; relative imports resolved."""
    here = (*path.relative_to(ROOT).parts[:-1],)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            modules = (
                [[*base, alias.name] for alias in node.names] if base == ["aigc_jax"] else [base]
            )
        else:
            continue
        for parts in modules:
            if parts[0] in ("experiments", "tests", "benchmarks"):
                yield parts[0]
            elif parts[0] == "aigc_jax" and len(parts) > 1:
                yield parts[1]


def test_functions_fit_on_a_screen():
    """At most 60 lines, and 40 for a `make`, which only binds."""
    long = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                most = 40 if re.fullmatch("make(_.*)?", node.name) else 60
                if (lines := node.end_lineno - node.lineno + 1) > most:
                    long.append((str(path.relative_to(ROOT)), node.name, lines))
    assert not long


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_layers(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("__main__", "commands"):
        assert not {"experiments", "tests"} & set(imports(path))
        return
    assert room in MAY, f"{room} is no room of the design"
    assert set(imports(path)) - {room} <= MAY[room]


def test_the_layer_test_sees_imports(tmp_path):
    assert set(imports(PACKAGE / "vae" / "nets.py")) - {"vae"} == {"core", "nn"}
    assert set(imports(PACKAGE / "train" / "engine.py")) - {"train"} == {"core", "data"}
    assert {"train", "data", "figures"} <= set(imports(PACKAGE / "commands" / "sample.py"))


def test_import_is_light():
    """Importing the package brings in none of the libraries that only some functions need."""
    code = "import sys, aigc_jax; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "jax",
        "flax",
        "numpy",
        "sklearn",
        "grain",
        "tensorflow_datasets",
        "matplotlib",
        "orbax.checkpoint",
        "tyro",
        "tensorflow",
        "torch",
    ]
    out = subprocess.run(
        [sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_command_line_imports_no_more_than_it_needs():
    code = "import sys, aigc_jax.__main__; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["orbax", "scipy", "sklearn", "grain", "matplotlib", "tokenizers", "PIL", "mido"]
    out = subprocess.run(
        [sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_results_table_is_what_the_results_say():
    assert _cli.TABLE.read_text() == _cli.table(), "run: python -m experiments table"


def test_every_record_can_be_repeated():
    for path in _cli.RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["name"] == path.stem and record["name"] in experiments.names()
        assert record["scale"] != "smoke" and record["commit"] and record["rows"]
        assert "data.folder" not in record["command"] and "run.folder" not in record["command"]


@pytest.mark.parametrize("name", experiments.names())
def test_every_script_says_what_it_needs(name):
    script = importlib.import_module(f"experiments.{name}")
    assert f"python -m experiments.{name}" in script.__doc__
    assert "download" in script.__doc__.lower()
    assert {"smoke", "cpu"} <= set(script.SCALES)
    assert script.CRITERIA and script.INVARIANTS
    assert len({getattr(s.setup, "run", s.setup).folder for s in script.SCALES.values()}) == len(
        script.SCALES
    )


def test_documents_name_only_what_exists():
    """Files and experiment scripts that the README and the design mention are there."""
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    for module in re.findall(r"python -m experiments\.(\w+)", text):
        assert module in experiments.names() or module == "NAME", module


@pytest.mark.slow
def test_the_readmes_code_runs(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "own_code.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for code, said in zip(blocks, ("log p(x) >= -", "def ", "standard deviation 0."), strict=True):
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert out.returncode == 0, out.stderr
        assert out.stdout.startswith(said)


@pytest.mark.slow
def test_the_page_on_text_to_image_runs(tmp_path):
    """All of its code, one block after another, with the shapes that it prints at every arrow."""
    page = (ROOT / "docs" / "text_to_image.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    shapes = {
        "batch['image']": (64, 32, 32, 3),
        "batch['tokens']": (64, 16),
        "a": (64, 16),
        "similarity": (64, 64),
        "context": (64, 17, 32),
        "z": (512, 8, 8, 4),
        "back": (64, 32, 32, 3),
        "drawn": (4, 8, 8, 4),
        "images": (4, 32, 32, 3),
    }
    code += (
        f"\nfor name, shape in {shapes!r}.items():\n    assert eval(name).shape == shape, name\n"
    )
    code += "assert abs(float(z.var()) - 1) < 1e-3 and 0 <= images.min() and images.max() <= 1\n"
    code += "found = (similarity.argmax(1) == np.arange(64)).mean()\nassert found > 3 / 64, found\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("['") and "variance of the latents: 1.0" in out.stdout


@pytest.mark.slow
def test_the_page_on_ones_own_net_runs(tmp_path):
    """Its module, its training twice (the second time nothing is left to do), and the command it names."""
    module, training = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "your_own_net.md").read_text(), re.DOTALL
    )
    (tmp_path / "mynet.py").write_text(module)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "XLA_FLAGS": ""}

    def run(*command):
        out = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert out.returncode == 0, out.stderr
        return out

    first, again = run("-c", training), run("-c", training)
    assert first.stdout.startswith("squared error: ") and again.stdout == first.stdout
    assert float(first.stdout.split()[-1]) < 4  # the mean image's is 5 times that
    assert "complete at step 500 of 500" in again.stderr
    run("-m", "aigc_jax", "sample", "runs/mynet", "--out", "runs/mynet.png", "--import", "mynet")
    assert (tmp_path / "runs" / "mynet.png").exists()
