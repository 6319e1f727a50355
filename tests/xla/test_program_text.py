"""The same program has the same text, in whatever order a process wrote its maps."""

from __future__ import annotations

from numina_finetune.xla.program_text import canonical


def field(number: int, content: bytes) -> bytes:
    tag = number << 3 | 2
    head = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
    return head + bytes([len(content)]) + content


def module(*attributes: str, name: bytes = b"add") -> bytes:
    entries = [field(1, field(1, text.encode()) + field(2, b"value")) for text in attributes]
    instruction = field(1, name) + b"\x98\x02\x07" + field(68, b"".join(entries)) + field(2, b"opcode")
    return field(1, b"module") + field(3, field(1, b"main") + field(2, instruction)) + b"\x28\x05"


def test_attributes_in_another_order_are_the_same_program() -> None:
    one, other = module("grad_x", "grad_y"), module("grad_y", "grad_x")
    assert one != other and canonical(one) == canonical(other)
    assert sorted(canonical(one)) == sorted(one)


def test_what_differs_in_content_stays_different() -> None:
    texts = {canonical(module(*names)) for names in (("a",), ("b",), ("a", "b"), ("a", "b", "c"), ("a", "a"))}
    assert len(texts | {canonical(module("a", "b", name=b"sub"))}) == 6


def test_what_is_no_module_comes_back_as_it_is() -> None:
    for content in (b"", b"\xff" * 40, module("b", "a")[:-20], b"text: a \xa2\x04"):
        assert canonical(content) == content
