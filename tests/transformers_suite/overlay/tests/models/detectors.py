"""One set of mixins, overrides and sizes for the control and for the detector under test.

`test_added_*` are this suite's own; every other test is transformers', or takes the place of one that transformers overrides for
Deformable DETR too.
"""

import copy
import inspect
import math
import unittest

import torch
from transformers import AutoConfig, AutoModelForObjectDetection, ResNetConfig
from transformers.testing_utils import torch_device

from ..test_configuration_common import ConfigTester
from ..test_modeling_common import floats_tensor
from .overrides import DetectionModelTests


class DetectorTester:
    """Tiny configuration and inputs."""

    batch_size = 3
    image_size = 96
    num_channels = 3
    num_labels = 10
    num_queries = 12
    n_targets = 4
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_feature_levels = 4
    points = {"encoder": 2, "decoder": 3}
    is_training = True

    def __init__(self, parent, config_class, backbone_config, config_kwargs):
        self.parent = parent
        self.config_class = config_class
        self.backbone_config = backbone_config
        self.config_kwargs = config_kwargs
        self.encoder_seq_length = sum(math.ceil(self.image_size / 2**i) ** 2 for i in (3, 4, 5, 6))
        self.decoder_seq_length = self.num_queries

    def get_config(self):
        return self.config_class(
            backbone_config=copy.deepcopy(self.backbone_config),
            d_model=self.hidden_size,
            encoder_layers=self.num_hidden_layers,
            decoder_layers=self.num_hidden_layers,
            encoder_attention_heads=self.num_attention_heads,
            decoder_attention_heads=self.num_attention_heads,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            encoder_n_points=self.points["encoder"],
            decoder_n_points=self.points["decoder"],
            num_feature_levels=self.num_feature_levels,
            num_queries=self.num_queries,
            num_labels=self.num_labels,
            **self.config_kwargs,
        )

    def prepare_config_and_inputs_for_common(self):
        size = [self.batch_size, self.image_size, self.image_size]
        return self.get_config(), {
            "pixel_values": floats_tensor([size[0], self.num_channels, *size[1:]]),
            "pixel_mask": torch.ones(size, device=torch_device),
        }

    def labels(self):
        """The same at each call, as the tests compare outputs of several calls."""
        generator = torch.Generator().manual_seed(0)
        return [
            {
                "class_labels": torch.randint(self.num_labels, (self.n_targets,), generator=generator).to(
                    torch_device
                ),
                "boxes": torch.rand(self.n_targets, 4, generator=generator).to(torch_device),
            }
            for _ in range(self.batch_size)
        ]


class DetectorTests(DetectionModelTests):
    """To be given: config_class, backbone_config, config_kwargs and model_class."""

    is_encoder_decoder = True
    test_missing_keys = False
    test_torch_exportable = True

    def __init_subclass__(cls, **kwargs):
        if hasattr(cls, "model_class"):
            cls.all_model_classes = (cls.model_class,)
        super().__init_subclass__(**kwargs)

    def setUp(self):
        self.model_tester = DetectorTester(self, self.config_class, self.backbone_config, self.config_kwargs)
        self.config_tester = ConfigTester(
            self,
            config_class=self.config_class,
            has_text_modality=False,
            common_properties=["d_model", "encoder_attention_heads", "decoder_attention_heads", "num_queries"],
        )

    @unittest.skip("Takes no embeddings")
    def test_inputs_embeds(self):
        pass

    @unittest.skip("Takes no embeddings")
    def test_inputs_embeds_matches_input_ids(self):
        pass

    @unittest.skip("No chunks in the feed-forward networks")
    def test_feed_forward_chunking(self):
        pass

    def test_attention_outputs(self):
        tester = self.model_tester
        config, inputs = tester.prepare_config_and_inputs_for_common()
        deformable = {
            kind: [tester.num_attention_heads, tester.num_feature_levels, points]
            for kind, points in tester.points.items()
        }
        dense = [tester.num_attention_heads, tester.num_queries, tester.num_queries]
        for by_config in (False, True):
            config = copy.deepcopy(config)
            config.output_attentions = by_config
            model = self.model_class._from_config(config, attn_implementation="eager").to(torch_device).eval()
            with torch.no_grad():
                outputs = model(**inputs, **({} if by_config else {"output_attentions": True}))
            for name, shape in (
                ("encoder_attentions", deformable["encoder"]),
                ("decoder_attentions", dense),
                ("cross_attentions", deformable["decoder"]),
            ):
                self.assertEqual(len(outputs[name]), tester.num_hidden_layers, name)
                for attention in outputs[name]:
                    self.assertEqual(list(attention.shape[-3:]), shape, name)

    def test_retain_grad_hidden_states_attentions(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.output_hidden_states = config.output_attentions = True
        model = self.model_class._from_config(config, attn_implementation="eager").to(torch_device)
        outputs = model(**inputs)
        found = [outputs[f"{part}_hidden_states"][0] for part in ("encoder", "decoder")]
        found += [outputs[name][0] for name in ("encoder_attentions", "decoder_attentions", "cross_attentions")]
        for tensor in found:
            tensor.retain_grad()
        (outputs.logits.sum() + outputs.pred_boxes.sum()).backward()
        for tensor in found:
            self.assertIsNotNone(tensor.grad)

    def test_forward_signature(self):
        names = list(inspect.signature(self.model_class.forward).parameters)
        self.assertEqual(names[1:3], ["pixel_values", "pixel_mask"])

    # Added

    def test_added_outputs_and_loss(self):
        tester = self.model_tester
        config, inputs = tester.prepare_config_and_inputs_for_common()
        model = self.model_class(config).to(torch_device)
        for training in (False, True):
            outputs = model.train(training)(**inputs, labels=tester.labels())
            self.assertEqual(outputs.loss.shape, ())
            self.assertEqual(outputs.logits.shape, (tester.batch_size, tester.num_queries, tester.num_labels))
            self.assertEqual(outputs.pred_boxes.shape, (tester.batch_size, tester.num_queries, 4))

    def test_added_pixel_mask_may_be_left_out(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.model_class(config).to(torch_device).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(inputs["pixel_values"]).logits, model(**inputs).logits)

    def test_added_auto_classes(self):
        config = self.model_tester.get_config()
        self.assertIs(type(AutoModelForObjectDetection.from_config(config)), self.model_class)
        self.assertIs(type(AutoConfig.for_model(config.model_type)), self.config_class)

    def test_added_gradient_checkpointing(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.model_class(config).to(torch_device).train()
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        labels, gradients = self.model_tester.labels(), {}
        for checkpointing in (False, True):
            model.zero_grad()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            torch.manual_seed(0)
            model(**inputs, labels=labels).loss.backward()
            gradients[checkpointing] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.assertEqual(gradients[True].keys(), gradients[False].keys())
        for name, gradient in gradients[False].items():
            torch.testing.assert_close(gradients[True][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


RESNET = ResNetConfig(
    embedding_size=8,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)
