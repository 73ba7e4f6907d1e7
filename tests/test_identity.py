"""Who a run is, and whose code its folder may run: records, own optimizers, the names of the package."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import aigc_jax
from aigc_jax import __main__ as commands
from aigc_jax import core, data, ddpm, gan, train, transformer, vae
from aigc_jax.core import Optim
from aigc_jax.train import folder as folders
from aigc_jax.train import record as records

ROOT = Path(__file__).parent.parent
DIGITS = data.load("digits")
CFG = vae.Config(shape=(8, 8, 1), levels=17, latent_dim=2, hidden=(4,))
CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
OTHER_CHAIN = optax.sgd(1e-2)
CONFIGS = {
    "vae": (vae.make, CFG, DIGITS),
    "gan": (
        gan.make,
        gan.Config(
            shape=(2,),
            latent_dim=2,
            gen=gan.NetConfig(widths=(4,)),
            disc=gan.NetConfig(widths=(4,)),
        ),
        data.load("ring"),
    ),
    "ddpm": (
        ddpm.make,
        ddpm.Config(
            shape=(2,),
            T=5,
            schedule="cosine",
            ema=0.0,
            net=ddpm.NetConfig("mlp", (4,), dropout=0.0),
        ),
        data.load("ring"),
    ),
    "transformer": (
        transformer.make,
        transformer.Config(vocab=12, context=8, layers=1, heads=2, width=8),
        data.text.from_tokens(np.random.default_rng(0).integers(0, 12, 500), length=8),
    ),
}


@dataclasses.dataclass(frozen=True)
class Halving:
    """An optimizer of one's own: plain descent whose rate halves with every update."""

    first: float = 0.5

    def chain(self):
        return optax.identity()

    def rate(self, step):
        return self.first * 0.5**step


class Nameless:
    """The same without fields."""

    chain, rate = Halving().chain, Halving().rate


NAMED = Nameless()


def recorded(folder, make=vae.make, cfg=CFG, source=DIGITS):
    """A run folder of nothing but its record."""
    folder.mkdir(exist_ok=True)
    record = folders.describe(make, cfg, train.Run(folder=str(folder)), source.info, None)
    folders.write_json(folder / "run.json", record)
    return record


def changed(folder, record, **changes):
    folders.write_json(folder / "run.json", {**record, **changes})


def loaded(folder, trust=()):
    """What `load` does before it reads a checkpoint."""
    make, cfg, *rest = folders.rebuild(folder, trust)
    return make, cfg, *rest, train.inference._family(make, cfg, folder)


def one_line(refused):
    text = str(refused.value)
    assert len(text.splitlines()) == 1 and len(text) < 800, text
    return text


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder on the path, beside the run, for modules of one's own."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [n for n in sys.modules if n.split(".")[0] in ("mine", "planted", "package")]:
        del sys.modules[name]


MAKE = "from aigc_jax.vae import Config, make as original\ndef make(cfg: Config):\n    return original(cfg)\n"

# ------------------------------------------------------------------------------------------------------- whose code


