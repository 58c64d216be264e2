"""Runs a program under accelerate's FSDP on CPUs: `accelerate launch --config_file fsdp2.yaml fsdp_on_cpu.py PROGRAM ...`.

PyTorch's FSDP2 works on CPUs, by gloo. accelerate passes its configuration on for accelerators only, and would quietly use
DDP; this does for the CPU what `AcceleratorState` does for a GPU, and nothing else.
"""

import os
import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


_initialise = AcceleratorState.__init__


def _initialise_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = _initialise_with_fsdp
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
