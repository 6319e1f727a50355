"""Checkpoints as a version without a guard left them: sound bytes, values that are not finite."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from numina_finetune.checkpoint.layout import COMMITTED, MANIFEST, Facts, checksum, marker_text, read_marker


def poison(run: Path, name: str) -> None:
    """Make one value of a tensor NaN in the run's newest checkpoint, and commit it as if it had been written so."""
    (folder, *_) = sorted((marker.parent for marker in run.glob(f"checkpoints/*/*/{COMMITTED}")), reverse=True)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    for path in sorted(folder.glob("done/*.json")):
        text = path.read_text("utf-8")
        line, _, _ = text.partition("\n")
        index = json.loads(line)
        places = {piece[0]: (piece[5], piece[6]) for piece in index["pieces"]}
        file, start = places[name]
        data = bytearray((folder / file).read_bytes())
        data[start : start + 4] = np.float32(np.nan).tobytes()
        (folder / file).write_bytes(data)
        blocks = index["files"][file]
        size = blocks["block_bytes"]
        blocks["blocks"] = [checksum(bytes(data[at : at + size])) for at in range(0, len(data), size)]
        blocks["crc32c"] = checksum(bytes(data))
        rewritten = json.dumps(index)
        path.write_text(rewritten if text == line else f"{rewritten}\n{checksum(rewritten.encode())}\n", "utf-8")
        for changed in (folder / file, path):
            facts = manifest["files"][changed.relative_to(folder).as_posix()]
            facts |= {"size": changed.stat().st_size, "crc32c": checksum(changed.read_bytes())}
    written = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(written)
    attempt, before = read_marker((folder / COMMITTED).read_text("utf-8"))
    facts = Facts(len(written), checksum(written), before.generation)
    (folder / COMMITTED).write_text(marker_text(attempt, facts), "utf-8")