def test_a_module_is_imported_only_where_the_user_says_so(tmp_path, elsewhere):
    record = recorded(tmp_path / "r")
    (elsewhere / "mine.py").write_text(MAKE + f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    changed(tmp_path / "r", record, make=["mine", "make"])
    with pytest.raises(train.Refused, match="--import mine") as refused:
        loaded(tmp_path / "r")
    one_line(refused)
    for trust in ("min", "mine.make", ("miner", "aigc_jax")):
        with pytest.raises(train.Refused, match="not of aigc_jax"):
            loaded(tmp_path / "r", trust)
    assert not (tmp_path / "ran").exists()
    make, cfg, *_ = loaded(tmp_path / "r", ("other", "mine"))
    assert make.__module__ == "mine" and cfg == CFG and (tmp_path / "ran").exists()
    assert loaded(tmp_path / "r")[0] is make  # the program has imported it now


@pytest.mark.parametrize("how", ["module", "package", "link", "imported", "below an own package"])
def test_nothing_inside_the_run_folder_is_imported(tmp_path, elsewhere, monkeypatch, how):
    folder, ran = tmp_path / "r", tmp_path / "ran"
    record, code = recorded(folder), MAKE + f"open({str(ran)!r}, 'w').close()\n"
    name = "planted"
    if how == "below an own package":  # its path leads into the run folder
        (elsewhere / "package").mkdir()
        (elsewhere / "package" / "__init__.py").write_text(f"__path__.append({str(folder)!r})\n")
        name = "package.planted"
    if how == "package":
        (folder / "planted").mkdir()
        (folder / "planted" / "__init__.py").write_text(code)
    elif how == "link":
        (folder / "hidden.py").write_text(code)
        (elsewhere / "planted.py").symlink_to(folder / "hidden.py")
    else:
        (folder / "planted.py").write_text(code)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", str(folder), *sys.path])
    before = list(sys.path)
    if how == "imported":
        import planted  # noqa: F401

        ran.unlink()
    changed(folder, record, make=[name, "make"])
    with pytest.raises(train.Refused, match="lies inside it|no module named planted") as refused:
        loaded(folder, trust=("planted", "package"))
    one_line(refused)
    assert not ran.exists() and sys.path == before


def test_imports_of_a_trusted_module_pass_the_run_folder_by(tmp_path, elsewhere, monkeypatch):
    record = recorded(tmp_path / "r")
    (elsewhere / "mine.py").write_text("import planted\n" + MAKE)
    (elsewhere / "planted.py").write_text("RIGHT = True\n")
    (tmp_path / "r" / "planted.py").write_text("RIGHT = False\n")
    monkeypatch.chdir(tmp_path / "r")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    changed(tmp_path / "r", record, make=["mine", "make"])
    loaded(tmp_path / "r", trust="mine")
    assert sys.modules["planted"].RIGHT


@pytest.mark.parametrize(
    "code, words",
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise GeneratorExit('two\\nlines')", "GeneratorExit: two lines"),
        ("def f(): f()\nf()", "RecursionError"),
        ("def (", "SyntaxError"),
        ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
        (
            "class E(Exception):\n  def __str__(self): raise ValueError\nraise E",
            "E: <exception str",
        ),
        ("def make(cfg): pass", "not annotated"),
        ("def make(): pass", "ValueError"),
        ("def make(cfg: 'Gone'): pass", "NameError"),
        (
            "from aigc_jax.vae import Config\nclass make:\n  def __init__(self, cfg: Config): exit()",
            "no such function",
        ),
        ("from aigc_jax.vae import make", "no such function"),
        (
            "from aigc_jax.vae import Config\ndef make(cfg: Config): raise SystemExit(0)",
            "SystemExit: 0",
        ),
        ("from aigc_jax.vae import Config\ndef make(cfg: Config): return print", "and no Family"),
        ("def __getattr__(name): raise SystemExit(0)", "no such function"),
    ],
)
def test_whatever_a_module_raises_is_one_line_that_names_it(tmp_path, elsewhere, code, words):
    record = recorded(tmp_path / "r")
    (elsewhere / "mine.py").write_text(code)
    changed(tmp_path / "r", record, make=["mine", "make"])
    with pytest.raises(train.Refused) as refused:
        loaded(tmp_path / "r", trust="mine")
    text = one_line(refused)
    assert words in text and (
        words in ("SystemExit: 0", "ValueError", "NameError") or "mine" in text
    )


