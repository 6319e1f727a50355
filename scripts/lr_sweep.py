"""``numina-finetune sweep``, for those who look for it among the scripts.

    python scripts/lr_sweep.py --lrs 1e-5,2e-5,3e-5,5e-5 --output-dir sweeps/first \\
        --model-name Qwen/Qwen3-0.6B --dataset-name openai/gsm8k --validation-size 256
    python scripts/lr_sweep.py --lrs 1e-6:1e-4:5 …

Every option that is not the sweep's own goes to ``numina-finetune`` as it is.
"""

from __future__ import annotations

import sys

from numina_finetune.cli import main

if __name__ == "__main__":
    sys.argv[1:] = ["sweep", *sys.argv[1:]]
    main()
