"""What a machine says of its TPU, without the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from numina_finetune.tpu import CHIPS, pci_chips, this_machines_chip


def bus(folder: Path, *devices: tuple[str, str]) -> Path:
    """A machine's PCI bus, as Linux shows it, with devices of these vendors and kinds."""
    for number, (vendor, kind) in enumerate(devices):
        place = folder / f"0000:00:{number:02x}.0"
        place.mkdir(parents=True)
        (place / "vendor").write_text(f"{vendor}\n")
        (place / "device").write_text(f"{kind}\n")
    return folder


def test_chips_have_the_numbers_that_jax_knows_them_by() -> None:
    hardware = pytest.importorskip("jax._src.hardware_utils")
    theirs = {number: version.name for number, version in hardware._TPU_PCI_DEVICE_IDS.items()}
    assert {chip.pci_id: chip.name for chip in CHIPS.values()}.items() <= theirs.items()


def test_a_chip_is_told_by_its_types_name_or_else_by_the_bus(tmp_path: Path) -> None:
    # A network card of the same vendor, four chips, and another vendor's device of the same number.
    machine = bus(tmp_path, ("0x1ae0", "0x0042"), *[("0x1ae0", "0x0063")] * 4, ("0x8086", "0x0063"))
    assert [chip.name for chip in pci_chips(machine)] == ["v5e"] * 4
    for named, chip in ((None, "v5e"), ("", "v5e"), ("v5p-128", "v5p"), ("v5e-8", "v5e"), ("v5litepod-16", "v5e")):
        found = this_machines_chip(named, machine)
        assert found is not None and found.name == chip


def test_what_is_not_in_the_table_has_no_rate(tmp_path: Path) -> None:
    assert this_machines_chip("tpu7x-16", tmp_path) is None
    assert this_machines_chip(None, bus(tmp_path, ("0x1ae0", "0x0076"))) is None
    assert this_machines_chip(None, tmp_path / "absent") is None
