"""Overrides of transformers' common tests for models outside transformers, and for controls among its own."""

import collections
import inspect
import unittest
import unittest.mock

from transformers import ConvNextV2Config

from .. import test_modeling_common as common
from ..test_modeling_common import ModelTesterMixin


def know_as_library_model(model_type, **names):
    """Makes the common tests treat classes of another package as they treat transformers' own.

    The tests look class names up in transformers' static tables, to give labels to a classifier and to leave base
    models out of the training tests. The copies made here are seen by the tests alone; transformers' tables stay.

    Args:
        names: the class's name by table.
    """
    for table, name in names.items():
        setattr(common, table, collections.OrderedDict(getattr(common, table, {}), **{model_type: name}))


class ModelTests(ModelTesterMixin):
    """To be given: config_class, and by `setUp` model_tester and config_tester."""

    test_resize_embeddings = False

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_can_init_all_missing_weights(self):
        """As it is, but without its reason to be skipped: no "# Copyright 2023" or later in the config's file."""
        true_getfile = inspect.getfile

        def getfile(of):
            return true_getfile(ConvNextV2Config if of is self.config_class else of)

        with unittest.mock.patch.object(common.inspect, "getfile", getfile):
            super().test_can_init_all_missing_weights()

    @unittest.skip("No token embeddings")
    def test_model_get_set_embeddings(self):
        pass


class DetectionModelTests(ModelTests):
    """The labels are those of `model_tester.labels()`."""

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=False)
        return {**inputs, "labels": self.model_tester.labels()} if return_labels else inputs
