"""The CPU engine's function that does all tasks of a list of steps, alone or on the threads of torch, as LLVM IR.

A step is three 64-bit integers: the address of its function, that of its arguments, the number of its tasks. Each
thread does its own share of a step's tasks, then what others have left of theirs, and waits until all are done. So
a thread that is held up holds up nobody else, and one that is not keeps the same part of every image in its cache.
"""

from __future__ import annotations

from fxdbsr.kernels.llvm import Code, module

LINE = 64  # bytes that no two threads should write to at once


def team(parallel: bool) -> str:
    """The module whose `@run(steps, count, counters, threads)` does `count` steps in order; all 64-bit integers.

    counters: a cache line for each step and thread; in its first 8 bytes, how many tasks of the share were taken.
    """
    code = Code()
    code.loop("step", 0, "%count", 1, lambda i: _step(code, i, parallel))
    head = "define internal void @work(ptr %steps, i64 %count, ptr %counters, i64 %thread, i64 %members) nounwind"
    run = _RUN.replace("SHARE", _TEAM if parallel else _ALONE)
    return module(run, _MEMBER if parallel else "", code.function(head))


def _step(code: Code, i: str, parallel: bool) -> None:
    at = code.at("%steps", code.mul(i, 3), "i64")
    function, arguments = code.load(at, "ptr", 8), code.load(code.at(at, 1, "i64"), "ptr", 8)
    tasks = code.load(code.at(at, 2, "i64"), "i64", 8)

    def share(turn: str) -> None:
        owner = code.op("urem", code.add("%thread", turn), "%members")
        first, end = (code.op("udiv", code.mul(o, tasks), "%members") for o in (owner, code.add(owner, 1)))
        counter = code.at("%counters", code.mul(code.add(code.mul(i, "%members"), owner), LINE), "i8")
        size, name = code.op("sub", end, first), code.fresh("share")
        code.label(f"{name}.next")
        task = code.value(f"atomicrmw add ptr {counter}, i64 1 monotonic")
        code.emit(f"br i1 {code.value(f'icmp ult i64 {task}, {size}')}, label %{name}.do, label %{name}.end")
        code.start(f"{name}.do")
        code.emit(f"call void {function}(ptr {arguments}, i64 {code.add(first, task)})")
        code.emit(f"br label %{name}.next")
        code.start(f"{name}.end")

    code.loop("turn", 0, "%members", 1, share)
    if parallel:
        many = code.value("icmp ugt i64 %members, 1")
        code.when(many, lambda: code.call("void", "fxdbsr_barrier"))


_RUN = f"""
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
define void @run(i64 %s, i64 %count, i64 %c, i64 %threads) nounwind {{
  %steps = inttoptr i64 %s to ptr
  %counters = inttoptr i64 %c to ptr
  %lines = mul i64 %count, %threads
  %size = mul i64 %lines, {LINE}
  call void @llvm.memset.p0.i64(ptr %counters, i8 0, i64 %size, i1 false)
  SHARE
  ret void
}}"""
_ALONE = "call void @work(ptr %steps, i64 %count, ptr %counters, i64 0, i64 1)"
_TEAM = """%block = alloca [3 x i64]
  %at.count = getelementptr i64, ptr %block, i64 1
  %at.counters = getelementptr i64, ptr %block, i64 2
  store i64 %s, ptr %block
  store i64 %count, ptr %at.count
  store i64 %c, ptr %at.counters
  %n = trunc i64 %threads to i32
  call void @fxdbsr_parallel(ptr @member, ptr %block, i32 %n, i32 0)"""
_MEMBER = """
declare void @fxdbsr_parallel(ptr, ptr, i32, i32)
declare i32 @fxdbsr_thread()
declare i32 @fxdbsr_threads()
define internal void @member(ptr %block) nounwind {
  %at.count = getelementptr i64, ptr %block, i64 1
  %at.counters = getelementptr i64, ptr %block, i64 2
  %steps = load ptr, ptr %block
  %count = load i64, ptr %at.count
  %counters = load ptr, ptr %at.counters
  %thread = call i32 @fxdbsr_thread()
  %members = call i32 @fxdbsr_threads()
  %i = zext i32 %thread to i64
  %n = zext i32 %members to i64
  call void @work(ptr %steps, i64 %count, ptr %counters, i64 %i, i64 %n)
  ret void
}
"""
