"""The activations of the CPU engine's epilogue, in registers; NaN passes through each of them."""

from __future__ import annotations

import struct

from fxdbsr.kernels.llvm import Code, splat


def activated(code: Code, value: str, n: int, activation: str, negative_slope: float) -> str:
    """`value`, n lanes of float32, through the activation."""
    vector = f"<{n} x float>"

    def constant(x: float) -> str:
        return splat(f"float {_literal(x)}", n)

    def clip(value: str, keep: str, bound: float, other: str | None = None) -> str:
        kept = code.value(f"fcmp {keep} {vector} {value}, {constant(bound)}")
        return code.value(f"select <{n} x i1> {kept}, {vector} {value}, {vector} {other or constant(bound)}")

    def bound(value: str, limit: float, beyond: str) -> str:
        """The limit where it lies `beyond` the value, which NaN never does: one instruction on x86."""
        crossed = code.value(f"fcmp {beyond} {vector} {constant(limit)}, {value}")
        return code.value(f"select <{n} x i1> {crossed}, {vector} {constant(limit)}, {vector} {value}")

    def plus_product(a: str, b: str | float, c: str | float) -> str:
        b, c = (constant(t) if isinstance(t, float) else t for t in (b, c))
        return code.call(vector, f"llvm.fma.v{n}f32", (vector, a), (vector, b), (vector, c))

    def one_plus_exp_minus(value: str) -> str:
        """1 + exp(-value), infinite for NaN: 2^n times a polynomial of the rest (Cephes, expf)."""
        negative = code.value(f"fneg {vector} {value}")
        x = clip(clip(negative, "olt", 89.0), "ogt", -87.0)
        scaled = code.value(f"fmul {vector} {x}, {constant(1.44269504088896341)}")
        whole = code.call(vector, f"llvm.rint.v{n}f32", (vector, scaled))
        rest = plus_product(whole, 2.12194440e-4, plus_product(whole, -0.693359375, x))
        sum_ = constant(1.9875691500e-4)
        for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            sum_ = plus_product(sum_, rest, term)
        sum_ = plus_product(plus_product(sum_, rest, 1.0), rest, 1.0)
        power = code.value(f"fptosi {vector} {whole} to <{n} x i32>")
        power = code.value(f"add <{n} x i32> {power}, {splat('i32 127', n)}")
        power = code.value(f"shl <{n} x i32> {power}, {splat('i32 23', n)}")
        return plus_product(sum_, code.value(f"bitcast <{n} x i32> {power} to {vector}"), 1.0)

    match activation:
        case "relu":
            return bound(value, 0.0, "ogt")
        case "relu6":
            return bound(bound(value, 0.0, "ogt"), 6.0, "olt")
        case "leaky_relu":
            below = code.value(f"fmul {vector} {value}, {constant(negative_slope)}")
            return clip(value, "ugt", 0.0, below)
        case "hardswish":
            gate = bound(code.value(f"fadd {vector} {value}, {constant(3.0)}"), 0.0, "ogt")
            product = code.value(f"fmul {vector} {value}, {bound(gate, 6.0, 'olt')}")
            return code.value(f"fdiv {vector} {product}, {constant(6.0)}")
        case "silu":
            return code.value(f"fdiv {vector} {value}, {one_plus_exp_minus(value)}")
        case "sigmoid":
            gate = code.value(f"fdiv {vector} {constant(1.0)}, {one_plus_exp_minus(value)}")
            return clip(value, "uno", 0.0, gate)
    return value


def maximum(code: Code, value: str, other: str, n: int) -> str:
    """The larger of two in each of n lanes of float32, NaN where one is."""
    vector = f"<{n} x float>"
    larger = code.value(f"fcmp ogt {vector} {other}, {value}")
    is_nan = code.value(f"fcmp uno {vector} {other}, {other}")
    take = code.value(f"or <{n} x i1> {larger}, {is_nan}")
    return code.value(f"select <{n} x i1> {take}, {vector} {other}, {vector} {value}")


def _literal(x: float) -> str:
    """The float32 nearest to x, as IR writes it."""
    (single,) = struct.unpack("<f", struct.pack("<f", x))
    return f"0x{struct.unpack('<Q', struct.pack('<d', single))[0]:016X}"
