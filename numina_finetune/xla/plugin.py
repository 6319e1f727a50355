"""A device library's own functions, below torch_xla: programs made, written out and read back.

Device libraries (libtpu) hand out one table of functions, the PJRT C API, by which every framework drives them.
torch_xla 2.9 does not call the function that reads a compiled program back (pytorch/xla issue 9094); here it is called
directly. Only the places of the functions in the table and the first fields of their arguments are relied on: within
the API's major version 0 new ones are only ever added at the end.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

Function = Callable[[int], int | None]
"""Takes the address of its arguments, and gives the address of an error, or None."""

_C_FUNCTION = ctypes.CFUNCTYPE(c_void_p, c_void_p)
_MAJOR_VERSION = 0
_PLACES = {
    "PJRT_Error_Destroy": 0,
    "PJRT_Error_Message": 1,
    "PJRT_Client_PlatformName": 12,
    "PJRT_Client_PlatformVersion": 14,
    "PJRT_Client_Devices": 15,
    "PJRT_Client_Compile": 20,
    "PJRT_DeviceDescription_Kind": 26,
    "PJRT_DeviceDescription_DebugString": 27,
    "PJRT_Device_GetDescription": 29,
    "PJRT_Executable_Destroy": 40,
    "PJRT_Executable_Serialize": 49,
    "PJRT_LoadedExecutable_Destroy": 50,
    "PJRT_LoadedExecutable_GetExecutable": 51,
    "PJRT_Executable_DeserializeAndLoad": 56,
}
_FIELDS = 16
"""Room for fields that newer libraries may look at: they stay null."""

_IN_TABLES: list[object] = []
"""Functions that are in a library's table, which does not keep them alive: the process does."""


class PluginError(Exception):
    """The library has no such table, or one of its functions failed."""


class _Table(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("extension", c_void_p),
        ("version_size", c_size_t),
        ("version_extension", c_void_p),
        ("major", c_int),
        ("minor", c_int),
        ("functions", c_void_p * (max(_PLACES.values()) + 1)),
    )


class _Program(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("extension", c_void_p),
        ("code", c_void_p),
        ("code_size", c_size_t),
        ("format", c_void_p),
        ("format_size", c_size_t),
    )


class _CompileArguments(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("extension", c_void_p),
        ("client", c_void_p),
        ("program", ctypes.POINTER(_Program)),
        ("options", c_void_p),
        ("options_size", c_size_t),
        ("executable", c_void_p),
    )


class Compilation:
    """One call of the compiler, whose result may be given from elsewhere; good until the call ends."""

    def __init__(self, address: int) -> None:
        self.address, self._arguments = address, _CompileArguments.from_address(address)

    @property
    def client(self) -> int:
        return int(self._arguments.client)

    @property
    def parts(self) -> tuple[bytes, bytes, bytes]:
        """The program, its format and the compiler's options: all that the result depends on but the library."""
        program, options = self._arguments.program.contents, self._arguments
        return (
            ctypes.string_at(program.code, program.code_size),
            ctypes.string_at(program.format, program.format_size),
            ctypes.string_at(options.options, options.options_size),
        )

    @property
    def executable(self) -> int:
        """The compiled program, on the devices."""
        return int(self._arguments.executable)

    @executable.setter
    def executable(self, executable: int) -> None:
        self._arguments.executable = executable


class Plugin:
    """A device library that this process has loaded, or will load."""

    def __init__(self, library: Path) -> None:
        """
        Raises:
            PluginError: it cannot be used.
        """
        try:
            self._library = ctypes.CDLL(str(library))
            find = self._library.GetPjrtApi
        except (OSError, AttributeError) as error:
            raise PluginError(f"{library} is no device library: {error}") from error
        find.restype = ctypes.POINTER(_Table)
        self._table = find().contents
        if self._table.major != _MAJOR_VERSION or self._table.size < ctypes.sizeof(_Table):
            raise PluginError(f"{library} has the API {self._table.major}.{self._table.minor}: not known here")
        self.size = library.stat().st_size
        """Bytes of the library: two builds hardly ever share it."""
        self._compile = self._function("PJRT_Client_Compile")

    def replace_compile(self, replacement: Callable[[Compilation], int | None]) -> None:
        """Have ``replacement`` called wherever a program is to be compiled; it must not raise."""
        function = _C_FUNCTION(lambda address: replacement(Compilation(address)))
        _IN_TABLES.append(function)
        self._table.functions[_PLACES["PJRT_Client_Compile"]] = ctypes.cast(function, c_void_p).value

    def compile(self, call: Compilation) -> int | None:
        """Let the library compile: its error, for the caller of the compiler, or None."""
        return self._compile(call.address)

    def serialized(self, executable: int) -> bytes:
        """A compiled program as bytes, which this very library reads back on devices of the same kind.

        Raises:
            PluginError: it cannot.
        """
        inner = self._call("PJRT_LoadedExecutable_GetExecutable", executable)[3]
        try:
            told = self._call("PJRT_Executable_Serialize", inner)
            data = ctypes.string_at(told[3], told[4])
            ctypes.CFUNCTYPE(None, c_void_p)(told[6])(told[5])
        finally:
            self._call("PJRT_Executable_Destroy", inner)
        return data

    def loaded(self, client: int, data: bytes) -> int:
        """The compiled program, on the client's devices.

        Raises:
            PluginError: the library does not take these bytes.
        """
        address = ctypes.cast(c_char_p(data), c_void_p).value or 0  # whoever calls keeps the bytes alive
        return self._call("PJRT_Executable_DeserializeAndLoad", client, address, len(data))[5]

    def unload(self, executable: int) -> None:
        self._call("PJRT_LoadedExecutable_Destroy", executable)

    def description(self, client: int) -> list[str]:
        """The library's version, and each device of all hosts: what a compiled program is bound to."""
        api = f"{self._table.major}.{self._table.minor}"
        named = [self._text("PJRT_Client_PlatformName", client), self._text("PJRT_Client_PlatformVersion", client)]
        return [api, str(self.size), *named, *sorted(self._devices(client))]

    def _devices(self, client: int) -> Iterator[str]:
        told = self._call("PJRT_Client_Devices", client)
        for device in (c_void_p * told[4]).from_address(told[3]):
            about = self._call("PJRT_Device_GetDescription", device)[3]
            kind = self._text("PJRT_DeviceDescription_Kind", about)
            yield f"{kind}: {self._text('PJRT_DeviceDescription_DebugString', about)}"

    def _text(self, name: str, subject: int) -> str:
        told = self._call(name, subject)
        return ctypes.string_at(told[3], told[4]).decode(errors="replace")

    def _call(self, name: str, *given: int | None) -> list[int]:
        """The fields of the arguments after the call, with what the function put there.

        Raises:
            PluginError: it failed.
        """
        arguments = (c_size_t * _FIELDS)(ctypes.sizeof(c_size_t) * _FIELDS, 0, *(value or 0 for value in given))
        error = self._function(name)(ctypes.addressof(arguments))
        if error:
            raise PluginError(self._told(error))
        return list(arguments)

    def _told(self, error: int) -> str:
        told = (c_size_t * _FIELDS)(ctypes.sizeof(c_size_t) * _FIELDS, 0, error)
        self._function("PJRT_Error_Message")(ctypes.addressof(told))
        text = ctypes.string_at(told[3], told[4]).decode(errors="replace")
        self._function("PJRT_Error_Destroy")(ctypes.addressof(told))
        return text

    def _function(self, name: str) -> Function:
        address = self._table.functions[_PLACES[name]]
        if not address:
            raise PluginError(f"the library has no {name}")
        return _C_FUNCTION(address)
