"""The control for detectors."""

import unittest

from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from ..detectors import RESNET, DetectorTests


class DeformableDetrTest(DetectorTests, unittest.TestCase):
    config_class = DeformableDetrConfig
    model_class = DeformableDetrForObjectDetection
    backbone_config = RESNET
    config_kwargs = {
        "use_timm_backbone": False,
        "dropout": 0.0,
        "two_stage": True,
        "two_stage_num_proposals": 12,
        "with_box_refine": True,
        "auxiliary_loss": True,
    }
