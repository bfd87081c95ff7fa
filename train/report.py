"""Runs as one HTML page that needs no network: `python -m train.report runs=runs/a`."""

import sys
from dataclasses import dataclass
from pathlib import Path

from data.checks import count
from data.cli import command, location
from data.storage.atomic import atomic_file


@dataclass
class Report:
    """Writes one HTML page of one or several runs: their curves, sample grids and configurations.

    runs: the folders of the runs, as in runs=runs/a,runs/b.
    out: the page to write; default: report.html in the folder of the run. Required for several runs.
    """

    runs: list[str] = location()
    out: str = location("")


def write_report(args: Report) -> None:
    """Write the page; what could not be read is printed on stderr and stands in the page.

    Raises: ValueError if a folder is not a run's, or several have no out; OSError if the page cannot be written.
    """
    if not args.out and len(args.runs) > 1:
        raise ValueError(f"name the page of these {len(args.runs)} runs, as out=FILE.html")
    out = Path(args.out or Path(args.runs[0], "report.html"))
    # Imported here, since plotly takes a while.
    from train.monitor.report_page import page
    from train.monitor.run_log import read_run

    runs = [read_run(Path(folder)) for folder in args.runs]
    names = [run.name for run in runs]
    for run, folder in zip(runs, args.runs, strict=True):
        if names.count(run.name) > 1:  # of runs with the same name the page gives the folders
            run.name = folder
        for warning in run.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    with atomic_file(out) as aside:
        aside.write_text(page(runs), encoding="utf-8")
    size, lines = out.stat().st_size / 1e6, sum(len(run.lines) for run in runs)
    print(f"{out}: {count(len(runs), 'run')}, {count(lines, 'log line')}, {size:.1f} MB; open it in a browser")


def main(argv: list[str] | None = None) -> None:
    command(write_report, Report, argv)


if __name__ == "__main__":
    main()
