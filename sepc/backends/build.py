"""From kernels to one shared library: object files by TVM, an entry point in C, one link.

The entry point runs the kernels of a *segment* (a run of kernels with nothing on the host between them) one after the
other inside a single OpenMP parallel region, with a barrier after each. OpenMP is the thread pool that PyTorch has too.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import tvm

from sepc._remote import Remote
from sepc.backends.each import of_each, reason_of
from sepc.backends.gpu import build as gpu_build
from sepc.backends.gpu.languages import LANGUAGES
from sepc.backends.gpu.lowering import GpuLowering
from sepc.backends.gpu.source import source_of as gpu_source_of
from sepc.backends.lowering import CpuLowering, Lowering
from sepc.backends.program import Assembled, constants_of
from sepc.backends.remote import RemoteExecutable
from sepc.backends.stages.vector import Expr
from sepc.bundle import emulation
from sepc.c_compiler import c_compiler
from sepc.errors import BuildError
from sepc.progress import waiting
from sepc.runtime.executable import AnyExecutable, Executable
from sepc.runtime.program import KernelCall
from sepc.target import Target


def build(
    assembled: Assembled, target: Target, threads: int, runner: Remote | None = None
) -> tuple[AnyExecutable, dict[str, float]]:
    """Compile the kernels of a program, link and load them. Also returns the seconds that each stage took.

    What is for another architecture, or for a device, stays an object file.

    The constants of `assembled` are gone afterwards: they are kept once, in the executable. Raises KernelError for
    kernels that cannot be compiled, BuildError where the rest fails, ArtifactError where the library cannot be loaded.
    """
    if target.gpu is not None and target.kind != "llvm":
        return gpu_build.build(assembled, target.gpu, target.kind)
    started = time.perf_counter()
    program = assembled.program
    if runner is not None or not target.is_of_host_architecture:
        kernels = compile_module(assembled.functions, target, emulation.NAME)
        parts = target, threads, program, constants_of(assembled), kernels
        foreign = emulation.ForeignExecutable(*parts) if runner is None else RemoteExecutable(*parts, runner)
        return foreign, {"kernels": time.perf_counter() - started}
    with _build_directory() as directory:
        objects = compile_objects(assembled.functions, target, directory)
        compiled = time.perf_counter()
        library = link(objects, entry_source(program.segments, assembled.parameters), directory).read_bytes()
    executable = Executable.load(program, library, constants_of(assembled))
    return executable, {"kernels": compiled - started, "link": time.perf_counter() - compiled}


def lowering_for(target: Target) -> Lowering:
    """What makes kernels for `target`."""
    return CpuLowering(target.vector_lanes) if target.gpu is None else GpuLowering(target.gpu)


def compile_objects(kernels: Mapping[str, Expr], target: Target, directory: Path) -> list[Path]:
    """Compile each kernel (by symbol) to an object file in `directory`; several at a time. Returns the files.

    Raises KernelError with all that cannot be compiled.
    """

    def compile_one(symbol: str) -> Path:
        path = directory / f"{symbol}.o"
        path.write_bytes(_object_bytes(compile_function(kernels[symbol], target).mod))
        return path

    return list(of_each(kernels, compile_one, os.cpu_count() or 1).values())


def compile_function(function: Expr, target: Target) -> Expr:
    """TVM's executable for one raw kernel."""
    return tvm.compile(function, target=tvm.target.Target(target.llvm_target()), tir_pipeline="tirx")


def compile_module(kernels: Mapping[str, Expr], target: Target, prefix: str) -> bytes:
    """One object file with all kernels, whose symbols get `prefix` and an underscore in front. Raises BuildError."""
    named = {f"{prefix}_{symbol}": function for symbol, function in kernels.items()}
    if not named:
        return b""
    module = tvm.IRModule({name: one.with_attr("global_symbol", name) for name, one in named.items()})
    try:
        with waiting("kernels"):
            executable = tvm.compile(module, target=tvm.target.Target(target.llvm_target()), tir_pipeline="tirx")
        return _object_bytes(executable.mod)
    except Exception as error:  # As above.
        raise BuildError("The kernels could not be compiled", why=reason_of(error)) from error


