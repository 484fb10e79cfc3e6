"""Data of VTFusion."""