@pytest.mark.parametrize(
    "make",
    [
        ["aigc_jax.data.../../x", "make"],
        ["aigc_jax.vae\0", "make"],
        ["aigc_jax.vae\nx", "make"],
        [".vae", "make"],
        ["aigc_jax..vae", "make"],
        ["", "make"],
        ["__main__", "make"],
        ["__main__.x", "make"],
        ["x" * 10_000, "make"],
        ["aigc_jax.nothing", "make"],
        ["aigc_jax.vae.nothing", "make"],
        ["aigc_jax", "make"],
        ["experiments._cli", "make"],
        ["experiments.nothing", "make_x"],
        ["experiments.__main__", "make"],
        ["aigc_jax.core", "make_step"],
        ["dataclasses", "make_dataclass"],
        ["aigc_jax.vae", "make_nothing"],
        ["aigc_jax.vae", "make.__class__"],
        ["aigc_jax.vae", "make\0"],
        ["aigc_jax.vae", "Config"],
        ["aigc_jax.vae", "makeshift"],
        ["aigc_jax.gan.nets", "make"],
        ["os", "system"],
        ["json", "make"],
    ],
)
def test_what_is_no_family_is_refused(tmp_path, make):
    changed(tmp_path / "r", recorded(tmp_path / "r"), make=make)
    with pytest.raises(train.Refused) as refused:
        loaded(tmp_path / "r")
    one_line(refused)


def test_experiments_come_from_the_checkout_wherever_one_stands(tmp_path, monkeypatch):
    """Not from the current directory, not from the path; a package of that name that is another is not taken for it."""
    from experiments import grokking

    folder = tmp_path / "r"
    record = recorded(folder)
    there = tmp_path / "experiments"
    there.mkdir()
    (there / "__init__.py").write_text("raise SystemExit('the wrong one')")
    kept = {name: sys.modules[name] for name in sys.modules if name.split(".")[0] == "experiments"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *(p for p in sys.path if Path(p).resolve() != ROOT)])
    changed(folder, record, make=["experiments.grokking", "make"])
    try:
        for name in kept:
            del sys.modules[name]
        with pytest.raises(train.Refused, match="no such function|cannot be imported") as refused:
            loaded(folder)
        assert "wrong one" not in one_line(refused)
        assert sys.modules["experiments.grokking"].__file__ == grokking.__file__
        (there / "__init__.py").write_text("")
        for name in [n for n in sys.modules if n.split(".")[0] == "experiments"]:
            del sys.modules[name]
        import experiments

        assert experiments.__file__ == str(there / "__init__.py")
        with pytest.raises(train.Refused, match="another package"):
            loaded(folder)
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "experiments"]:
            del sys.modules[name]
        sys.modules.update(kept)


