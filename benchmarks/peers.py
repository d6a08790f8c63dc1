"""The runners: each way to execute a model, behind one signature, with its number of threads set explicitly.

Heavy packages are imported by the builder that needs them, so a missing one costs a column of the table, no more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

Run: TypeAlias = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """What a runner is built for."""

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    threads: int


@dataclass(frozen=True)
class Runner:
    """A model, ready to run on its inputs.

    Attributes:
        run: one inference; returns whatever the runtime returns, without conversion, since it is what is timed.
        tensors: converts what `run` returned into the flat list of output tensors; not timed.
        details: facts about the build, such as the time of each compilation stage, for the JSON file.
    """

    run: Run
    tensors: Callable[[object], list[torch.Tensor]]
    details: Mapping[str, object] = field(default_factory=dict)


def _leaves(result: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def eager(job: Job) -> Runner:
    """PyTorch as it is; the reference of every comparison."""
    return Runner(lambda: job.model(*job.inputs), _leaves)


def inductor(job: Job) -> Runner:
    """`torch.compile` with its default mode and frozen parameters, which lets it fold and pack weights."""
    import torch._inductor.config as inductor_config

    torch._dynamo.reset()
    compiled = torch.compile(job.model)
    # The option is read while compiling, that is in the first call, and only without gradients.
    with torch.inference_mode(), inductor_config.patch(freezing=True):
        compiled(*job.inputs)
    return Runner(lambda: compiled(*job.inputs), _leaves)


def onnxruntime(job: Job) -> Runner:
    """ONNX Runtime's CPU provider on PyTorch's own ONNX export."""
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
        lambda: session.run(None, feeds), lambda result: [torch.from_numpy(array) for array in _sequence(result)]
    )


def openvino(job: Job) -> Runner:
    """OpenVINO's CPU plugin on the same ONNX file, tuned for latency, in fp32."""
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

    return Runner(run, tensors)


def sepc(job: Job) -> Runner:
    """This project."""
    import sepc as compiler

    compiled = compiler.compile(job.model, example_inputs=job.inputs, num_threads=job.threads)
    details = {"compile_times_s": {stage: float(time_s) for stage, time_s in compiled.compile_times.items()}}
    return Runner(lambda: compiled(*job.inputs), _leaves, details)


BUILDERS: Mapping[str, Callable[[Job], Runner]] = {
    "eager": eager,
    "inductor": inductor,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "sepc": sepc,
}


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
