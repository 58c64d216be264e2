"""The control."""

import unittest

from transformers import (
    ConvNextV2Backbone,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ConvNextV2Model,
)

from ..hierarchical_vision import (
    HierarchicalVisionBackboneTests,
    HierarchicalVisionModelTests,
)


CONFIG = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 3, 1]}


class ConvNextV2ModelTest(HierarchicalVisionModelTests, unittest.TestCase):
    variant = "control"
    config_class = ConvNextV2Config
    config_kwargs = CONFIG
    hidden_sizes = [8, 16, 32, 64]
    base_class = ConvNextV2Model
    classification_class = ConvNextV2ForImageClassification
    backbone_class = ConvNextV2Backbone


class ConvNextV2BackboneTest(HierarchicalVisionBackboneTests, unittest.TestCase):
    config_class = ConvNextV2Config
    config_kwargs = CONFIG
    hidden_sizes = [8, 16, 32, 64]
    backbone_class = ConvNextV2Backbone
