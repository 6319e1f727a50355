"""``numina-finetune spot``, for those who look for the supervisor among the scripts.

    python scripts/spot_supervisor.py --output-dir gs://bucket/runs --project my-project --zones us-east5-b \\
        --tpu v6e-8 --wheel dist/numina_finetune-0.1.0-py3-none-any.whl -- \\
        --model-name Qwen/Qwen3-0.6B --dataset-name openai/gsm8k
    python scripts/spot_supervisor.py status gs://bucket/runs/my-run

Options alone mean ``run``.
"""

from __future__ import annotations

import sys

from numina_finetune.cli import main

if __name__ == "__main__":
    words = sys.argv[1:]
    sys.argv[1:] = ["spot", *([] if words and not words[0].startswith("-") else ["run"]), *words]
    main()
