"""The detector under test."""

import unittest

from internimage_hf import InternImageConfig, InternImageDinoConfig, InternImageDinoForObjectDetection

from ..detectors import DetectorTests
from ..overrides import know_as_library_model


know_as_library_model(
    InternImageDinoConfig.model_type, MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES="InternImageDinoForObjectDetection"
)


class InternImageDinoTest(DetectorTests, unittest.TestCase):
    config_class = InternImageDinoConfig
    model_class = InternImageDinoForObjectDetection
    config_kwargs = {"neck_groups": 8, "num_denoising": 8}
    backbone_config = InternImageConfig(
        channels=8,
        depths=[1, 1, 1, 1],
        groups=[2, 4, 4, 8],
        layer_scale_init_value=1.0,
        out_features=["stage2", "stage3", "stage4"],
    )
