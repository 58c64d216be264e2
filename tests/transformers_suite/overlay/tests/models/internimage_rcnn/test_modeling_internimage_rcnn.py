"""Mask R-CNN, with nothing like it in transformers: every common test that applies must pass."""

import copy
import unittest

import torch
from transformers.testing_utils import torch_device

from internimage_hf import InternImageConfig, InternImageRcnnConfig, InternImageRcnnForInstanceSegmentation

from ...test_configuration_common import ConfigTester
from ...test_modeling_common import floats_tensor
from ..overrides import DetectionModelTests, know_as_library_model


know_as_library_model(
    InternImageRcnnConfig.model_type,
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES="InternImageRcnnForInstanceSegmentation",
)


class RcnnTester:
    """Tiny configuration and inputs. All anchors and proposals are in the losses: nothing is drawn at random."""

    batch_size = 2
    image_size = 64
    num_labels = 3
    is_training = True

    def get_config(self):
        backbone = InternImageConfig(
            channels=8,
            depths=[1, 1, 1, 1],
            groups=[2, 4, 4, 8],
            layer_scale_init_value=1.0,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        return InternImageRcnnConfig(
            backbone_config=backbone,
            fpn_hidden_size=16,
            box_hidden_size=16,
            mask_hidden_size=16,
            num_labels=self.num_labels,
            score_threshold=0.0,
            max_detections=5,
            rpn_pre_nms_top_n=30,
            rpn_post_nms_top_n=20,
            rpn_num_samples=10_000,
            num_samples=10_000,
        )

    def prepare_config_and_inputs_for_common(self):
        size = [self.batch_size, self.image_size, self.image_size]
        return self.get_config(), {
            "pixel_values": floats_tensor([size[0], 3, *size[1:]]),
            "pixel_mask": torch.ones(size, dtype=torch.long, device=torch_device),
        }

    def labels(self):
        masks = torch.zeros(2, self.image_size, self.image_size, device=torch_device)
        masks[:, 20:40, 10:40] = 1
        boxes = torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.2, 0.4]], device=torch_device)
        classes = torch.tensor([0, 2], device=torch_device)
        return [{"class_labels": classes, "boxes": boxes, "masks": masks} for _ in range(self.batch_size)]


class InternImageRcnnTest(DetectionModelTests, unittest.TestCase):
    config_class = InternImageRcnnConfig
    all_model_classes = (InternImageRcnnForInstanceSegmentation,)
    has_attentions = False
    test_torch_exportable = False  # how many boxes there are depends on the values

    def setUp(self):
        self.model_tester = RcnnTester()
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, common_properties=["max_detections"]
        )

    def test_hidden_states_output(self):
        """Those of the backbone: the stem's and the stages'."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for by_config in (False, True):
            config = copy.deepcopy(config)
            config.backbone_config.output_hidden_states = by_config
            model = InternImageRcnnForInstanceSegmentation(config).to(torch_device).eval()
            with torch.no_grad():
                outputs = model(**inputs, **({} if by_config else {"output_hidden_states": True}))
            self.assertEqual([m.shape[-1] for m in outputs.hidden_states], [16, 16, 8, 4, 2])
