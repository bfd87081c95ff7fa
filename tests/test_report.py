"""train.report: one page with all of a run, looked at in a real browser."""

import json
import math
import re
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.monitor.report_page import CURVES, POINTS
from train.monitor.run_log import read_run
from train.report import Report, main, write_report

HOSTILE = '</script><img src=x onerror=alert(1)>"&'
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--hide-scrollbars", "--virtual-time-budget=20000",
]  # fmt: skip


def write_run(folder: Path, lines: int = 60, lr: float = 1e-3) -> Path:
    """Lines with every metric that a GPU run logs, two starts, three grids."""
    (folder / "samples").mkdir(parents=True)
    metrics = sorted({name for _, names, _ in CURVES for name in names} - {"lr"})
    with open(folder / "metrics.jsonl", "w") as file:
        for i in range(1, lines + 1):
            values = {metric: 1e3 * lr * (k + 1) / (i + 5) for k, metric in enumerate(metrics)}
            file.write(json.dumps({"step": 10 * i, "lr": lr / i**2, **values}) + "\n")
    config = {"optim": {"lr_peak": lr, "name": "adamw8bit"}, "data": {"text": HOSTILE}, "steps": 600}
    starts = [{"time": "2026-01-01", "step": s, "launch": ["main.py", HOSTILE], "git": "abc", "config": config}
              for s in (0, 300)]  # fmt: skip
    (folder / "starts.jsonl").write_text("".join(json.dumps(s) + "\n" for s in starts))
    for i in range(3):
        Image.fromarray(np.full((40, 40, 3), 80 * i, np.uint8)).save(folder / "samples" / f"step-{i:08d}.png")
    return folder


def figures(page: str) -> list[dict]:
    text = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL).group(1)
    return json.loads(text)


def report(folders: list[Path], out: Path) -> None:
    write_report(Report([str(folder) for folder in folders], str(out)))


