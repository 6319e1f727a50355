"""The command line: one module a group of commands; no device library is loaded before a command needs one."""

from numina_finetune.cli.entry import app, main, run_command

__all__ = ["app", "main", "run_command"]
