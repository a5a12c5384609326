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
    """The body of one function, built line by line; `block` is the label of the block being written."""

    def __init__(self) -> None:
        self.lines: list[str] = []
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
        return self.value(f"call i64 @llvm.smin.i64(i64 {a}, i64 {b})")

    def most(self, a: str | int, b: str | int) -> str:
        """The larger of two signed i64."""
        return self.value(f"call i64 @llvm.smax.i64(i64 {a}, i64 {b})")

    def at(self, pointer: str, index: str | int, type: str) -> str:
        """The address of `pointer[index]`, elements of `type`."""
        if str(index) == "0":
            return pointer
        return self.value(f"getelementptr {type}, ptr {pointer}, i64 {index}")

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

    def floats(self, pointer: str, index: int, n: int, count: int, bfloat16: bool) -> str:
        """N float32 lanes from `count` elements at `pointer[index]`, the rest zero."""
        element, size = ("i16", 2) if bfloat16 else ("float", 4)
        raw = self.load(self.at(pointer, index, element), f"<{count} x {element}>", size)
        if bfloat16:
            wide = self.value(f"zext <{count} x i16> {raw} to <{count} x i32>")
            wide = self.value(f"shl <{count} x i32> {wide}, <{', '.join(['i32 16'] * count)}>")
            raw = self.value(f"bitcast <{count} x i32> {wide} to <{count} x float>")
        return (
            raw
            if n == count
            else self.shuffle("float", raw, "zeroinitializer", count, [min(i, count) for i in range(n)])
        )

    def store_floats(self, value: str, n: int, pointer: str, index: int, count: int, bfloat16: bool) -> None:
        """The first `count` of the n float32 lanes of `value` to `pointer[index]`."""
        kind, element, size = ("bfloat", "i16", 2) if bfloat16 else ("float", "float", 4)
        value = value if n == count else self.shuffle("float", value, "poison", n, range(count))
        if bfloat16:
            value = self.value(f"fptrunc <{count} x float> {value} to <{count} x bfloat>")
        self.emit(f"store <{count} x {kind}> {value}, ptr {self.at(pointer, index, element)}, align {size}")

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

    def when(self, condition: str, then: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
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
        return "\n".join([f"{head} {{", "entry:", *self.lines, "  ret void", "}", ""])
