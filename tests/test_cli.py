"""The command line of all commands: their help pages, and mistakes that end in one line."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data import cli, interrupt
from data.checks import count
from data.cli import keys, location, parse
from data.config import CaptionConfig
from tests.support.trainings import SMALL
from train.compose import compose_config, names
from train.config import Config

ROOT = Path(__file__).resolve().parent.parent
# A script for any Python, run by the Makefile before anything is installed; it has no arguments.
NO_ARGUMENTS = {"launch.check_machine"}
HEAVY = ("torch", "transformers", "diffusers", "deepspeed", "matplotlib", "plotly", "pyarrow", "webdataset")
SHOW_IMPORTED = f"""
import runpy, sys
sys.argv[1:] = ["--help"]
try:
    runpy.run_module({{module!r}}, run_name="__main__", alter_sys=True)
finally:
    print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""


def commands(*folders: str) -> list[str]:
    """The modules that are run by `python -m`, of the folders."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found
               if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")]  # fmt: skip
    return [module for module in modules if module not in NO_ARGUMENTS]


def schemas(module: str) -> list[type]:
    """The dataclasses that a module's command lines are read into."""
    source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    used = re.findall(r"(?:(?<!run_)command\(\w+, |help_with_training\(|help_text\()(\w+)", source)
    return [getattr(importlib.import_module(module), name) for name in dict.fromkeys(used)]


def run_command(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("module", commands("train", "data", "launch"))
def test_every_command_has_a_help_page_that_imports_nothing_heavy(module):
    done = run_command("-c", SHOW_IMPORTED.format(module=module))
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    page, _, heavy = done.stdout.rpartition("heavy: ")
    assert heavy.strip() == "[]"
    assert "usage: " in page and "With -q among the arguments no progress is told" in page
    for schema in schemas(module) or [Config]:
        for name, kind, default, _ in keys(schema):
            assert re.search(rf"^  {re.escape(name)} +{re.escape(kind)}, {re.escape(default)}", page, re.M), name


@pytest.mark.parametrize("module", commands("train", "data", "launch", "tests"))
def test_every_key_has_a_meaning(module):
    for schema in schemas(module):
        assert cli.describe(schema)[0], f"{schema} does not say what the command does"
        assert not [name for name, _, _, meaning in keys(schema) if not meaning]


def test_every_key_of_a_training_has_a_meaning():
    assert not [name for name, _, _, meaning in keys(Config) if not meaning]


def test_commands_are_found():
    assert {"train.main", "train.report", "data.demo", "data.embed", "launch.plan", "launch.slurm.batch"} <= set(
        commands("train", "data", "launch")
    )
    assert len([module for module in commands("data") if schemas(module)]) >= 7


@dataclass
class Part:
    """A part."""

    place: str = location()
    weight: float = 1.0


@dataclass
class Example:
    """An example.

    text, other: two texts.
    number: a number
    in two lines.
    """

    text: str
    other: str = ""
    number: int = 3
    share: float = 0.5
    yes: bool = False
    pair: tuple[float, float] = (0.1, 0.2)
    many: list[int] = field(default_factory=lambda: [1])
    seed: int | None = None
    place: str = location("here")
    places: list[str] = location([])
    parts: dict[str, Part] = field(default_factory=dict)


def test_values_are_read_as_they_stand():
    argv = ["text=a: b, [c] # ${x} \\${y} = 'd'", "number=2_000", "share=1e-4", "yes=true", "pair=1,2", "many=[3, 4]"]
    found = parse(Example, [*argv, "seed=7", "place=~/x=1", "places=~/a,b c", "parts.p.place=~/y", "parts.p.weight=2"])
    home = str(Path.home())
    assert found.text == "a: b, [c] # ${x} \\${y} = 'd'" and found.other == ""
    assert (found.number, found.share, found.yes, found.many, found.seed) == (2000, 1e-4, True, [3, 4], 7)
    assert list(found.pair) == [1.0, 2.0]
    assert found.place == f"{home}/x=1" and found.places == [f"{home}/a", "b c"]
    assert found.parts == {"p": Part(f"{home}/y", 2.0)}
    assert parse(Example, ["text=", "seed=null", "many="]).many == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing text=...; --help says what each key means"),
        (["text"], "'text' is not of the form key=value"),
        (["--text=a"], "unknown key '--text' (did you mean 'text'?); keys: text, other, number"),
        (["numbre=1"], "unknown key 'numbre' (did you mean 'number'?)"),
        (["parts.p.plaec=1"], "unknown key 'parts.p.plaec' (did you mean 'parts.p.place'?)"),
        (["text=a", "parts.p.weight=1"], "missing parts.p.place=..."),
        (["parts.p=1"], "'parts.p' is a group of keys"),
        (["number=1.5"], "number=1.5 must be a whole number"),
        (["number=${seed}"], "must be a whole number"),
        (["number=null"], "must be a whole number"),
        (["share=much"], "share=much must be a number"),
        (["yes=perhaps"], "yes=perhaps must be true or false"),
        (["pair=1"], "pair=1 must be a list of 2 numbers"),
        (["many=a"], "many=a must be a list of whole numbers"),
        (["place="], "place= is empty: give a path, or leave the key out"),
        (["place= "], "is empty"),
        (["places=[]"], "is empty"),
    ],
)
def test_mistakes_in_arguments_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        cli.command(print, Example, arguments)
    said = capsys.readouterr()
    assert caught.value.code == 2 and not said.out
    assert message in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1


