"""``--mesh``: which shapes a number of devices can take, and what is said about those that it cannot."""

from __future__ import annotations

import pytest

from numina_finetune.errors import ConfigError
from numina_finetune.mesh import MeshShape, parse_mesh


def test_without_a_mesh_all_devices_shard_the_weights() -> None:
    assert parse_mesh(None, 8) == MeshShape(fsdp=8)
    assert parse_mesh("", 8) == MeshShape(fsdp=8)
    assert parse_mesh(None, 8, default_axis="data") == MeshShape(data=8)


@pytest.mark.parametrize(
    ("text", "devices", "expected"),
    [
        ("fsdp=4,tensor=2", 8, MeshShape(fsdp=4, tensor=2)),
        ("tensor=2,fsdp=4", 8, MeshShape(fsdp=4, tensor=2)),
        (" fsdp = 4 , tensor = 2 ", 8, MeshShape(fsdp=4, tensor=2)),
        ("dcn=2,data=2,fsdp=2,expert=2,tensor=2", 32, MeshShape(2, 2, 2, 2, 2)),
        ("fsdp=-1,tensor=2", 8, MeshShape(fsdp=4, tensor=2)),
        ("tensor=8,fsdp=-1", 8, MeshShape(fsdp=1, tensor=8)),
        ("fsdp=1", 1, MeshShape()),
    ],
)
def test_axes_in_any_order_with_one_left_open(text: str, devices: int, expected: MeshShape) -> None:
    shape = parse_mesh(text, devices)
    assert shape == expected
    assert shape.devices == devices


def test_rows_are_split_over_all_axes_but_tensor() -> None:
    shape = parse_mesh("dcn=2,data=3,fsdp=4,expert=5,tensor=6", 720)
    assert shape.data_parallel_size == 120
    assert shape.shards == 20


def test_a_shape_reads_back_as_it_was_written() -> None:
    shape = MeshShape(fsdp=4, tensor=2)
    assert str(shape) == "fsdp=4,tensor=2"
    assert parse_mesh(str(shape), 8) == shape
    assert str(MeshShape()) == "one device"
    assert shape.by_axis == {"dcn": 1, "data": 1, "fsdp": 4, "expert": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fsdp=3", ["multiplies to 3", "8 devices", "fsdp=8"]),
        ("fsdp=16", ["multiplies to 16", "8 devices"]),
        ("fsdp=-1,tensor=3", ["multiplies to 3", "8 devices"]),
        ("fsdp=-1,tensor=-1", ["fsdp and tensor", "only one axis"]),
        ("fsdp=4,fsdp=2", ["fsdp is given twice"]),
        ("fspd=8", ["'fspd' is unknown", "dcn, data, fsdp, expert, tensor"]),
        ("fsdp=0", ["fsdp=0 is not a size"]),
        ("fsdp=-2", ["fsdp=-2 is not a size"]),
        ("fsdp=two", ["fsdp=two is not a size"]),
        ("fsdp=²", ["fsdp=² is not a size"]),
        ("fsdp", ["fsdp=(nothing) is not a size"]),
        ("8", ["'8' is unknown"]),
        ("fsdp=8,", ["'' is unknown"]),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_the_numbers(text: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_mesh(text, 8)
    assert all(words in str(refusal.value) for words in [repr(text), *said])


def test_every_fault_of_a_mesh_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_mesh("fspd=4,tensor=x,data=0", 8)
    assert len(refusal.value.problems) == 3
