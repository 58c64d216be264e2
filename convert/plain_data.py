"""Stand-ins for what training programs save beside the weights, so that such files are read without any code of theirs.

torch's restricted unpickler calls nothing but what it was told of. It is told of the names below; what it gets for them is an
ordinary dictionary, or an object that takes any arguments and any state and keeps nothing.
"""

from collections import OrderedDict


class _Mapping:
    def __new__(cls, *args, **kwargs) -> OrderedDict:
        return OrderedDict()  # the one mapping with attributes that the restricted unpickler fills


class _Inert:
    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


_MAPPINGS = (
    "yacs.config.CfgNode",  # the official classification program's `config`
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "addict.addict.Dict",
    "easydict.EasyDict",
    "collections.defaultdict",
)
_OBJECTS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "mmcv.utils.config.Config",
    "mmengine.config.config.Config",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "ml_collections.config_dict.config_dict.ConfigDict",
    *(
        f"omegaconf.{name}"
        for name in (
            "dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata",
            *(f"nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path")),
        )
    ),
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "int", "float", "str", "bytes", "list", "tuple", "dict")),
    # accuracies and histories as NumPy's scalars and arrays
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.ndarray",
    "numpy.dtype",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "datetime.datetime",
    "datetime.timedelta",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)  # fmt: skip

# As `torch.serialization.safe_globals` takes them. Each name has a class of its own, so that a message can tell it.
STAND_INS = [(_Mapping, name) for name in _MAPPINGS] + [(type(name, (_Inert,), {}), name) for name in _OBJECTS]