@pytest.mark.parametrize("ask", ["-h", "--help", "help"])
def test_help_says_all_of_a_key(capsys, ask):
    with pytest.raises(SystemExit) as caught:
        cli.command(print, Example, ["number=no", ask])
    said = capsys.readouterr()
    assert caught.value.code == 0 and not said.err
    for line in (
        "An example.", "text=... [key=value ...]", "  text               text, required. two texts.",
        "  number             a whole number, 3 by default. a number in two lines.",
        "  yes                true or false, false by default.", "  places             a list of paths, optional",
        "  parts.NAME.place   a path, required.", "  pair               a list of 2 numbers, 0.1,0.2 by default.",
    ):  # fmt: skip
        assert line in said.out, said.out


def test_errors_of_the_system_name_the_absolute_path(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.command(lambda _: Path("absent").read_bytes(), Part, ["place=x"])
    assert capsys.readouterr().err == f"error: '{tmp_path}/absent': No such file or directory\n"


def test_ctrl_c_is_one_line(capfd, monkeypatch):
    monkeypatch.setitem(interrupt._state, "told", False)

    def interrupted(_: Part) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        cli.command(interrupted, Part, ["place=x"])
    assert caught.value.code == 130 and capfd.readouterr().err == "stopped by Ctrl-C\n"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("data.pack", ["source=tests", "out=/proc/foo"], "no .jpg"),
        ("data.demo", ["out=/proc/foo"], "'/proc/foo': No such file or directory"),
        ("data.embed", ["shards=x", "out=y", "mode=cheque"], "mode=cheque must be one of embed, meta, check, repair"),
        ("data.index", ["shards=absent"], f"no folder '{ROOT}/absent'"),
        ("data.inspect", ["shards=absent", "out=x.html"], f"no folder '{ROOT}/absent'"),
        ("data.embed", ["shards=absent", "out=x"], f"no folder '{ROOT}/absent'"),
        ("data.tiny_t5", ["out="], "out= is empty"),
        ("train.report", ["runs=absent"], f"'{ROOT}/absent' is not the folder of a run"),
    ],
)
def test_mistakes_of_real_commands(module, arguments, message):
    done = run_command("-m", module, *arguments)
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_pictures_packed_where_nothing_can_be_written(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    done = run_command("-m", "data.pack", f"source={tmp_path}", "out=/proc/foo")
    assert (done.returncode, done.stderr) == (2, "error: '/proc/foo': No such file or directory\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"name an experiment, as +experiment=NAME: {', '.join(names('experiment'))}"),
        (["+experiment=smok"], "experiment=smok must be one of"),
        (["+experiment=smok"], "(did you mean 'smoke'?)"),
        ([*SMALL, "model=smal"], "(did you mean 'small'?)"),
        ([*SMALL, "micro_bath=2"], "unknown key 'micro_bath' (did you mean 'micro_batch'?); --help lists the keys"),
        ([*SMALL, "+micro_bath=2"], "unknown key 'micro_bath' (did you mean 'micro_batch'?)"),
        ([*SMALL, "++optim.lr_peek=2"], "unknown key 'optim.lr_peek' (did you mean 'optim.lr_peak'?)"),
        ([*SMALL, "lr_peak=2"], "(did you mean 'optim.lr_peak'?)"),
        ([*SMALL, "data.mixture.a.shard=2"], "(did you mean 'data.mixture.a.shards'?)"),
        ([*SMALL, "data.mixture.a.shards=x"], "missing data.mixture.a.text=..."),
        ([*SMALL, "hydra.run.dir=x"], "unknown key 'hydra.run.dir'"),
        ([*SMALL, "steps=many"], "steps=many must be a whole number"),
        ([*SMALL, "steps"], "'steps' is not of the form key=value"),
        ([*SMALL, "optim.betas=0.9"], "optim.betas=0.9 must be a list of 2 numbers"),
        ([*SMALL, "optim={}"], "'optim' is a group of keys: set each by itself, such as optim.name=..."),
        ([*SMALL, "--multirun"], "there is no flag --multirun: start one training for each set of values"),
        ([*SMALL, "-m"], "there is no flag -m: start one training for each set of values"),
        ([*SMALL, "--config-name=x"], "there is no flag --config-name: choose a configuration by +experiment=NAME"),
        ([*SMALL, "--cfg", "job"], "there is no flag --cfg: dry_run=true checks the configuration"),
        ([*SMALL, "--fast"], "there is no flag --fast: arguments are key=value; --help lists the keys"),
        ([*SMALL, "precision=fp8"], "precision=fp8 must be one of bf16, fp32"),
    ],
)
def test_mistakes_in_overrides_are_one_line(arguments, message):
    with pytest.raises(ValueError) as caught:
        compose_config(arguments)
    said = str(caught.value)
    assert message in said and "\n" not in said and "use +" not in said


