"""The runners: each way to execute a model, behind one signature, with its number of threads set explicitly.

Heavy packages are imported by the builder that needs them, so a missing one costs a column of the table, no more.

A job may ask for kernels limited to AVX2 on a processor that has more. The libraries have different switches for that,
or none, so that each runner looks what it got, and says so: see `Runner.isa`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

Run: TypeAlias = Callable[[], object]

NATIVE: Final = "native"
AVX2: Final = "avx2"
PARTLY_AVX2: Final = "partly avx2"
UNRESTRICTED: Final = "unrestricted"

# Environment variables that the libraries read when they are loaded, so a process has to start with them.
ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    NATIVE: {},
    AVX2: {
        # oneDNN: the convolutions of PyTorch and of OpenVINO, each of which brings its own copy.
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        # MKL: the matrix products of PyTorch. On AMD's processors it goes no further in any case.
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        # PyTorch's own kernels, and the vectors in the code that Inductor generates.
        "ATEN_CPU_CAPABILITY": "avx2",
        # What the C++ compiler may use in that code; otherwise -march=native.
        "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
    },
}


@dataclass(frozen=True)
class Job:
    """What a runner is built for.

    Attributes:
        model: in eval mode.
        inputs: its arguments.
        threads: how many threads a runner may use.
        isa: instruction sets that kernels may use: NATIVE, whatever the processor has, or AVX2; the process must have
            been started with its ENVIRONMENTS.
    """

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    threads: int
    isa: str = NATIVE


@dataclass(frozen=True)
class Runner:
    """A model, ready to run on its inputs.

    Attributes:
        run: one inference; returns whatever the runtime returns, without conversion, since it is what is timed.
        tensors: converts what `run` returned into the flat list of output tensors; not timed.
        details: facts about the build, such as the time of each compilation stage, for the JSON file.
        isa: what its kernels use: what the job asks for, or, where that is AVX2 and cannot be had or only in part,
            UNRESTRICTED or PARTLY_AVX2.
    """

    run: Run
    tensors: Callable[[object], list[torch.Tensor]]
    details: Mapping[str, object] = field(default_factory=dict)
    isa: str = NATIVE


def _leaves(result: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def eager(job: Job) -> Runner:
    """PyTorch as it is; the reference of every comparison."""
    return Runner(lambda: job.model(*job.inputs), _leaves, isa=_torch_isa(job))


def inductor(job: Job) -> Runner:
    """`torch.compile` with its default mode and frozen parameters, which lets it fold and pack weights."""
    import torch._inductor.config as inductor_config

    torch._dynamo.reset()
    # Set for the life of the process, not just for the first call: the code is compiled anew, in the next call, once
    # another runner has reset Dynamo, as strict exports do (ExecuTorch's partitioner makes some). Without freezing it
    # would then be half as fast. An option of `torch.compile` would come too late: Dynamo itself reads this one.
    inductor_config.freezing = True
    # Said by the environment too, but unlike this, that is no part of the key under which Inductor caches code.
    compiled = torch.compile(job.model, options={"cpp.simdlen": 256} if job.isa == AVX2 else None)
    with torch.inference_mode():  # It compiles in the first call, and freezes only without gradients.
        compiled(*job.inputs)
    return Runner(lambda: compiled(*job.inputs), _leaves, isa=_torch_isa(job))


def _torch_isa(job: Job) -> str:
    """Whether PyTorch has heard of the limit: it has if the process was started with the environment for it."""
    obeys = job.isa == NATIVE or torch.backends.cpu.get_cpu_capability() == "AVX2"
    return job.isa if obeys else UNRESTRICTED


def onnxruntime(job: Job) -> Runner:
    """ONNX Runtime's CPU provider on PyTorch's own ONNX export.

    Its kernels (MLAS) are chosen by what CPUID tells, and neither an option nor an environment variable limits that.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its workers may spin during a run, as they do by default, but not after it: there they would take cores from the
    # runtime whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = _export_onnx(job, Path(folder))
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {spec.name: tensor.numpy() for spec, tensor in zip(session.get_inputs(), job.inputs, strict=True)}
    return Runner(
        lambda: session.run(None, feeds),
        lambda result: [torch.from_numpy(array) for array in _sequence(result)],
        isa=NATIVE if job.isa == NATIVE else UNRESTRICTED,
    )


def openvino(job: Job) -> Runner:
    """OpenVINO's CPU plugin on the same ONNX file, tuned for latency, in fp32.

    A limit to AVX2 holds for its convolutions and all else that it does by oneDNN, but not for its reductions and
    normalisations, nor for the matrix products that it leaves to MLAS.
    """
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Otherwise it computes in bf16 on CPUs that can.
        "INFERENCE_PRECISION_HINT": "f32",
        # Pinning would also pin the thread that calls, and with it the runtimes which come next in this process.
        "ENABLE_CPU_PINNING": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        core = ov.Core()
        compiled = core.compile_model(core.read_model(str(_export_onnx(job, Path(folder)))), "CPU", settings)
    request = compiled.create_infer_request()
    feeds = [tensor.numpy() for tensor in job.inputs]

    def run() -> object:
        # Shared: no copies at the boundary, as sepc and PyTorch have none.
        return request.infer(feeds, share_inputs=True, share_outputs=True)

    def tensors(result: object) -> list[torch.Tensor]:
        assert isinstance(result, Mapping)
        return [torch.from_numpy(array.copy()) for array in result.values()]

    kernels = _openvino_kernels(compiled)
    return Runner(run, tensors, {"kernels": kernels}, _openvino_isa(job, kernels))


