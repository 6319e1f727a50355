"""State that was written in one layout and is read in another; and the memory that both take."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from numina_finetune.checkpoint.layout import HostIndex, Piece, Stored
from numina_finetune.checkpoint.shards import Shard, ShardReader, _share
from numina_finetune.checkpoint.upload import BLOCK_BYTES, Captured, upload_host
from numina_finetune.stores import LocalStore
from tests.conftest import ROOT, environment

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


def boxes(shape: tuple[int, ...], cuts: list[list[int]]) -> list[Box]:
    """The parts of a tensor that is cut at these places along each axis."""
    edges = [sorted({0, size, *(cut % (size + 1) for cut in axis)}) for size, axis in zip(shape, cuts, strict=True)]
    parts = product(*(list(pairwise(axis)) for axis in edges))
    return [(tuple(a for a, _ in part), tuple(b - a for a, b in part)) for part in parts]


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for axis, (offset, size) in enumerate(zip(*box, strict=True)):
        tensor = tensor.narrow(axis, offset, size)
    return tensor


def shard(name: str, tensor: torch.Tensor, box: Box) -> Shard:
    piece = Piece(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), *box)
    return Shard(piece, part(tensor, box).contiguous().reshape(-1).view(torch.uint8).numpy().copy())


class PartPlanner(DefaultLoadPlanner):
    """Plans as a mesh does on which this process holds some boxes of the tensors."""

    def __init__(self, wanted: dict[str, list[tuple[Box, torch.Tensor]]]) -> None:
        super().__init__()
        self.wanted = wanted

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, held in self.wanted.items():
            chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for (offsets, sizes), _ in held]
            items += create_read_items_for_chunk_list(name, self.metadata.state_dict_metadata[name], chunks)  # type: ignore[union-attr]
        return LoadPlan(items)

    def lookup_tensor(self, index: Any) -> torch.Tensor:
        return next(tensor for (offsets, _), tensor in self.wanted[index.fqn] if offsets == tuple(index.offset))


class RecordingStore(LocalStore):
    """Remembers the ranges that were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, 1 << 20)
        self.read_bytes = 0

    def read(self, name: str, **bounds: Any) -> bytes:
        data = super().read(name, **bounds)
        self.read_bytes += len(data)
        return data


def written(store: LocalStore, hosts: list[list[Shard]], **sizes: int) -> ShardReader:
    indices = [
        HostIndex.of(json.loads(json.dumps(upload_host(store, "c/", host, Captured(shards, {}), **sizes).to_json())))
        for host, shards in enumerate(hosts)
    ]
    files = {name: file for index in indices for name, file in index.files.items()}
    pieces: list[Stored] = [stored for index in indices for stored in index.pieces]
    return ShardReader(store, "c/", files, pieces)


cuts = st.lists(st.integers(0, 40), max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple),
    saved=st.tuples(cuts, cuts, cuts),
    loaded=st.tuples(cuts, cuts, cuts),
    hosts=st.integers(1, 3),
    block=st.integers(1, 70),
    file=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_what_one_layout_wrote_any_other_reads(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    saved: tuple[list[int], ...],
    loaded: tuple[list[int], ...],
    hosts: int,
    block: int,
    file: int,
    dtype: torch.dtype,
) -> None:
    tensor = torch.randint(0, 100, shape).to(dtype)
    other = torch.randn(5, 3)
    store = LocalStore(tmp_path_factory.mktemp("s"), 1 << 20)
    shards = [shard("a", tensor, box) for box in boxes(shape, list(saved[: len(shape)]))]
    shards.append(shard("b", other, ((0, 0), (5, 3))))
    reader = written(store, [shards[host::hosts] for host in range(hosts)], block_bytes=block, file_bytes=file)
    assert torch.equal(reader.read("a"), tensor)
    assert torch.equal(reader.read("b"), other)
    held = [(box, torch.empty(box[1], dtype=dtype)) for box in boxes(shape, list(loaded[: len(shape)]))]
    reader.fill({}, PartPlanner({"a": held}))
    for box, mine in held:
        assert torch.equal(mine, part(tensor, box))


def test_a_host_of_a_larger_mesh_reads_its_rows_only(tmp_path: Path) -> None:
    store = RecordingStore(tmp_path)
    tensor = torch.randn(1024, 256)  # 1 MiB
    halves = [shard("a", tensor, ((row, 0), (512, 256))) for row in (0, 512)]
    reader = written(store, [[half] for half in halves], block_bytes=1 << 12)
    store.read_bytes = 0
    box = ((256, 0), (128, 256))
    mine = torch.empty(box[1])
    reader.fill({}, PartPlanner({"a": [(box, mine)]}))
    assert torch.equal(mine, part(tensor, box))
    assert store.read_bytes == mine.numel() * 4


def test_pieces_that_several_hosts_hold_are_written_once_and_evenly() -> None:
    replicated = {(f"t{number}", (0,)): 100 + number for number in range(50)}
    own = {("only", (0,)): 7}
    held = [replicated, {**replicated, **own}, replicated]
    shares = [_share(held, index) for index in range(3)]
    assert set().union(*shares) == {*replicated, *own}
    assert sum(map(len, shares)) == len(replicated) + 1
    loads = [sum({**replicated, **own}[piece] for piece in share) for share in shares]
    assert max(loads) - min(loads) <= 150


MEMORY = """
import json, sys
from pathlib import Path
import torch
from numina_finetune.checkpoint.reading import committed
from numina_finetune.storage import open_store
from tests.checkpoint.owner import begin

def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

def reset() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()

store = open_store(sys.argv[1])
begin(open_store(sys.argv[1] + "-small")).save(1)  # libraries load in the first save
life = begin(store, shapes={f"w{n}": (4096, 8192) for n in range(4)})
life.step(1)
before = reset()
for step in (1, 2):
    life.checkpoints.save(step, wait=False)
life.checkpoints.finish()
saving = peak() - before
before = reset()
life.checkpoints.load(committed(store))
print(json.dumps({"saving": saving, "loading": peak() - before}))
"""


def test_a_save_takes_little_more_memory_than_the_shards_and_a_resume_no_more_than_one_shard(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "run")],
        env=environment(USE_TORCH_XLA="false"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    shard_bytes = 4096 * 8192 * 4
    found = json.loads(result.stdout.splitlines()[-1])
    print(found)
    assert found["saving"] <= 1.2 * 4 * shard_bytes
    assert found["loading"] <= shard_bytes + 2 * BLOCK_BYTES, "blocks on their way, and the interpreter's own"
