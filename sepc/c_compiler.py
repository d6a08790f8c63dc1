"""The system's C compiler, which links kernels and builds the measuring program of `sepc.calibrate`."""

from __future__ import annotations

import os
import shutil

from sepc.errors import BuildError


def c_compiler() -> str:
    """The system's C compiler: ``$CC``, else cc, gcc or clang. Raises BuildError if there is none."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError(
        "There is no C compiler",
        why="sepc links its kernels with the system's one; neither $CC nor cc, gcc or clang is on the PATH",
        fix="install gcc or clang",
    )
