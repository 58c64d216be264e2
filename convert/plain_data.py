"""In: names of classes in training programs' checkpoints. Out: stand-ins to unpickle such files without those programs' code.

torch's restricted unpickler calls allowed names only. The names below are allowed; each stands for an ordinary dictionary, or
for an object that accepts any arguments and state and keeps nothing.
"""

from collections import OrderedDict


class _Mapping:
    def __new__(cls, *args, **kwargs) -> OrderedDict:
        return OrderedDict()  # the only mapping with attributes that the restricted unpickler can fill


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
    # accuracies and histories: NumPy's scalars and arrays
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

# The argument of `torch.serialization.safe_globals`. Each name has its own class, for messages.
STAND_INS = [(_Mapping, name) for name in _MAPPINGS] + [(type(name, (_Inert,), {}), name) for name in _OBJECTS]
