"""Synthetic anomalies for training: normal images in, images with defects and their masks out."""

from anomalib_vtfusion.synthesis.contact_sheet import contact_sheet
from anomalib_vtfusion.synthesis.defects import FAMILIES
from anomalib_vtfusion.synthesis.foreground import foreground_mask
from anomalib_vtfusion.synthesis.scene import DefectParams
from anomalib_vtfusion.synthesis.synthesizer import AnomalySynthesizer, SynthesisParams, SyntheticBatch

__all__ = [
    "FAMILIES",
    "AnomalySynthesizer",
    "DefectParams",
    "SynthesisParams",
    "SyntheticBatch",
    "contact_sheet",
    "foreground_mask",
]
