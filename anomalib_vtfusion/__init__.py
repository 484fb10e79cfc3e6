"""VTFusion: vision-text fusion for few-shot industrial anomaly detection, as an Anomalib model."""

__version__ = "0.1.0"
