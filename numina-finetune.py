"""What Accelerate's launchers find under the name ``numina-finetune``; the link ``numina-finetune`` points here.

``accelerate launch numina-finetune …`` runs a file of that name. ``accelerate launch --tpu numina-finetune …``
imports a module of that name, to start one training for each TPU core; under SPMD one process drives them all, so
this hands the launcher's process over to that one training.
"""

import os
import sys


def _hand_over() -> None:
    """Replace the launcher's process by one training with the arguments after the script's name."""
    position = next((i for i, argument in enumerate(sys.argv) if argument.endswith("numina-finetune")), None)
    if position is None:
        raise ImportError("numina-finetune.py is for `accelerate launch --tpu numina-finetune`: import numina_finetune")
    print("numina-finetune: one SPMD process for all TPU chips of this host, not one for each chip", flush=True)
    from numina_finetune.launchers import handed_over

    command = [sys.executable, "-m", "numina_finetune", *sys.argv[position + 1 :]]
    os.execve(sys.executable, command, handed_over(sys.argv[1:]))


if __name__ == "__main__":
    from numina_finetune.cli import main

    main()
else:
    _hand_over()
