"""Measurements of anomalib_vtfusion: each module is run as ``python -m benchmarks.NAME`` from the project's folder."""
