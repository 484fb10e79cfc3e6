"""Synthesis of VTFusion."""