@pytest.mark.slow
def test_the_command_line_in_a_run_folder_full_of_modules(tmp_path):
    """None of them runs, though Python looks there first; and the user's own, beside it, where the user says so."""
    folder = tmp_path / "r"
    (tmp_path / "mine.py").write_text(MAKE + "import optax\nOPTIM = optax.sgd(0.125)\n")
    train_it = (
        "import sys; sys.path.insert(0, ''); import mine\nfrom aigc_jax import data, train, vae\n"
        "cfg = vae.Config(shape=(8, 8, 1), levels=17, latent_dim=2, hidden=(4,), optim=mine.OPTIM)\n"
        "run = train.Run(folder='r', steps=int(sys.argv[1]), batch_size=8)\n"
        "train.fit(mine.make, cfg, run, data.load('digits'))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}

    def python(*words, cwd=tmp_path):
        return subprocess.run(
            [sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True
        )

    for steps in "12":  # the second resumes, with an optimizer that its record names
        out = python("-c", train_it, steps)
        assert out.returncode == 0, out.stderr
    assert json.loads((folder / "run.json").read_text())["config"]["optim"] == {
        "object": "mine.OPTIM"
    }
    marks = tmp_path / "marks"
    marks.mkdir()
    for name in (
        "mine",
        "json",
        "typing",
        "jax",
        "numpy",
        "tyro",
        "safetensors",
        "optax",
        "__future__",
    ):
        (folder / f"{name}.py").write_text(
            f"open({str(marks)!r} + '/{name}', 'w')\nraise SystemExit(0)\n"
        )
    out = python(
        "-m", "aigc_jax", "export", ".", "../x.safetensors", "--import", "mine", cwd=folder
    )
    assert (
        (out.returncode, out.stdout) == (2, "")
        and len(out.stderr.splitlines()) == 1
        and "mine" in out.stderr
    )
    assert not list(marks.iterdir())
    out = python("-m", "aigc_jax", "export", "r", "x.safetensors", "--import", "mine")
    assert out.returncode == 0, out.stderr
    assert load_file(tmp_path / "x.safetensors")


# -------------------------------------------------------------------------------------------------- edited by hand

WRONG = (None, ["x"], "x", -1, 10**30, 1e400, {"object": "os.system"}, True)


def places(value, at=()):
    """Every place in a record, as a path of keys."""
    yield at
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield from places(inner, (*at, key))


def with_changed(value, at, new):
    if not at:
        return new
    changed = copy.copy(value)
    changed[at[0]] = with_changed(value[at[0]], at[1:], new)
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vae", "gan", "ddpm", "transformer"])
def test_an_edited_record_is_loaded_or_refused_in_one_line(tmp_path, family):
    """Every field in turn is made something else; nothing but Refused comes out, and nothing large is made."""
    make, cfg, source = CONFIGS[family]
    record = recorded(tmp_path / "r", make, cfg, source)
    refused = 0
    for at in places(record):
        for wrong in WRONG if family == "vae" else WRONG[:5:2]:
            (tmp_path / "r" / "run.json").write_text(json.dumps(with_changed(record, at, wrong)))
            try:
                *_, read = folders.rebuild(tmp_path / "r")
                folders.identify(tmp_path / "r", record)
            except train.Refused as e:
                assert len(str(e).splitlines()) == 1 and len(str(e)) < 1000
                refused += 1
    assert refused > (300 if family == "vae" else 100)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"make": ' + "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"make": ["a", "b"], "config": {"x": ' + "9" * 5000 + "}}",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
        '{"make": ["aigc_jax.vae", "make"], "config": {}}',
    ],
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    for opened in (folders.read, train.load):
        with pytest.raises(train.Refused) as refused:
            opened(tmp_path)
        one_line(refused)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("latent_dim", "20", "latent_dim must be int, got '20'"),
        ("latent_dim", 2.0, "latent_dim must be int, got 2.0"),
        ("latent_dim", True, "latent_dim must be int, got True"),
        ("latent_dim", 10**20, "latent_dim has no such large values"),
        ("beta", "1", "beta must be float, got '1'"),
        ("bfloat16", 1, "bfloat16 must be bool, got 1"),
        ("activation", None, "activation must be one of tanh, relu, softplus, got None"),
        ("sigma", [1.0], "sigma must be float or NoneType, got"),
        ("hidden", 4, "hidden must be tuple"),
        ("hidden", [4, "5"], r"hidden\[1\] must be int, got '5'"),
        ("hidden", [[4]], r"hidden\[0\] must be int"),
        ("shape", [8, 8], "shape must be tuple"),
        ("optim", 1e-3, "optim must be Optim, got 0.001"),
        ("optim", {"lr": "x"}, "optim.lr must be float, got 'x'"),
        ("optim", {"rate": 1.0}, "optim has no field 'rate'"),
        ("optim", {"name": "lion"}, "optim.name must be one of"),
        ("optim", {"object": "os.system"}, "optim cannot be 'os.system'"),
        ("optim", {"object": "os.path.join.x"}, "os.path.join"),
        ("optim", {"object": "json"}, "no such module"),
        ("optim", {"object": 3}, "no such module"),
        (
            "optim",
            {"object": "aigc_jax.vae.Config", "fields": {}},
            "optim cannot be a 'aigc_jax.vae.Config'",
        ),
        ("optim", {"object": "subprocess.Popen", "fields": {"args": "ls"}}, "optim cannot be a"),
        ("latent_dim", {"object": "aigc_jax.vae.make"}, "latent_dim cannot be"),
        ("hidden", {"object": "tests.test_identity.CHAIN"}, "hidden cannot be"),
        ("width", 3, "Config has no field 'width'"),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(tmp_path, field, value, words):
    record = recorded(tmp_path / "r")
    changed(tmp_path / "r", record, config={**record["config"], field: value})
    with pytest.raises(train.Refused, match=words) as refused:
        loaded(tmp_path / "r")
    one_line(refused)


def test_kinds_are_checked_without_the_tests_type_checker():
    @dataclasses.dataclass(frozen=True)
    class Config:
        n: int = 1
        rates: tuple[tuple[float, ...], ...] = ()
        anything: object = None
        untold: "np.ndarray | None" = None

    same = Config(2, ((1.0, 2.0), (3,)), (1, (2, "x")))
    assert records.build(Config, json.loads(json.dumps(dataclasses.asdict(same)))) == same
    for wrong in (
        {"n": None},
        {"n": 1.0},
        {"rates": [1.0]},
        {"rates": [[None]]},
        {"m": 1},
        [],
        None,
    ):
        with pytest.raises(TypeError):
            records.build(Config, wrong)


@pytest.mark.parametrize(
    "make, cfg",
    [
        (
            lambda **k: transformer.Config(vocab=12, context=8, heads=2, width=8, **k),
            {"layers": 10**9},
        ),
        (lambda **k: ddpm.Config(shape=(2,), net=ddpm.NetConfig("mlp", (4,)), **k), {"T": 10**9}),
        (lambda **k: ddpm.NetConfig(**k).check((32, 32, 3)), {"blocks": 10**9}),
    ],
)
def test_loops_and_tables_have_a_bound(make, cfg):
    with pytest.raises(ValueError, match="at most 1"):
        make(**cfg)


def test_numbers_of_numpy_are_recorded_and_a_list_is_refused(tmp_path):
    cfg = _unchecked(CFG, latent_dim=np.int64(2), beta=np.float32(0.5))
    recorded(tmp_path / "r", cfg=cfg)
    assert folders.rebuild(tmp_path / "r")[1] == cfg
    for wrong, words in (
        ({"hidden": [4]}, r"config.hidden is \[4\] and would come back from run.json as \(4,\)"),
        ({"latent_dim": 2.0}, "latent_dim must be int"),
        ({"beta": float("nan")}, "config.beta is nan|beta must be at least 0"),
    ):
        with pytest.raises((train.Refused, ValueError), match=words):
            recorded(tmp_path / "s", cfg=_unchecked(CFG, **wrong))


def _unchecked(cfg, **changes):
    cfg = copy.copy(cfg)
    for name, value in changes.items():
        object.__setattr__(cfg, name, value)
    return cfg


# --------------------------------------------------------------------------------------------------- own optimizers


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vae", "gan", "ddpm", "transformer"])
def test_a_chain_of_optax_updates_as_optax_says(family):
    """Three updates by a chain are those of Optim where both say the same: SGD with momentum."""
    make, cfg, source = CONFIGS[family]
    states = []
    for optim in (Optim("sgd", lr=0.125, momentum=0.5), optax.sgd(0.125, momentum=0.5)):
        names = [f.name for f in dataclasses.fields(cfg) if f.name.endswith("optim")]
        own = make(dataclasses.replace(cfg, **dict.fromkeys(names, optim)))
        state, step = jax.jit(own.init)(jax.random.key(0)), jax.jit(own.step)
        first = arrays(state.params)
        for i in range(3):
            state, metrics = step(
                state, source.batch(0, i, 8), jax.random.fold_in(jax.random.key(1), i)
            )
        states.append(state)
        assert any(name.endswith("lr") for name in metrics) == isinstance(optim, Optim)
    for a, b in zip(arrays(states[0].params), arrays(states[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert any((a != c).any() for a, c in zip(arrays(states[1].params), first, strict=True))


def quadratic(optim, steps):
    """Descent on |x - 3|^2 / 2 in one number."""

    def loss(params, state, batch, key):
        return 0.5 * jnp.square(params["x"] - 3.0), (state.extra, {})

    state = core.start({"x": jnp.float32(0.0)}, optim)
    step = core.make_step(loss, optim)
    for _ in range(steps):
        state, metrics = step(state, {}, jax.random.key(0))
    return float(state.params["x"]), metrics


def test_learning_rates_and_schedules_inside_and_outside():
    inside = optax.sgd(lambda count: 0.5 * 0.5**count)
    expected = 3 - 3 * (1 - 0.5) * (1 - 0.25) * (1 - 0.125)
    for optim in (inside, Halving(), NAMED):
        assert quadratic(optim, 3)[0] == pytest.approx(expected, rel=1e-6)
    assert "lr" not in quadratic(inside, 1)[1] and float(quadratic(Halving(), 2)[1]["lr"]) == 0.25
    # A transformation that asks for the loss is given it: Polyak's step goes to the minimum of a line at once.
    assert quadratic(optax.polyak_sgd(max_learning_rate=10.0), 1)[0] == pytest.approx(1.5)
    assert quadratic(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5), 1)[0] == pytest.approx(
        1.5
    )


@pytest.mark.parametrize("wrong", [None, 1e-3, "adam", Optim, optax.sgd, {"lr": 1.0}])
def test_what_is_no_optimizer_is_refused(wrong):
    if isinstance(wrong, dict):
        wrong = tuple(wrong)
    with pytest.raises(ValueError, match="optim must be an Optim, a chain of optax or"):
        quadratic(wrong, 1)


@pytest.mark.parametrize(
    "optim", [CHAIN, Halving(0.25), NAMED], ids=["chain", "dataclass", "object"]
)
def test_own_optimizers_come_back_from_the_record(tmp_path, optim):
    cfg = dataclasses.replace(CFG, optim=optim)
    record = recorded(tmp_path / "r", cfg=cfg)
    name = {CHAIN: "CHAIN", NAMED: "NAMED"}.get(optim, "Halving")
    assert record["config"]["optim"]["object"] == f"tests.test_identity.{name}"
    back = folders.rebuild(tmp_path / "r")[1].optim
    assert back is optim or back == optim != Halving()


@pytest.mark.slow
def test_a_run_with_an_own_chain_resumes_to_the_same_bits(tmp_path):
    cfg = dataclasses.replace(CFG, optim=CHAIN)

    def fit(folder, steps, cfg=cfg):
        return train.fit(
            vae.make,
            cfg,
            train.Run(folder=str(folder), steps=steps, batch_size=8, devices=1),
            DIGITS,
        )

    whole = fit(tmp_path / "a", 4)
    fit(tmp_path / "b", 2)
    resumed = fit(tmp_path / "b", 4)
    for result in (resumed, train.load(tmp_path / "b")):
        for a, b in zip(arrays(whole.state), arrays(result.state), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(
        train.Refused,
        match="tests.test_identity.CHAIN.* tests.test_identity.OTHER_CHAIN|OTHER_CHAIN",
    ):
        fit(tmp_path / "b", 4, dataclasses.replace(CFG, optim=OTHER_CHAIN))
    with pytest.raises(train.Refused, match="model.optim"):
        fit(tmp_path / "b", 4, CFG)
    nameless = dataclasses.replace(CFG, optim=optax.sgd(0.125))
    with pytest.raises(
        train.Refused, match="config.optim is a GradientTransformation.*put it into a module"
    ):
        fit(tmp_path / "c", 4, nameless)
    assert not (tmp_path / "c").exists()
    fit("", 1, nameless)
    text = repr(whole)
    assert (
        text
        == f"Result(aigc_jax.vae.config.Config, step 4, 612 parameters, folder {tmp_path / 'a'})"
    )


# ------------------------------------------------------------------------------------------- export, ~, names, eager


def exported(call_argv, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["aigc_jax", "export", *map(str, call_argv)])
    try:
        commands.main()
        code = 0
    except SystemExit as e:
        code = e.code
    return code, *capfd.readouterr()


def test_export_is_whole_or_one_line(tmp_path, monkeypatch, capfd):
    params = {
        "a": {"b": jnp.arange(3, dtype=jnp.bfloat16)},
        "c.d": jnp.float32(2.0),
        "e": jnp.zeros((0, 2)),
    }
    record = recorded(tmp_path / "r")
    state = core.State(jnp.int32(7), params, ())
    result = train.Result(vae.make(CFG), state, CFG, DIGITS.info, tmp_path / "r")
    monkeypatch.setattr(train, "load", lambda *_, **__: result)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert exported([tmp_path / "r", "~/x.safetensors"], monkeypatch, capfd)[0] == 0
    got = load_file(tmp_path / "x.safetensors")
    assert (
        set(got) == {"a.b", "c.d", "e"} and got["a.b"].dtype == jnp.bfloat16 and got["c.d"] == 2.0
    )
    (tmp_path / "folder.safetensors").mkdir()
    for out in (
        "nowhere/x.safetensors",
        "folder.safetensors",
        "r/run.json",
        "/proc/x.safetensors",
        "x" * 300,
    ):
        name = out if "." in out else f"{out}.safetensors"
        code, said, error = exported([tmp_path / "r", tmp_path / name], monkeypatch, capfd)
        assert (
            (code, said) == (2, "") and error.startswith("error: ") and len(error.splitlines()) == 1
        ), name
    twice = result._replace(
        state=state._replace(params={"a": {"b": jnp.zeros(1)}, "a.b": jnp.ones(1)})
    )
    monkeypatch.setattr(train, "load", lambda *_, **__: twice)
    before = (tmp_path / "x.safetensors").read_bytes()
    code, _, error = exported([tmp_path / "r", tmp_path / "x.safetensors"], monkeypatch, capfd)
    assert (
        code == 2
        and "would be named a.b" in error
        and (tmp_path / "x.safetensors").read_bytes() == before
    )
    assert record == folders.read(tmp_path / "r") and not list(tmp_path.glob(".x*"))


@pytest.mark.slow
def test_export_on_a_full_disk_is_one_line(tmp_path):
    """The limit on a file's size stands for the disk; what the file held before stays."""
    recorded(tmp_path / "r")
    code = f"""
import resource, sys
sys.argv = ["aigc_jax", "export", {str(tmp_path / "r")!r}, {str(tmp_path / "x.safetensors")!r}]
import jax.numpy as jnp
from aigc_jax import __main__ as commands, core, data, train, vae
state = core.State(jnp.int32(7), {{"a": jnp.zeros(100_000)}}, ())
cfg = vae.Config()
train.load = lambda *_, **__: train.Result(vae.make(cfg), state, cfg, data.load("digits").info, None)
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
commands.main()
"""
    (tmp_path / "x.safetensors").write_bytes(b"before")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (
        out.returncode == 2
        and len(out.stderr.splitlines()) == 1
        and "cannot be written" in out.stderr
    ), out.stderr
    assert (tmp_path / "x.safetensors").read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r", "x.safetensors"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = train.Run(folder="~/runs/r", init="~/runs/s")
    assert (run.folder, run.init) == (f"{tmp_path}/runs/r", f"{tmp_path}/runs/s")
    run = _unchecked(train.Run(), folder=tmp_path / "x")
    run.__post_init__()
    assert run.folder == f"{tmp_path}/x" and train.Run().folder == ""
    assert train.Run(folder="~nobody-at-all/x").folder == "~nobody-at-all/x"
    (tmp_path / "runs").mkdir()
    recorded(tmp_path / "runs" / "r")
    (tmp_path / "runs" / "r" / "metrics.jsonl").write_text(
        '{"step": 1, "train": {"loss": 1.0}}\n{"step": 2, "train": 3}'
    )
    assert train.metrics("~/runs/r") == [{"step": 1, "train": {"loss": 1.0}}]
    with pytest.raises(train.Refused, match=f"{tmp_path}/runs/r holds no intact checkpoint"):
        train.load("~/runs/r")
    with pytest.raises(train.Refused, match=f"{tmp_path}/runs/r was trained on other data"):
        train.replay("~/runs/r", data.load("digits", "test"), step=1)


@pytest.mark.slow
def test_modules_are_there_when_they_are_asked_for():
    code = (
        "import sys, aigc_jax; assert 'aigc_jax.train' not in sys.modules and 'train' in dir(aigc_jax)\n"
        "from aigc_jax import data, train, metrics; assert aigc_jax.train.fit is train.fit\n"
        "assert aigc_jax.vae.Config and aigc_jax.core.Optim and aigc_jax.figures.figure\n"
        "assert set(aigc_jax.__all__) <= set(dir(aigc_jax)); from aigc_jax import *; nn.Norm"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    with pytest.raises(AttributeError, match="module 'aigc_jax' has no attribute 'tarin'"):
        _ = aigc_jax.tarin
    with pytest.raises(ImportError):
        from aigc_jax import tarin  # noqa: F401


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    optim: Optim = Optim("sgd", lr=0.5)


def make_toy(cfg: ToyConfig, *, axis_name=None) -> core.Family:
    """One number, drawn to points that the model draws itself, as a generator draws its noise."""

    def loss(params, state, batch, key):
        drawn = core.shard_rows(jax.random.normal(key, (len(batch["points"]),)))
        return jnp.square(params["w"] - drawn - batch["points"].sum(-1)).mean(), (state.extra, {})

    return core.Family(
        lambda key: core.start({"w": jnp.float32(0.0)}, cfg.optim),
        core.make_step(loss, cfg.optim, axis_name=axis_name),
        lambda state, batch, key: {
            "w": jnp.broadcast_to(state.params["w"], (len(batch["points"]),))
        },
        lambda state, key, *, n: jnp.broadcast_to(state.params["w"], (n, 1)),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"devices": 1}, {"devices": 2}, {"devices": 2, "steps_per_call": 3}],
    ids=str,
)
def test_training_without_jit_gives_what_training_with_it_gives(tmp_path, options):
    source, few = data.load("ring"), data.load("ring", examples=6)

    def everything(name):
        folder = tmp_path / name
        run = train.Run(folder=str(folder), steps=4, batch_size=4, **options)
        result = train.fit(make_toy, ToyConfig(), run, source, valid=few)
        drawn = train.sample(result, jax.random.key(0), n=3, chunk=2)
        return (
            result.state,
            drawn,
            train.evaluate(result, few, batch_size=4),
            train.replay(folder, source, step=3),
        )

    compiled = everything("compiled")
    with jax.disable_jit():
        eager = everything("eager")
    assert jax.tree.structure(compiled) == jax.tree.structure(eager)
    for a, b in zip(arrays(compiled), arrays(eager), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.soak
def test_a_gan_trains_without_jit(tmp_path):
    make, cfg, source = CONFIGS["gan"]
    run = train.Run(steps=2, batch_size=8, devices=1, steps_per_call=2)
    compiled = train.fit(make, cfg, run, source)
    with jax.disable_jit():
        eager = train.fit(make, cfg, run, source)
    assert int(eager.state.step) == 2
    for a, b in zip(arrays(compiled.state.params), arrays(eager.state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_interrupt_is_no_fault_of_a_record():
    with pytest.raises(KeyboardInterrupt), records.one_line("a run"):
        raise KeyboardInterrupt


def test_the_folder_of_the_command_line_is_on_the_path_only_for_trusted_modules(
    tmp_path, monkeypatch
):
    """At the end of it, and never where it lies inside the run folder."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "mine_alone.py").write_text("import sys\nPATH = list(sys.path)\n")
    before = list(sys.path)
    monkeypatch.setattr(records, "BESIDE", [str(tmp_path / "beside")])
    with pytest.raises(train.Refused, match="not of aigc_jax"):
        records._imported("mine_alone", tmp_path / "run", ())
    with pytest.raises(train.Refused, match="no module named"):
        records._imported("mine_alone", tmp_path, ("mine_alone",))
    try:
        module = records._imported("mine_alone", tmp_path / "run", ("mine_alone",))
        assert module.PATH[-1] == str(tmp_path / "beside") and sys.path == before
    finally:
        sys.modules.pop("mine_alone", None)
