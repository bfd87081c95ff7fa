"""Runs as one HTML page that needs no network: `python -m train.report RUN_DIR [RUN_DIR2 ...] [out=report.html]`."""

import os
import sys
from pathlib import Path

from train.monitor.report_page import page
from train.monitor.run_log import read_run

USAGE = "python -m train.report RUN_DIR [RUN_DIR2 ...] [out=report.html]"


def report(folders: list[Path], out: Path) -> None:
    """Write the page aside, then rename; what could not be read is told on stderr and in the page.

    Raises: ValueError if a folder is not a run's; OSError if the page cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.name) > 1:  # two runs of one name are told apart by where they lie
            run.name = str(folder)
        for warning in run.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    aside = out.with_name(out.name + ".part")
    try:
        aside.write_text(page(runs), encoding="utf-8")
        os.replace(aside, out)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"'{out}' could not be written ({error}): make space, or choose another out=") from None
    size = out.stat().st_size / 1e6
    print(
        f"{out}: {len(runs)} runs, {sum(len(run.lines) for run in runs)} log lines, {size:.1f} MB; open it in a browser"
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    outs = [arg.removeprefix("out=") for arg in argv if arg.startswith("out=")]
    folders = [Path(arg) for arg in argv if not arg.startswith("out=")]
    if not folders or {"-h", "--help", "help"} & set(argv):
        raise SystemExit(f"{__doc__}\n{USAGE}")
    try:
        report(folders, Path(outs[-1] if outs else "report.html"))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
