"""A process that holds one variant, and times it when asked: one JSON object a line in, one out.

Imports as little as its kind needs, so that its memory is that of a deployment.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
MEGABYTE = 1e6
# A round of a variant that takes longer than this is not repeated: what is slow is not disturbed much.
ENOUGH_SECONDS = 5.0


@dataclass(frozen=True)
class Variant:
    """What to load and how to run it.

    Attributes:
        name: Name in the result.
        kind: ``torch``, ``compiled``, ``onnx`` or ``openvino``.
        path: The deployed file.
        size: Input ``(H, W)``.
        precision: ``f32`` or ``bf16``, what it calculates in.
        device: ``cpu`` or ``cuda``; ONNX and OpenVINO run on the processor.
        threads: Threads to use.
    """

    name: str
    kind: str
    path: str
    size: tuple[int, int]
    precision: str = "f32"
    device: str = "cpu"
    threads: int = 1


class Runner:
    """A loaded variant.

    Args:
        forward: From a prepared batch to image scores ``(B,)``; returns when the work is done.
        prepare: From images ``(B, 3, H, W)`` in ``[0, 1]`` to what ``forward`` takes.
    """

    def __init__(self, forward: Callable[[Any], Array], prepare: Callable[[Array], Any]) -> None:
        self.forward, self.prepare = forward, prepare


def load(variant: Variant) -> tuple[Runner, float, float]:
    """Load a variant.

    Returns:
        The runner, the seconds that loading took without imports, and the megabytes held before it.

    Raises:
        ValueError: If the kind is unknown.
    """
    kinds = {"torch": _load_torch, "compiled": _load_torch, "onnx": _load_onnx, "openvino": _load_openvino}
    if variant.kind not in kinds:
        raise ValueError(f"Unknown kind {variant.kind!r}; there are {', '.join(kinds)}.")
    return kinds[variant.kind](variant)


def _load_torch(variant: Variant) -> tuple[Runner, float, float]:
    import open_clip  # noqa: F401 - what is unpickled needs it, and imports are not the time of loading
    import torch

    if variant.name not in {"tower", "winclip"}:
        import anomalib.models  # noqa: F401
    torch.set_num_threads(variant.threads)
    held, start = resident_megabytes(), time.perf_counter()
    content = torch.load(variant.path, map_location=variant.device, weights_only=False)
    module = (content["model"] if isinstance(content, dict) else content).eval().to(variant.device)
    if hasattr(module, "register_buffer_list"):  # WinCLIP's lists hang on the class, which a file does not hold
        for name in ("masks", "_visual_embeddings"):
            own = [buffer for key, buffer in module.named_buffers() if key.startswith(f"_{name}_")]
            module.register_buffer_list(name, own, persistent=False)
    if variant.kind == "compiled":
        module = torch.compile(module)
    seconds = time.perf_counter() - start

    def forward(batch: torch.Tensor) -> Array:
        half = variant.precision == "bf16"
        with torch.inference_mode(), torch.autocast(variant.device, torch.bfloat16, enabled=half):
            output = module(batch)
        scores = getattr(output, "pred_score", output)
        return scores.float().cpu().numpy().reshape(len(batch), -1)[:, 0]  # waits for a GPU

    def prepare(images: Array) -> torch.Tensor:
        batch = torch.from_numpy(images)
        if batch.shape[-2:] != variant.size:
            batch = torch.nn.functional.interpolate(batch, variant.size, mode="bilinear", antialias=True)
        return batch.to(variant.device)

    return Runner(forward, prepare), seconds, held


def _load_onnx(variant: Variant) -> tuple[Runner, float, float]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = variant.threads
    held, start = resident_megabytes(), time.perf_counter()
    session = onnxruntime.InferenceSession(variant.path, options, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - start
    names = [output.name for output in session.get_outputs()]
    score = names.index("pred_score")
    # All outputs are asked for, as by anyone who wants the map.
    return Runner(lambda batch: session.run(names, {"input": batch})[score][:, 0], lambda images: images), seconds, held


def _load_openvino(variant: Variant) -> tuple[Runner, float, float]:
    import openvino

    held, start = resident_megabytes(), time.perf_counter()
    settings = {"INFERENCE_PRECISION_HINT": variant.precision, "INFERENCE_NUM_THREADS": variant.threads}
    model = openvino.Core().compile_model(variant.path, "CPU", settings)
    seconds = time.perf_counter() - start
    return Runner(lambda batch: model(batch)["pred_score"][:, 0].copy(), lambda images: images), seconds, held


def resident_megabytes(*, peak: bool = False) -> float:
    """Resident memory of this process, now or at its highest.

    Not from ``getrusage`` where it can be avoided: a new process inherits that peak from the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        field = "VmHWM:" if peak else "VmRSS:"
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024 / MEGABYTE
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE


class Worker:
    """Answers requests about one variant.

    Args:
        variant: What to load.
        images: Images ``(N, 3, H, W)`` in ``[0, 1]``.
    """

    def __init__(self, variant: Variant, images: Array) -> None:
        self.images = images
        self.runner, self.load_seconds, self.held = load(variant)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request.

        ``{"do": "time", "batch": b, "repeats": r}`` gives milliseconds an image on the clock and on the processor of
        the fastest of ``r`` batches, or of as many as begin within `ENOUGH_SECONDS`; ``{"do": "many", "count": n}`` the
        mean over n images one by one, and the memory held afterwards; ``{"do": "scores"}`` the scores of all images;
        ``{"do": "memory"}`` load time and memory.

        Raises:
            ValueError: If the request is unknown.
        """
        what = request["do"]
        if what == "time":
            return self._time(request["batch"], request.get("repeats", 1))
        if what == "many":
            return self._many(request["count"])
        if what == "scores":
            chunks = [self.images[i : i + 8] for i in range(0, len(self.images), 8)]
            scores = [self.runner.forward(self.runner.prepare(chunk)) for chunk in chunks]
            return {"scores": np.concatenate(scores).astype(float).tolist()}
        if what == "memory":
            peak = resident_megabytes(peak=True)
            return {"load_seconds": self.load_seconds, "imports_mb": self.held, "peak_mb": peak}
        raise ValueError(f"Unknown request {what!r}.")

    def _time(self, size: int, repeats: int) -> dict[str, float]:
        batch = self.runner.prepare(np.resize(self.images, (size, *self.images.shape[1:])))
        taken = []
        for _ in range(repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            self.runner.forward(batch)
            taken.append((time.perf_counter() - wall, time.process_time() - cpu))
            if sum(seconds for seconds, _ in taken) > ENOUGH_SECONDS:
                break
        scale = 1e3 / size
        return {"wall_ms": min(t[0] for t in taken) * scale, "cpu_ms": min(t[1] for t in taken) * scale}

    def _many(self, count: int) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for index in range(count):
            self.runner.forward(self.runner.prepare(self.images[index % len(self.images)][None]))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall_ms": wall * 1e3 / count, "cpu_ms": cpu * 1e3 / count, "held_mb": resident_megabytes()}


def start_line(variant: Variant, images: Path) -> str:
    """The line that tells a new worker process what it is."""
    return json.dumps({"variant": asdict(variant), "images": str(images)}) + "\n"


def main() -> None:
    """Load what the first line says, then answer line by line until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    first = json.loads(sys.stdin.readline())
    fields = first["variant"]
    worker = Worker(Variant(**{**fields, "size": tuple(fields["size"])}), np.load(first["images"]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.ask(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
