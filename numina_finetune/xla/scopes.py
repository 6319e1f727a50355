"""Names of modules in the compiled program: each operation carries the module that asked for it.

Forward operations are named by the innermost module whose ``forward`` is running; backward ones by the module in which
autograd recorded what they undo. The names arrive in the ``op_name`` of the optimised program, as ``module=…;``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_xla
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

MARK = "module="
BACKWARD = "backward "
_KEY, _TOKEN = "numina module", "numina token"


class _Naming(TorchDispatchMode):
    """Keeps the lazy tensors' scope at the module whose work is being traced.

    In forward the scope is set as a module begins and ends: some operations (einsum) become lazy ones above the level
    at which a dispatch mode sees them. In backward it is set around each operation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._running: list[tuple[str, object]] = []
        """Modules whose forward is running, and the graph node within whose backward they run."""
        self._scopes: list[Any] = []
        self._names = {module: name or type(module).__name__ for name, module in model.named_modules()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node: Any = torch._C._current_autograd_node()
        if node is None or (self._running and self._running[-1][1] is _token(node)):
            return func(*args, **(kwargs or {}))
        scope = _scope(BACKWARD + node.metadata.get(_KEY, ""))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            del scope

    def enter(self, module: nn.Module, arguments: Any) -> None:
        if module not in self._names:
            if not self._running:  # what calls the model is no part of it
                return
            self._name_template(module)
        for tensor in arguments:
            if self._running and isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                _tag(tensor.grad_fn, self._running[-1][0])
        if self._scopes:
            self._scopes.pop()
        # A layer may be traced again within a backward pass.
        self._running.append((self._names[module], _token(torch._C._current_autograd_node())))
        self._scopes.append(_scope(self._running[-1][0]))

    def leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if module not in self._names:
            return
        name, _ = self._running.pop()
        self._scopes.pop()
        if self._running:
            self._scopes.append(_scope(self._running[-1][0]))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                _tag(tensor.grad_fn, name)

    def _name_template(self, module: nn.Module) -> None:
        """A layer that stands for all turns of a loop is no part of the model: it is called after who runs it."""
        place = f"{self._running[-1][0] if self._running else ''}.*"
        taken = sum(name.startswith(place) and "." not in name[len(place) :] for name in self._names.values())
        for name, inner in module.named_modules(prefix=f"{place}{taken or ''}"):
            self._names[inner] = name


def _token(node: Any) -> object:
    """What tells graph nodes apart: their Python objects are made anew each time."""
    return None if node is None else node.metadata.setdefault(_TOKEN, object())


def _scope(name: str) -> Any:
    """Names what is traced on this thread while it lives."""
    # What stands behind the semicolon is torch_xla's own count.
    return torch_xla._XLAC.profiler.scope_pusher(f"{MARK}{name};")


@contextmanager
def named_modules(model: nn.Module) -> Iterator[None]:
    """What is traced inside carries the names of ``model``'s modules."""
    naming = _Naming(model)
    hooks = [
        register_module_forward_pre_hook(naming.enter),
        register_module_forward_hook(naming.leave, always_call=True),
    ]
    try:
        with naming:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _tag(node: Any, name: str) -> None:
    """Name all graph nodes from ``node`` back that have no name: those made since the inner modules returned."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is None or _KEY in node.metadata:
            continue
        node.metadata[_KEY] = name
        waiting += [following for following, _ in node.next_functions]