def _openvino_kernels(compiled: Any) -> dict[str, int]:
    """How many nodes of which kind run by which kernel, as "Convolution brgconv_avx2_1x1_f32": 34."""
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    pairs = [(info["layerType"].astype(str), info["primitiveType"].astype(str)) for info in infos]
    # Inputs, constants and views have no kernel.
    return dict(Counter(f"{layer} {kernel}" for layer, kernel in pairs if not kernel.startswith("unknown")))


def _openvino_isa(job: Job, kernels: Collection[str]) -> str:
    """Judge by the names of the kernels; MLAS goes by CPUID, and does not say what it uses."""
    if job.isa == NATIVE:
        return NATIVE
    beyond = [name for name in kernels if "avx512" in name or "amx" in name or "mlas" in name]
    if not beyond:
        return AVX2
    return UNRESTRICTED if any(name.startswith("Convolution") for name in beyond) else PARTLY_AVX2


def xnnpack(job: Job) -> Runner:
    """XNNPACK through ExecuTorch. What its partitioner does not delegate runs by ExecuTorch's own kernels.

    The details tell how many calls the program makes of what; one `executorch_call_delegate` alone means XNNPACK only.
    """
    isa = _limit_xnnpack() if job.isa == AVX2 else NATIVE
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    # The pool is ExecuTorch's own and belongs to the process: OMP_NUM_THREADS does not reach it.
    portable_lib._unsafe_reset_threadpool(job.threads)
    exported = torch.export.export(job.model, job.inputs)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    program = Runtime.get().load_program(lowered.to_executorch().buffer)
    program.load_method("forward")
    calls = [node.target for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    names = Counter(getattr(target, "__name__", str(target)) for target in calls)
    names.pop("getitem", None)

    def run() -> object:
        # Loaded already, so this is a look-up. A method does not keep its program alive, this does.
        return program.load_method("forward").execute(job.inputs)

    return Runner(run, _leaves, {"calls": dict(names)}, isa)


# Fields of type `bool` in `cpuinfo_isa`, one after the other from this offset on, by Linux's names of what they tell.
_CPUINFO_START: Final = 22
_CPUINFO_FLAGS: Final = (
    "avx avx_vnni fma fma4 xop f16c avx2 avx512f avx512pf avx512er avx512cd avx512dq avx512bw avx512vl avx512ifma "
    "avx512vbmi avx512_vbmi2 avx512_bitalg avx512_vpopcntdq avx512_vnni avx512_bf16 avx512_fp16"
).split()


def _limit_xnnpack() -> str:
    """Have XNNPACK find a processor without AVX-512, and say whether that was possible.

    It has no option for this, but asks another shared library, cpuinfo, once, when it is loaded; what cpuinfo has found
    out can be changed before. Its layout is no stable interface, so it is believed only if it shows this processor.
    """
    package = importlib.util.find_spec("executorch")
    if package is None or "executorch.extension.pybindings._C" in sys.modules:
        return UNRESTRICTED
    try:
        folder = Path(next(iter(package.submodule_search_locations or ())))
        library = ctypes.CDLL(str(folder / "lib" / "libexecutorch_threadpool.so"))
        library.cpuinfo_initialize()
        found = (ctypes.c_bool * (_CPUINFO_START + len(_CPUINFO_FLAGS))).in_dll(library, "cpuinfo_isa")
    except (StopIteration, OSError, AttributeError, ValueError):  # another release, built otherwise
        return UNRESTRICTED
    if dict(zip(_CPUINFO_FLAGS, found[_CPUINFO_START:], strict=True)) != _processor_has(_CPUINFO_FLAGS):
        return UNRESTRICTED
    for index, name in enumerate(_CPUINFO_FLAGS, _CPUINFO_START):
        found[index] = found[index] and not name.startswith("avx512")
    return AVX2


def _processor_has(flags: Collection[str]) -> dict[str, bool]:
    """Which of these flags the processor has, according to Linux; none where there is no /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    present = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return {flag: flag in present for flag in flags}


def sepc(job: Job) -> Runner:
    """This project."""
    import sepc as compiler

    os.environ["SEPC_CACHE"] = "0"  # The time to build is that of compiling.
    target = "x86-64-v3" if job.isa == AVX2 else "native"
    compiled = compiler.compile(job.model, target=target, example_inputs=job.inputs, num_threads=job.threads)
    details = {"compile_times_s": {stage: float(time_s) for stage, time_s in compiled.compile_times.items()}}
    return Runner(lambda: compiled(*job.inputs), _leaves, details, job.isa)


BUILDERS: Mapping[str, Callable[[Job], Runner]] = {
    "eager": eager,
    "inductor": inductor,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "xnnpack": xnnpack,
    "sepc": sepc,
}


NEEDS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
    "xnnpack": ("executorch",),
}
"""The packages, by the names that they are imported and installed by, that a runner needs beyond those of sepc."""


def why_missing(peer: str) -> str:
    """What a runner needs that is not installed, and how to install it; empty if nothing is missing."""
    missing = [name for name in NEEDS.get(peer, ()) if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} not installed; pip install {' '.join(missing)}"


def _sequence(result: object) -> list[object]:
    assert isinstance(result, (list, tuple))
    return list(result)


def _export_onnx(job: Job, folder: Path) -> Path:
    """Write the model into `folder`; the export, the slow part, is done once for all who read ONNX."""
    path = folder / "model.onnx"
    path.write_bytes(_onnx_bytes(job))
    return path


@cache
def _onnx_bytes(job: Job) -> bytes:
    program = torch.onnx.export(job.model, job.inputs, dynamo=True, verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return bytes(program.model_proto.SerializeToString())
