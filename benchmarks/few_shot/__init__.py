"""Few-shot comparison of anomaly detectors: one process a cell, sweeps that survive, results in small files."""