def test_one_page_holds_curves_grids_recipe_and_starts(tmp_path):
    report([write_run(tmp_path / "run")], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    told = figures(page)
    assert [figure["layout"]["title"]["text"] for figure in told] == [title for title, _, _ in CURVES]
    for figure, (_, metrics, log) in zip(told, CURVES, strict=True):
        assert [trace["name"] for trace in figure["data"]] == list(metrics)
        assert all(trace["x"] == list(range(10, 610, 10)) for trace in figure["data"])
        assert figure["layout"]["yaxis"]["type"] == ("log" if log else "linear")
        assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [300], "where it was started anew"
    for needed in ("optim.lr_peak", "adamw8bit", "from step 300", "main.py"):
        assert needed in page
    assert HOSTILE not in page and page.count("onerror=alert(1)") == page.count("&lt;img src=x onerror=alert(1)&gt;")
    outside = page.replace(re.search(r"<script>(.{100000,}?)</script>", page, re.DOTALL).group(1), "")
    assert outside.count("data:image/png;base64,") == 3
    assert "http://" not in outside and "https://" not in outside, "nothing of it lies elsewhere"


def test_what_the_rules_of_the_data_left_out_stands_in_the_page(tmp_path):
    run = write_run(tmp_path / "run")
    start = {
        "step": 0,
        "selections": [None, {"digest": "a", "receipt": [f"where a > {HOSTILE} leaves out 3", "7 of 10"]}],
    }
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    report([run], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "<p>run, dataset 2</p><ul><li>where a &gt; " in page and "<li>7 of 10</li>" in page
    assert HOSTILE not in page and "dataset 1" not in page


def test_of_several_runs_what_differs_stands_out(tmp_path):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", lr=2e-3)]
    report(runs, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    lr = next(figure for figure in figures(page) if figure["layout"]["title"]["text"] == "Learning rate")
    assert [(trace["name"], trace["y"][0]) for trace in lr["data"]] == [("one", 1e-3), ("two", 2e-3)]
    assert lr["data"][0]["line"]["color"] != lr["data"][1]["line"]["color"]
    assert "<tr class=differs><th>optim.lr_peak</th><td>0.001</td><td>0.002</td></tr>" in page
    assert "<tr class=differs><th>optim.name" not in page
    report([write_run(tmp_path / "elsewhere" / "one"), runs[0]], tmp_path / "out.html")
    lr = next(
        f for f in figures((tmp_path / "out.html").read_text()) if f["layout"]["title"]["text"] == "Learning rate"
    )
    assert [trace["name"] for trace in lr["data"]] == [str(tmp_path / "elsewhere" / "one"), str(tmp_path / "one")]


def test_a_recipe_is_shown_with_its_changes(tmp_path):
    run = write_run(tmp_path / "run")
    recipes = [(0, 1e-3, 600, 2), (300, 2e-3, 600, 2), (450, 9e-3, 600, 2), (200, 2e-3, 600, 2), (400, 2e-3, 800, 4)]
    starts = [{"time": "2026-01-01", "step": step, "launch": ["main.py"], "ranks": ranks,
               "config": {"optim": {"lr_peak": lr, "name": HOSTILE}, "steps": steps}}
              for step, lr, steps, ranks in recipes]  # fmt: skip
    (run / "starts.jsonl").write_text("".join(json.dumps(s) + "\n" for s in starts))
    report([run], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    # What was trained from step 300 on was made again from step 200 on.
    assert "<p>run changed on the way:</p><ul><li>from step 201 on: optim.lr_peak 1e-3 -&gt; 2e-3</li>" in page
    assert "<li>from step 401 on: ranks 2 -&gt; 4, steps 600 -&gt; 800</li></ul>" in page
    assert "<th>optim.lr_peak</th><td>0.001; from step 201 on: 0.002</td>" in page
    assert "<th>steps</th><td>600; from step 401 on: 800</td>" in page and "9e-3" not in page
    assert HOSTILE not in page
    report([run, write_run(tmp_path / "other", lr=2e-3)], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    differs = "<tr class=differs><th>optim.lr_peak</th><td>0.001; from step 201 on: 0.002</td><td>0.002</td></tr>"
    assert page.count(differs) == 2 and "other changed on the way" not in page


def test_a_file_cut_mid_line_is_read_to_there_and_told(tmp_path, capsys):
    run = write_run(tmp_path / "run", lines=5)
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (run / "starts.jsonl").write_text('{"step": 0, "con')
    report([run], tmp_path / "out.html")
    told = capsys.readouterr().err
    assert "metrics.jsonl: 1 lines cannot be read and are left out" in told and "starts.jsonl: 1 lines" in told
    page = (tmp_path / "out.html").read_text()
    assert figures(page)[0]["data"][0]["x"] == [10, 20, 30, 40] and "1 lines cannot be read" in page
    assert "Not recorded" in page


def test_odd_values_leave_gaps(tmp_path):
    run = write_run(tmp_path / "run", lines=1)
    lines = [{"step": 30, "loss": 2.0}, {"step": 10, "loss": math.nan}, {"step": 20, "loss": "x"}, {"step": "y"},
             {"step": 40, "loss": 1.0}, {"step": 30, "loss": 3.0}]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report([run], tmp_path / "out.html")
    trace = figures((tmp_path / "out.html").read_text())[0]["data"][0]
    assert (trace["x"], trace["y"]) == ([10, 30, 40], [None, 3.0, 1.0]), "of one step twice, the later counts"


def test_a_long_run_is_thinned(tmp_path):
    run = write_run(tmp_path / "run", lines=1)
    with open(run / "metrics.jsonl", "w") as file:
        for i in range(3 * POINTS):
            file.write(json.dumps({"step": i, "loss": float(i)}) + "\n")
    report([run], tmp_path / "out.html")
    trace = figures((tmp_path / "out.html").read_text())[0]["data"][0]
    assert len(trace["x"]) == POINTS and trace["x"][-1] == 3 * POINTS - 1 and trace["y"][0] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing runs=..."),
        (["run"], "'run' is not of the form key=value"),
        (["runs=absent"], "is not the folder of a run (no metrics.jsonl)"),
        (["runs=run,absent", "out=x.html"], "is not the folder of a run (no metrics.jsonl)"),
        (["runs=empty"], "has no line that can be read"),
        (["runs=run", "out=run/metrics.jsonl/x.html"], "could not be written"),
        (["runs=run", "out="], "out= is empty"),
        (["runs=run,run"], "name the page of these 2 runs, as out=FILE.html"),
    ],
)
def test_mistakes_end_in_words_and_leave_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", lines=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("{")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and message in said and said.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


def test_the_page_of_a_run_lies_in_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", lines=2)
    write_run(tmp_path / "b", lines=2)
    for name in "ab":
        main([f"runs={name}"])
        assert capsys.readouterr().out.startswith(f"{name}/report.html: 1 run,")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [], "no page in the folder of the command"


def test_a_full_disk_leaves_the_page_before(tmp_path):
    run = write_run(tmp_path / "run", lines=2)
    (tmp_path / "out.html").write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written .*: make space"):
            report([run], tmp_path / "out.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out.html").read_text() == "before" and not list(tmp_path.glob("*.part"))


def test_a_run_that_has_logged_little_has_a_page_too(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert read_run(folder).grids == []
    report([folder], tmp_path / "out.html")
    assert "None yet" in (tmp_path / "out.html").read_text()


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """What the browser prints, and what scripts wrote to the console."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium on this machine; `make browser` installs it")
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_in_a_browser_the_curves_are_there_and_no_script_fails(tmp_path):
    report([write_run(tmp_path / "one"), write_run(tmp_path / "two", lr=2e-3)], tmp_path / "out.html")
    dom, console = browse(tmp_path / "out.html", tmp_path / "profile", "--dump-dom")
    assert not console, console
    traces = len(re.findall(r'<g class="trace scatter', dom))
    assert traces == 2 * sum(len(metrics) for _, metrics, _ in CURVES)
    drawn = re.findall(r'class="js-line"[^>]* d="M([^"]{20,})', dom)
    assert len(drawn) == traces, "each is a line of more than one point"
    hidden = re.findall(r"<figure( hidden(?:=\"\")?)?><img", dom)
    assert [bool(mark) for mark in hidden] == [True, True, False] * 2, "the latest grid of each run is shown"

    picture = tmp_path / "shot.png"
    _, console = browse(
        tmp_path / "out.html", tmp_path / "profile", f"--screenshot={picture}", "--window-size=1280,4200"
    )
    assert not console, console
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    for colour in ((99, 110, 250), (239, 85, 59)):  # those of plotly's first two traces
        near = (abs(pixels - colour).sum(2) < 40).sum()
        assert near > 3000, f"hardly any pixel is {colour}: {near}"


def test_the_browser_tells_of_a_script_that_fails(tmp_path):
    """Or the test above would see nothing."""
    report([write_run(tmp_path / "run", lines=3)], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    (tmp_path / "broken.html").write_text(page.replace("Plotly.newPlot", "Plotly.newPlott"))
    dom, console = browse(tmp_path / "broken.html", tmp_path / "profile", "--dump-dom")
    assert any("Uncaught TypeError" in line for line in console), console
    assert '<g class="trace scatter' not in dom
