"""``python -m numina_finetune``."""

from numina_finetune.cli import main

main()
