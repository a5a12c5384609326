"""A small writer of LLVM IR text: values are strings, loops have names and carry values.

    code = Code()
    total, = code.loop("k", "0", "%n", 4, lambda k, sum: [code.op("add i64", sum, k)], [("i64", "0")])

Integer helpers fold constants, so that addresses known when the code is written cost no instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_FOLD: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


class Code:
    """The body of one function, built line by line; `block` is the label of the block being written.

    Args:
        bfloat16: the elements of tensors are bfloat16; else float32.

    Attributes:
        element, bytes: the IR type that an element is copied with, and its size.
        declared: declarations of the functions of others that this one calls.
    """

    def __init__(self, bfloat16: bool = False) -> None:
        self.element, self.bytes = ("i16", 2) if bfloat16 else ("float", 4)
        self.lines: list[str] = []
        self.declared: dict[str, None] = {}
        self.block = "entry"
        self._names = 0

    def fresh(self, hint: str = "v") -> str:
        """A name not used before in this function, without `%`."""
        self._names += 1
        return f"{hint}.{self._names}"

    def emit(self, text: str) -> None:
        """Append an instruction that has no result."""
        self.lines.append(f"  {text}")

    def value(self, text: str) -> str:
        """Append an instruction and return the name of its result."""
        name = f"%{self.fresh()}"
        self.lines.append(f"  {name} = {text}")
        return name

    def call(self, result: str, name: str, *arguments: tuple[str, str | int]) -> str:
        """The result of a function of LLVM or of another module, which these (type, value) declare."""
        self.declared[f"declare {result} @{name}({', '.join(kind for kind, _ in arguments)})"] = None
        text = f"call {result} @{name}({', '.join(f'{kind} {value}' for kind, value in arguments)})"
        if result != "void":
            return self.value(text)
        self.emit(text)
        return ""

    def label(self, name: str) -> None:
        """Start the block `name`, falling through from the one before."""
        self.emit(f"br label %{name}")
        self.start(name)

    def start(self, name: str) -> None:
        """Start the block `name`; the one before has ended."""
        self.lines.append(f"{name}:")
        self.block = name

    def op(self, operation: str, a: str | int, b: str | int) -> str:
        """`operation`, such as "add" or "sdiv", of two i64; folded where it is known or changes nothing."""
        a, b = str(a), str(b)
        if operation in _FOLD and a.lstrip("-").isdigit() and b.lstrip("-").isdigit():
            return str(_FOLD[operation](int(a), int(b)))
        if operation == "urem" and b == "1":
            return "0"
        neutral = "1" if operation in ("mul", "sdiv", "udiv") else "0"
        if b == neutral and operation not in ("srem", "urem", "and"):
            return a
        if a == neutral and operation in ("mul", "add"):
            return b
        if operation == "mul" and "0" in (a, b):
            return "0"
        flag = " nsw" if operation in _FOLD else ""
        return self.value(f"{operation}{flag} i64 {a}, {b}")

    def add(self, a: str | int, b: str | int) -> str:
        """A + b."""
        return self.op("add", a, b)

    def mul(self, a: str | int, b: str | int) -> str:
        """A * b."""
        return self.op("mul", a, b)

    def least(self, a: str | int, b: str | int) -> str:
        """The smaller of two signed i64."""
        return self.call("i64", "llvm.smin.i64", ("i64", a), ("i64", b))

    def most(self, a: str | int, b: str | int) -> str:
        """The larger of two signed i64."""
        return self.call("i64", "llvm.smax.i64", ("i64", a), ("i64", b))

    def at(self, pointer: str, index: str | int, type: str | None = None) -> str:
        """The address of `pointer[index]`, of elements of `type` or of tensors."""
        if str(index) == "0":
            return pointer
        return self.value(f"getelementptr {type or self.element}, ptr {pointer}, i64 {index}")

    def load(self, pointer: str, type: str, align: int) -> str:
        """The `type` at `pointer`, which is a multiple of `align` bytes."""
        return self.value(f"load {type}, ptr {pointer}, align {align}")

    def index(self, pointer: str, index: str | int) -> str:
        """`pointer[index]` of an int32 array, as i64."""
        return self.value(f"zext i32 {self.load(self.at(pointer, index, 'i32'), 'i32', 4)} to i64")

    def shuffle(self, type: str, a: str, b: str, lanes: int, order: Sequence[int]) -> str:
        """The lanes `order` of two vectors of so many lanes, those of `b` counted on from those of `a`."""
        lane, vector = ", ".join(f"i32 {i}" for i in order), f"<{lanes} x {type}>"
        return self.value(f"shufflevector {vector} {a}, {vector} {b}, <{len(order)} x i32> <{lane}>")

    def floats(self, pointer: str, index: int, n: int, count: int) -> str:
        """N float32 lanes from `count` elements of a tensor at `pointer[index]`, the rest zero."""
        raw = self.load(self.at(pointer, index), f"<{count} x {self.element}>", self.bytes)
        if self.element == "i16":
            wide = self.value(f"zext <{count} x i16> {raw} to <{count} x i32>")
            wide = self.value(f"shl <{count} x i32> {wide}, {splat('i32 16', count)}")
            raw = self.value(f"bitcast <{count} x i32> {wide} to <{count} x float>")
        if n == count:
            return raw
        return self.shuffle("float", raw, "zeroinitializer", count, [min(i, count) for i in range(n)])

    def store_floats(self, value: str, n: int, pointer: str, index: int, count: int) -> None:
        """The first `count` of the n float32 lanes of `value` to elements of a tensor at `pointer[index]`."""
        kind = "float"
        value = value if n == count else self.shuffle("float", value, "poison", n, range(count))
        if self.element == "i16":
            kind, value = "bfloat", self.value(f"fptrunc <{count} x float> {value} to <{count} x bfloat>")
        self.emit(f"store <{count} x {kind}> {value}, ptr {self.at(pointer, index)}, align {self.bytes}")

    def loop(
        self,
        name: str,
        start: str | int,
        stop: str | int,
        step: int,
        body: Callable[..., Sequence[str] | None],
        carried: Sequence[tuple[str, str]] = (),
    ) -> list[str]:
        """`for i in range(start, stop, step): values = body(i, *values)`; the last values.

        Args:
            name: of the loop, for its labels.
            start: first i, i64.
            stop: end of the range, i64; no iteration where it is not above `start`.
            step: positive.
            body: writes one iteration; returns the new values.
            carried: type and initial value of each value.
        """
        name = self.fresh(name)
        before = self.block
        self.label(f"{name}.head")
        i, following = f"%{name}.i", f"%{name}.next"
        values = [f"%{name}.c{n}" for n in range(len(carried))]
        mark = len(self.lines)  # the phis come here once the body has told what it carries on
        self.emit(f"%{name}.go = icmp slt i64 {i}, {stop}")
        self.emit(f"br i1 %{name}.go, label %{name}.body, label %{name}.end")
        self.start(f"{name}.body")
        carried_on = body(i, *values) or ()
        self.emit(f"{following} = add nsw i64 {i}, {step}")
        last = self.block
        self.emit(f"br label %{name}.head")
        phis = [f"  {i} = phi i64 [{start}, %{before}], [{following}, %{last}]"]
        for value, (type, first), new in zip(values, carried, carried_on, strict=True):
            phis.append(f"  {value} = phi {type} [{first}, %{before}], [{new}, %{last}]")
        self.lines[mark:mark] = phis
        self.start(f"{name}.end")
        return values

    def when(self, condition: str, then: Callable[[], object], otherwise: Callable[[], object] | None = None) -> None:
        """`then` where the i1 `condition` holds, else `otherwise`."""
        name = self.fresh("when")
        other = "else" if otherwise else "end"
        self.emit(f"br i1 {condition}, label %{name}.then, label %{name}.{other}")
        self.start(f"{name}.then")
        then()
        self.emit(f"br label %{name}.end")
        if otherwise:
            self.start(f"{name}.else")
            otherwise()
            self.emit(f"br label %{name}.end")
        self.start(f"{name}.end")

    def function(self, head: str) -> str:
        """The text of the function `head`, such as "define void @f(i64 %n)"; it returns nothing."""
        return "\n".join([*self.declared, f"{head} {{", "entry:", *self.lines, "  ret void", "}", ""])


def module(*functions: str) -> str:
    """The module of the text of functions, each declaration in it once."""
    lines = "\n".join(functions).split("\n")
    declared = dict.fromkeys(line for line in lines if line.startswith("declare "))
    return "\n".join([*declared, *(line for line in lines if line not in declared)])


def splat(value: str, n: int) -> str:
    """The constant vector of n times `value`, such as "float 1.0"."""
    return f"<{', '.join([value] * n)}>"
