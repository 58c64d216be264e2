"""The model under test, in four variants; each runs every common test."""

import unittest

from internimage_hf import (
    InternImageBackbone,
    InternImageConfig,
    InternImageForImageClassification,
    InternImageModel,
    InternImagePreTrainedModel,
)

from ..hierarchical_vision import (
    DeformableModelTests,
    HierarchicalVisionBackboneTests,
    HierarchicalVisionModelTests,
)
from ..overrides import know_as_library_model


know_as_library_model(
    InternImageConfig.model_type,
    MODEL_MAPPING_NAMES="InternImageModel",
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES="InternImageForImageClassification",
    MODEL_FOR_BACKBONE_MAPPING_NAMES="InternImageBackbone",
)

TINY = {
    "channels": 8,
    "depths": [1, 1, 3, 1],
    "groups": [2, 4, 4, 8],
    "mlp_ratio": 2.0,
    "hidden_act": "gelu",
    "drop_path_rate": 0.0,
}

# Like T: pre-norm, no layer scale, ordinary head.
PRE_NORM = {
    **TINY,
    "layer_scale_init_value": None,
    "post_norm": False,
    "offset_scale": 1.0,
}

# Like S to XL (post-norm, layer scale, offset scale 2), with what H and G add on top.
# The layer scale is not the authors' 1e-5, next to which an error in a layer would not show.
POST_NORM = {
    **TINY,
    "layer_scale_init_value": 0.1,
    "post_norm": True,
    "offset_scale": 2.0,
    "dw_kernel_size": 5,
    "center_feature_scale": True,
    "remove_center": True,
    "use_clip_projector": True,
}

# Like H: norms before and after each branch, norms after blocks 0 and 2 of stage 3, CLIP projector.
RES_POST_NORM = {
    **TINY,
    "layer_scale_init_value": None,
    "post_norm": False,
    "res_post_norm": True,
    "level2_post_norm_block_ids": [0, 2],
    "dw_kernel_size": 5,
    "center_feature_scale": True,
    "use_clip_projector": True,
}

# Like FlashInternImage-S to L: DCNv4 with a depth-wise convolution, post-norm, layer scale.
DCNV4 = {
    **TINY,
    "dcn_version": 4,
    "layer_scale_init_value": 0.1,
    "post_norm": True,
    "offset_scale": 0.5,
    "dw_kernel_size": 3,
}


# transformers wants test models under 1 million parameters; the authors' projector alone, of fixed width 1024, has 4.
CLIP_PROJECTOR_PARAMETERS = 8_000_000


class InternImageModelTests(DeformableModelTests, HierarchicalVisionModelTests):
    def test_ours_pretrained_base_class(self):
        for model_class in self.all_model_classes:
            self.assertTrue(issubclass(model_class, InternImagePreTrainedModel))
            self.assertIs(model_class.config_class, InternImageConfig)


class Model:
    config_class = InternImageConfig
    hidden_sizes = [8, 16, 32, 64]
    base_class = InternImageModel
    classification_class = InternImageForImageClassification
    backbone_class = InternImageBackbone


class InternImagePreNormModelTest(Model, InternImageModelTests, unittest.TestCase):
    variant = "pre_norm"
    config_kwargs = PRE_NORM


class InternImagePreNormBackboneTest(Model, HierarchicalVisionBackboneTests, unittest.TestCase):
    config_kwargs = PRE_NORM


class InternImagePostNormModelTest(Model, InternImageModelTests, unittest.TestCase):
    variant = "post_norm"
    config_kwargs = POST_NORM
    max_parameters = CLIP_PROJECTOR_PARAMETERS


class InternImagePostNormBackboneTest(Model, HierarchicalVisionBackboneTests, unittest.TestCase):
    config_kwargs = POST_NORM


class InternImageResPostNormModelTest(Model, InternImageModelTests, unittest.TestCase):
    variant = "res_post_norm"
    config_kwargs = RES_POST_NORM
    max_parameters = CLIP_PROJECTOR_PARAMETERS


class InternImageResPostNormBackboneTest(Model, HierarchicalVisionBackboneTests, unittest.TestCase):
    config_kwargs = RES_POST_NORM


class InternImageDCNv4ModelTest(Model, InternImageModelTests, unittest.TestCase):
    variant = "dcnv4"
    config_kwargs = DCNV4


class InternImageDCNv4BackboneTest(Model, HierarchicalVisionBackboneTests, unittest.TestCase):
    config_kwargs = DCNV4
