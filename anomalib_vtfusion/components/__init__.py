"""Components of VTFusion."""
