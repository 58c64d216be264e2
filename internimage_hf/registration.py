# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Makes transformers' Auto classes know InternImage, without importing them before somebody needs them.

`import transformers` is lazy: it loads neither torch nor the Auto classes. Registering at once would load both and
make `import internimage_hf` cost several times as much as `import transformers` does. So registration waits until the
Auto classes are imported, and then until that import has ended: `modeling_auto` is loaded in the middle of other
modules of transformers on which our own modeling file depends.
"""

import importlib.abc
import sys
import threading


_PACKAGES = ("transformers", __package__)


def _register_config() -> None:
    from transformers import AutoConfig

    from .configuration_internimage import InternImageConfig

    AutoConfig.register(InternImageConfig.model_type, InternImageConfig, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification

    from .configuration_internimage import InternImageConfig
    from .modeling_internimage import InternImageBackbone, InternImageForImageClassification, InternImageModel

    AutoModel.register(InternImageConfig, InternImageModel, exist_ok=True)
    AutoModelForImageClassification.register(InternImageConfig, InternImageForImageClassification, exist_ok=True)
    AutoBackbone.register(InternImageConfig, InternImageBackbone, exist_ok=True)


def _register_image_processor() -> None:
    # from where it is defined: transformers 5.17 offers a placeholder at the top where torchvision is absent
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .configuration_internimage import InternImageConfig
    from .image_processing_internimage import InternImageImageProcessor

    AutoImageProcessor.register(
        InternImageConfig, image_processor_classes={"pil": InternImageImageProcessor}, exist_ok=True
    )


# What to do once a module of transformers is there. The order matters: a model is registered under its configuration.
_pending = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.image_processing_auto": _register_image_processor,
}
_lock = threading.Lock()


def _register_loaded() -> None:
    while loaded := [module for module in _pending if module in sys.modules]:
        # Not waiting: who holds the lock may be this thread (registering imports modules, whose end comes back here) or
        # one that needs an import lock of ours. Its holder looks at the list again once it has let go.
        if not _lock.acquire(blocking=False):
            return
        try:
            if loaded[0] in _pending:
                _pending[loaded[0]]()
                del _pending[loaded[0]]
        finally:
            _lock.release()
    if not _pending and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Leaves finding and loading to the others, and calls `_register_loaded` when a thread's outermost import of one of
    `_PACKAGES` has ended."""

    def __init__(self):
        self._thread = threading.local()

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in _PACKAGES:
            return None
        spec = None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    break
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            depth = getattr(self._thread, "depth", 0)
            self._thread.depth = depth + 1
            try:
                execute(module)
            finally:
                self._thread.depth = depth
            if depth == 0:
                _register_loaded()

        spec.loader.exec_module = exec_module
        return spec


_finder = _RegisterAfterImport()


def register_auto_classes() -> None:
    """Registers with AutoConfig, AutoModel, AutoModelForImageClassification, AutoBackbone and AutoImageProcessor.

    Those that are loaded are served now, the others as soon as they are. May be called more than once.
    """
    if _pending and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _register_loaded()
