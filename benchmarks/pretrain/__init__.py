"""Training recipe of the shipped encoder ``vtfusion-tiny``; run with ``python -m benchmarks.pretrain``."""
