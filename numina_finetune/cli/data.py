"""``data``: prepare and look at data, without a model or a device."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from numina_finetune import launch
from numina_finetune.cli.groups import group
from numina_finetune.cli.options import FIELDS, command_of, parameter, resolve_config
from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError

app = group("Prepare and look at data, without a model or a device.")


def _prepare(config: str | None, **given: Any) -> int:
    """Fill the cache with the tokenised data, and say what came of the rows."""
    from numina_finetune.data_commands import run_prepare

    return int(run_prepare(_data_config(config, given)))


def _check(config: str | None, **given: Any) -> int:
    """Look for benchmarks' questions in the data (--against); exit code 3 if there are any and they stay."""
    from numina_finetune.data_commands import run_check

    return int(run_check(_data_config(config, given)))


def _preview(
    config: str | None, rows: int | None, run_rows: str | None, color: bool | None, ids: bool | None, **given: Any
) -> int:
    """Print the first rows of each dataset as the model will see them; targets are coloured."""
    from numina_finetune.data_commands import run_preview, run_preview_of_run

    colored = color if color is not None else sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    resolved = _data_config(config, given)
    if run_rows is not None:
        return int(run_preview_of_run(resolved, run_rows, color=colored, show_ids=bool(ids)))
    return int(run_preview(resolved, rows or 3, color=colored, show_ids=bool(ids)))


def _report(config: str | None, report_dir: str | None, **given: Any) -> int:
    """Write counts by source and reason, lengths (also as a picture), and the first quarantined rows."""
    from numina_finetune.data_commands import run_report

    return int(run_report(_data_config(config, given), Path(report_dir or "data-report")))


def _data_config(yaml_path: str | None, given: dict[str, Any]) -> RunConfig:
    """What the ``data`` commands were asked for; no device library is loaded for them."""
    launch.prepare_environment("native")
    faults: list[str] = []
    config = resolve_config(yaml_path, given, faults)
    if faults:
        raise ConfigError(faults)
    return config


_PREVIEW_OPTIONS = (
    parameter("rows", int, "Rows of each dataset. [default: 3]", "Output"),
    parameter("run_rows", str, "Instead: rows of a run with these options, in its order, such as 1048-1055.", "Output"),
    parameter("color", bool, "Colour the targets; by default where the output is a terminal.", "Output"),
    parameter("ids", bool, "Print the token ids too.", "Output"),
)
_DATA_FIELDS = [
    f
    for f in FIELDS
    if f.metadata["group"] == "Data"
    or f.name in ("model_name", "model_revision", "tokenizer_name", "trust_remote_code", "seed")
]
for _name, _run, *_more in (
    ("prepare", _prepare),
    ("check", _check),
    ("preview", _preview, *_PREVIEW_OPTIONS),
    ("report", _report, parameter("report_dir", str, "Folder of the report.", "Output")),
):
    app.command(_name)(command_of(_run, _run.__doc__, _DATA_FIELDS, *_more))
