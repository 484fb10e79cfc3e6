"""The latency benchmark measures in turn, divides by the tower of the same round, and writes what it found."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.latency import __main__ as command
from benchmarks.latency.pool import WorkerProcess, measure
from benchmarks.latency.summary import auroc, quartiles, summarize
from benchmarks.latency.worker import Variant, Worker, resident_megabytes


@pytest.fixture
def variant(tmp_path):
    """A saved module: the first channel's mean is its score."""
    path = tmp_path / "mean.pt"
    torch.save(torch.nn.AvgPool2d(8), path)
    return Variant("tower", "torch", str(path), (8, 8))


@pytest.fixture
def images(tmp_path):
    values = np.random.default_rng(0).random((5, 3, 8, 8), dtype=np.float32)
    np.save(tmp_path / "images.npy", values)
    return values


class Clock:
    """A worker whose times are given, and that notes when it was asked."""

    def __init__(self, name, times, log):
        self.name, self.times, self.log = name, iter(times), log

    def ask(self, request):
        self.log.append(self.name)
        if "repeats" not in request:  # the one that does not count
            return {"wall_ms": -1.0, "cpu_ms": -1.0}
        value = next(self.times)
        return {"wall_ms": value, "cpu_ms": 2 * value}


def test_variants_take_turns_and_the_first_time_does_not_count():
    log = []
    workers = {"a": Clock("a", [1.0, 2.0, 3.0], log), "b": Clock("b", [10.0, 20.0, 30.0], log)}
    samples = measure(workers, [8], rounds=3, repeats=1)
    assert log == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [sample["wall_ms"] for sample in samples[8]["a"]] == [1.0, 2.0, 3.0]
    assert [sample["cpu_ms"] for sample in samples[8]["b"]] == [20.0, 40.0, 60.0]


def test_ratios_are_of_the_same_round():
    """A load that slows every second round down leaves the ratio as it is."""
    samples = {
        name: [{"wall_ms": f * s, "cpu_ms": f} for s in (1, 9, 1, 9)] for name, f in (("tower", 2.0), ("x", 3.0))
    }
    found = summarize(samples, "tower")
    assert found["x"]["wall_ratio"] == {"median": 1.5, "q1": 1.5, "q3": 1.5}
    assert found["x"]["wall_ms"] == {"median": 15.0, "q1": 3.0, "q3": 27.0}
    assert found["tower"]["cpu_ratio"]["median"] == 1.0


def test_quartiles():
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert quartiles([1.234]) == {"median": 1.23, "q1": 1.23, "q3": 1.23}


def test_auroc_counts_pairs():
    assert auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert auroc([0.5, 0.5], [True, False]) == 0.5


class TestWorker:
    def test_scores_are_the_modules(self, variant, images):
        scores = Worker(variant, images).ask({"do": "scores"})["scores"]
        np.testing.assert_allclose(scores, images[:, 0].mean(axis=(1, 2)), rtol=1e-5)

    def test_images_are_resized_to_the_variant(self, variant, images):
        smaller = Worker(replace(variant, size=(4, 4)), images).runner.prepare(images[:2])
        assert smaller.shape == (2, 3, 4, 4)

    def test_times_and_memory_are_plausible(self, variant, images):
        worker = Worker(variant, images)
        for request in ({"do": "time", "batch": 8, "repeats": 2}, {"do": "many", "count": 7}):
            taken = worker.ask(request)
            assert taken["wall_ms"] > 0
            assert taken["cpu_ms"] >= 0
        memory = worker.ask({"do": "memory"})
        assert memory["peak_mb"] >= memory["imports_mb"] > 10
        assert resident_megabytes(peak=True) >= resident_megabytes() - 1

    @pytest.mark.parametrize("kind", ["tensorflow", ""])
    def test_unknown_kinds_and_requests(self, variant, images, kind):
        with pytest.raises(ValueError, match="Unknown kind"):
            Worker(replace(variant, kind=kind), images)
        with pytest.raises(ValueError, match="Unknown request"):
            Worker(variant, images).ask({"do": "nothing"})


class TestProcess:
    def test_answers_as_the_same_worker_here_does(self, variant, images, tmp_path):
        process = WorkerProcess(variant, tmp_path / "images.npy")
        try:
            assert process.ask({"do": "scores"}) == Worker(variant, images).ask({"do": "scores"})
            with pytest.raises(RuntimeError, match=r"tower ended with 1:[\s\S]*Unknown request"):
                process.ask({"do": "nothing"})
        finally:
            process.stop()


def test_command_writes_result_and_plot(tmp_path, monkeypatch, cnn_encoder):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "results" / "latency.json"
    names = ["vtfusion", "vtfusion-bf16"]
    options = ["--quick", "--encoder", cnn_encoder, "--variants", *names, "--references", "1", "4", "--threads", "1"]
    command.main([*options, "--device", "cpu", "--output", str(output)])
    result = json.loads(output.read_text())
    assert list(result["variants"]) == ["tower", *names]
    for entry in result["variants"].values():
        assert set(entry["batch"]) == {"1", "8"}
        assert entry["file_mb"] > 0
    assert result["variants"]["tower"]["batch"]["8"]["wall_ratio"]["median"] == 1
    assert result["variants"]["vtfusion"]["score_difference"] == 0
    assert 0 < result["variants"]["vtfusion-bf16"]["score_difference"] < 0.3
    assert result["references"]["4"]["bank_rows"] == [2048, 512]
    assert result["references"]["1"]["bank_rows"] == [512, 128]
    assert set(result["images"]) == {"2"}
    assert result["provenance"]["versions"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