@contextmanager
def _build_directory() -> Iterator[Path]:
    """A directory for what is built, which goes afterwards; raises BuildError for what the system refuses there."""
    try:
        with tempfile.TemporaryDirectory(prefix="sepc-") as name:
            yield Path(name)
    except OSError as error:
        raise BuildError(
            "The kernels could not be written",
            where=os.environ.get("TMPDIR", "the system's directory for temporary files"),
            why=error.strerror or str(error),
            fix="free some space there, or set TMPDIR to another directory",
        ) from error


def _object_bytes(module: Expr) -> bytes:
    """A module of TVM as the content of an object file.

    By way of memory: where a disk is full, LLVM would end the process.
    """
    file = os.memfd_create("sepc")
    try:
        module.write_to_file(f"/proc/self/fd/{file}", "o")
        with os.fdopen(os.dup(file), "rb") as content:
            content.seek(0)
            return content.read()
    finally:
        os.close(file)


def source_of(function: Expr, form: str, target: Target) -> str:
    """The code of one kernel as "tirx"; of one for a CPU as "llvm" or "asm", of one for a GPU as "cuda" or "opencl"."""
    if form == "tirx":
        return str(function.script())
    language = next((one for one in LANGUAGES if one == form), None)
    if language is not None:
        return gpu_source_of({str(function.attrs["global_symbol"]): function}, language)
    module = compile_function(function, target).mod
    return str(module.inspect_source({"llvm": "ll", "asm": "asm"}[form]))


def entry_source(segments: Sequence[Sequence[KernelCall]], parameters: Mapping[str, int]) -> str:
    """The C source of the entry point ``sepc_run`` over `segments`.

    `parameters` gives the number of pointers of each kernel, by its symbol.
    """
    lines = ["#include <omp.h>", "#include <stddef.h>", "#include <stdint.h>", ""]
    for symbol, count in sorted(parameters.items()):
        lines.append(f"int32_t {symbol}({'void*, ' * count}int32_t, int32_t);")
    for index, segment in enumerate(segments):
        lines += ["", f"static void segment_{index}(char* const* b, int32_t t, int32_t n, double* stamps) {{"]
        for call in segment:
            pointers = "".join(f"b[{p.block}] + {p.offset_bytes}, " for p in call.arguments)
            lines.append(f"  {call.symbol}({pointers}t, n);")
            lines.append("  if (n > 1) {\n    #pragma omp barrier\n  }")
            lines.append(f"  if (stamps && t == 0) stamps[{call.number + 1}] = omp_get_wtime();")
        lines.append("}")
    lines += [
        "",
        "typedef void (*segment_t)(char* const*, int32_t, int32_t, double*);",
        f"static const segment_t segments[] = {{{', '.join(f'segment_{i}' for i in range(len(segments))) or 'NULL'}}};",
        "",
        "/* Runs segment number `segment` on `threads` threads. `blocks` are the base addresses of the memory blocks.",
        "   If `stamps` is given, stamps[i] and stamps[i + 1] are the times in seconds before and after call number i,",
        "   and `first` is the number of the segment's first call. */",
        "void sepc_run(int32_t segment, char* const* blocks, int32_t threads, double* stamps, int32_t first) {",
        "  if (stamps) stamps[first] = omp_get_wtime();",
        "  if (threads <= 1) {",
        "    segments[segment](blocks, 0, 1, stamps);",
        "    return;",
        "  }",
        "  #pragma omp parallel num_threads(threads)",
        "  segments[segment](blocks, omp_get_thread_num(), omp_get_num_threads(), stamps);",
        "}",
        "",
    ]
    return "\n".join(lines)


def link(objects: Sequence[Path], entry: str, directory: Path) -> Path:
    """Compile `entry` and link it with `objects` into a shared library in `directory`.

    Raises BuildError if there is no C compiler or it fails.
    """
    compiler = c_compiler()
    source, library = directory / "entry.c", directory / "model.so"
    source.write_text(entry)
    flags = ["-O1", "-fPIC", "-shared", "-fopenmp"]
    command = [compiler, *flags, "-o", str(library), str(source), *map(str, objects), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise BuildError(
            "The kernels could not be linked",
            where=" ".join(command[:6]) + " …",
            why=reason[-1] if reason else f"exit status {done.returncode}",
            fix="check that the C compiler works and supports OpenMP, or set CC to one that does",
        )
    return library