def test_texts_in_overrides_are_taken_as_they_stand():
    data = ["data.mixture.a.shards=x=1, y", "+data.mixture.a.text='t={2}'", "data.mixture.a.weight=2"]
    config = compose_config([*SMALL, "run_dir=runs/a=b, [c] ${d}", 'data.shards="quoted = 1"', *data])
    assert config.run_dir == "runs/a=b, [c] ${d}" and config.data.shards == "quoted = 1"
    mixed = config.data.mixture["a"]
    assert (mixed.shards, mixed.text, mixed.weight) == ("x=1, y", "t={2}", 2.0)


def test_a_list_of_groups_of_keys():
    for quote in ("", "'"):
        given = f"data.captions={quote}[{{field: txt, weight: 0.5}}, {{field: re-caption_2}}]{quote}"
        captions = compose_config(["+experiment=smoke", given]).data.captions
        assert captions == [CaptionConfig("txt", 0.5), CaptionConfig("re-caption_2", 1.0)]
    assert compose_config(["+experiment=smoke"]).data.captions == [CaptionConfig("txt", 1.0)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("txt", "must be a list as [{field: ..., weight: ...}]"),
        ("{field: txt}", "must be a list as [{field: ..., weight: ...}]"),
        ("[txt]", "must be a list as [{field: ..., weight: ...}]"),
        ("[{field: txt, wieght: 1}]", "must be a list as [{field: ..., weight: ...}]"),
        ("[{field: txt, weight: half}]", "must be a list as [{field: ..., weight: ...}]"),
        ("[[[[", "must be a list as [{field: ..., weight: ...}]"),
        ("[" * 5000, "must be a list as [{field: ..., weight: ...}]"),
        ("[]", "data.captions: the fields [] must be one or more different ones"),
        ("[{field: a}, {field: A}]", "data.captions: the fields [a, A] must be one or more different ones"),
        ("[{field: a/b}]", "data.captions: 'a/b' cannot name a caption: write txt, or NAME"),
        ("[{weight: 0}]", "data.captions: the weight 0.0 of txt must be above 0"),
        ("[{weight: .nan}]", "data.captions: the weight nan of txt must be above 0"),
    ],
)
def test_mistakes_in_a_list_of_groups(value, message):
    with pytest.raises(ValueError) as error:
        compose_config(["+experiment=smoke", f"data.captions={value}"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_number_or_texts_of_which_some_have_commas():
    for typed, value in (
        ("4", 4), ("[4]", ["4"]), ("a red circle", ["a red circle"]), ("[a, 'b, c']", ["a", "b, c"]),
        ("""["a, b",it's, 'c']""", ["a, b", "it's", "c"]), ("a,,b", ["a", "", "b"]),
    ):  # fmt: skip
        assert compose_config([*SMALL, f"sample.prompts={typed}"]).sample.prompts == value


def test_the_ways_to_write_an_override_mean_the_same():
    one = compose_config(["+experiment=smoke", "steps=2_000", "sample.guidance_scales=[1,2]", "dry_run=true"])
    other = compose_config(["experiment=smoke", "+steps=2000", "++sample.guidance_scales=1,2", "+dry_run=True"])
    assert one == other and one.steps == 2000 and one.sample.guidance_scales == [1, 2] and one.dry_run


def test_the_command_line_wins_over_the_experiment_and_that_over_the_model():
    assert compose_config(["+experiment=smoke"]).model.att_pool_heads == 4
    assert compose_config(["+experiment=smoke", "model=scenes", "steps=40"]).model.channel_mult == [1, 2, 3]
    assert compose_config(["steps=40", "+experiment=smoke"]).steps == 40


def test_locations_of_a_training_are_expanded_and_not_empty():
    config = compose_config([*SMALL, "run_dir=~/run", "data.shards=~/shards", "data.mixture.a.shards=~/a",
                             "data.mixture.a.text=~/t"])  # fmt: skip
    home = str(Path.home())
    assert (config.run_dir, config.data.shards) == (f"{home}/run", f"{home}/shards")
    assert (config.data.mixture["a"].shards, config.data.mixture["a"].text) == (f"{home}/a", f"{home}/t")
    for key in ("run_dir", "init_from", "data.shards", "data.text", "text.encoder"):
        with pytest.raises(ValueError, match=f"{key}= is empty"):
            compose_config([*SMALL, f"{key}="])


def test_a_mistake_in_an_experiments_file_is_one_line(tmp_path, monkeypatch):
    import shutil

    from train import compose

    shutil.copytree(compose.CONF, tmp_path / "conf")
    monkeypatch.setattr(compose, "CONF", tmp_path / "conf")
    head = "# @package _global_\n"
    for text, message in (
        ("optim:\n  lr_peek: 1\n", "unknown key 'optim.lr_peek' (did you mean 'optim.lr_peak'?)"),
        ("steps: many\n", "steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("steps: [1\n", "mine.yaml"),
        ("defaults:\n  - override /model: absent\n", "Could not find 'model/absent'"),
    ):
        (tmp_path / "conf/experiment/mine.yaml").write_text(head + text)
        with pytest.raises(ValueError) as caught:
            compose_config(["+experiment=mine"])
        said = str(caught.value)
        assert said.startswith("conf/experiment/mine.yaml cannot be composed: ") and message in said
        assert "\n" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: name an experiment, as +experiment=NAME: "),
        (("+experiment=smoke", "micro_bath=2"), "error: unknown key 'micro_bath' (did you mean 'micro_batch'?)"),
        (("+experiment=smoke", "--multirun", "seed=1,2"), "error: there is no flag --multirun"),
    ],
)
def test_the_training_ends_in_one_line(arguments, message):
    done = run_command("train/main.py", *arguments, "--local_rank=0")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    silent = run_command("train/main.py", *arguments, RANK="1", WORLD_SIZE="2")
    assert silent.returncode == 2 and not silent.stderr, "the first rank has told it"


def test_tasks_of_srun_without_a_launcher_end_in_one_line():
    tasks = [
        run_command("train/main.py", *SMALL, SLURM_PROCID=str(task), SLURM_STEP_NUM_TASKS="2") for task in range(2)
    ]
    assert [done.returncode for done in tasks] == [2, 2] and not any(done.stdout for done in tasks)
    assert tasks[0].stderr.startswith("error: Slurm has 2 tasks, and no launcher made them ranks")
    assert tasks[0].stderr.count("\n") == 1 and not tasks[1].stderr


def test_help_of_the_training_as_a_script_names_experiments_and_keys():
    done = run_command("train/main.py", "-h")
    assert done.returncode == 0 and not done.stderr
    for part in ("deepspeed train/main.py +experiment=NAME", *names("experiment"), *names("model"), "optim.lr_peak"):
        assert part in done.stdout


def test_a_dry_run_of_a_path_with_an_equals_sign(tmp_path):
    given = [*SMALL, "dry_run=true", "data.shards=absent", f"run_dir={tmp_path}/a=b c", "--local_rank=0"]
    done = run_command("train/main.py", *given)
    assert f"{tmp_path}/a=b c" in done.stdout and "none usable yet" in done.stdout
    assert done.returncode == 2, "what cannot run has not succeeded"
    assert done.stderr.startswith("error: no folder '") and done.stderr.count("\n") == 1, done.stderr


def test_a_count_has_the_noun_in_its_number():
    assert [count(number, "shard") for number in (0, 1, 2, 2000)] == ["0 shards", "1 shard", "2 shards", "2,000 shards"]
