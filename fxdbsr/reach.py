"""Whether Python code uses a submodule by anything but a call: then a graph cannot take its place.

Looked at is the code of the methods of the modules that hold it. `self.name(x)` is a call; `self.name.b` is fine
where `b` is a plain attribute, which the graph module keeps; every other use of `self.name` as a value may take the
submodule apart. In a list or dict the submodule has no name in the code, so every word that names something inside
it counts, whatever it is used on.
"""

from __future__ import annotations

import dis
import inspect
import weakref
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType

from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_TESTS = ("POP_JUMP", "IS_OP", "TO_BOOL")
_known: weakref.WeakKeyDictionary[type, list[CodeType]] = weakref.WeakKeyDictionary()


def why_not_called(module: nn.Module, name: str, parent: nn.Module, root: nn.Module) -> str | None:
    """Why `module`, the child `name` of `parent` in `root`, is more than called, as a sentence, or None."""
    kind = type(module).__name__
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return f"the arguments of {kind}.forward cannot be told"
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) or p.default is not p.empty for p in parameters):
        return f"{kind}.forward takes optional arguments"
    inside = {id(m) for m in module.modules()}
    around = [m for m in root.modules() if id(m) not in inside]
    code = [c for m in around if any(id(below) in inside for below in m.modules()) for c in codes(type(m))]
    in_list = isinstance(parent, CONTAINERS)
    used = {word for c in code for word in c.co_names} if in_list else uses_of(name, code)
    methods = {word for base in _own_bases(type(module)) for word in vars(base)} - {*vars(nn.Module), "forward"}
    reached = sorted(used & {"", *methods, *module._modules, *module._parameters, *module._buffers})
    if reached:
        return (
            f"the code around {kind} uses {', '.join(f'its {word}' if word else 'it as a value' for word in reached)}"
        )
    outside = {id(t) for m in around for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    if any(id(t) in outside for t in (*module.parameters(), *module.buffers())):
        return f"{kind} shares tensors with modules around it"
    return None


def uses_of(name: str, code: Iterable[CodeType]) -> set[str]:
    """The words `b` for which `code` says `x.name.b`, and "" where it uses `x.name` in another way than calling it."""
    found: set[str] = set()
    for one in code:
        steps = [step for step in dis.get_instructions(one) if step.opname != "CACHE"]
        for step, *following in zip(steps, steps[1:], steps[2:], strict=False):
            if step.opname != "LOAD_ATTR" or step.argval != name or _is_method(step):
                continue
            if following[0].opname in ("LOAD_ATTR", "LOAD_METHOD"):
                found.add(str(following[0].argval))
            elif not any(then.opname.startswith(_TESTS) for then in following):
                found.add("")
    return found


def listed(words: Iterable[str]) -> str:
    """`words` of `uses_of` for a sentence."""
    return ", ".join(f"its {word}" if word else "it as a value" for word in sorted(words))


def _is_method(step: dis.Instruction) -> bool:
    """True for the load of what is called next; Python 3.12 and later mark it in the argument."""
    return "NULL|self" in step.argrepr or step.argrepr.startswith("NULL + ")


def codes(kind: type) -> list[CodeType]:
    """Code of the methods of `kind` that run in a forward, with what is defined inside them."""
    if kind in _known:
        return _known[kind]
    found = _known[kind] = []
    for base in _own_bases(kind):
        for name, method in vars(base).items():
            function = inspect.unwrap(method) if callable(method) else getattr(method, "fget", None)
            if isinstance(function, FunctionType) and name != "__init__":
                found += _nested(function.__code__)
    return found


def _own_bases(kind: type) -> Iterator[type]:
    """Classes of the model's own code that `kind` is made of."""
    return (base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins", "typing")))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
