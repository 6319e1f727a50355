"""One of several hosts of a run: ``python -m tests.checkpoint.host URL ACTION``, with torch's variables for its rank.

Prints what it did, a line each. ``saves`` keeps saving a step at a time, as training does; ``resume`` loads the newest
checkpoint and saves once.
"""

from __future__ import annotations

import sys
import time


def main(url: str, action: str) -> None:
    from numina_finetune.checkpoint.reading import committed, drop_unsound
    from numina_finetune.storage import open_store
    from tests.checkpoint.owner import begin

    life = begin(open_store(url))
    if action == "saves":
        for step in range(1, 100):
            life.save(step, wait=False)
            print(f"began to save step {step}", flush=True)
            for _ in range(50):  # steps of training: what each process does, the others wait for
                life.owner.processes.any(False)
                time.sleep(0.02)
    else:
        checkpoint = life.checkpoints.load(drop_unsound(committed(life_store := open_store(url))))
        print(
            f"resumed at step {checkpoint.step}: {life.owner.is_at(checkpoint.step)} {life.progress.step}", flush=True
        )
        life.save(checkpoint.step + 1)
        print(f"committed: {[checkpoint.step for checkpoint in committed(life_store)]}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
