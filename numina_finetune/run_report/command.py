"""``numina-finetune report``: a run's page, into its place or a file."""

from __future__ import annotations

from pathlib import Path

from numina_finetune.checkpoint_commands import one_run
from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.files import write_text
from numina_finetune.run_report.gather import gather
from numina_finetune.run_report.page import page

PAGE = "report.html"


def run_report(url: str, output: str | None) -> ExitCode:
    """Write the page.

    Args:
        url: of the run, or of a place that holds one only.
        output: a file on this machine; ``report.html`` in the run's place if None.

    Raises:
        ConfigError: there is no run, or ``output`` cannot be written.
    """
    store = one_run(url)
    run = gather(store)
    text = page(run)
    if output is None:
        store.write(PAGE, text.encode())
    else:
        try:
            write_text(Path(output).expanduser(), text)
        except OSError as error:
            raise ConfigError(f"--output {output} cannot be written: {error.strerror}") from error
    for line in run.missing:
        print(line)
    print(f"written: {store.address(PAGE) if output is None else output}")
    return ExitCode.DONE
