"""The detector under test."""

import collections
import unittest

from internimage_hf import InternImageConfig, InternImageDinoConfig, InternImageDinoForObjectDetection

from ... import test_modeling_common as common
from ..detectors import DetectorTests


# as `know_as_library_model` of hierarchical_vision.py does for classifiers
common.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES = collections.OrderedDict(
    getattr(common, "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", {}),
    internimage_dino="InternImageDinoForObjectDetection",
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
