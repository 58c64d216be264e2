"""Replaces the conftest.py that the sdist lacks: markers, settings, and one JSON line per test report."""

import json
import os

import torch
import transformers.testing_utils


os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
# Guards the image-feature-extraction pipeline tests, which make no use of timm.
transformers.testing_utils.require_timm = lambda test_case: test_case

# torch keeps, from the first operation under a device context on, the set of functions that such a context redirects.
# `from_pretrained` puts another `torch.linspace` in place while it is under one: were it the first, a model that reads
# values of `torch.linspace` in its constructor would pass `test_can_be_initialized_on_meta` by the order of the tests.
with torch.device("meta"):
    torch.empty(0)

MARKERS = (
    "accelerate_tests",
    "aoti_export_test",
    "all_flash_attn_test",
    "executorch_export_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "generate",
    "is_pipeline_test",
    "is_staging_test",
    "onnx_export_test",
    "timeout",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: marker of transformers' own suite")


class Results:
    """One JSON line per report; subtest reports carry the subtest's name. Only the controlling process writes."""

    def __init__(self, path):
        self.path = path
        open(path, "w").close()

    def write(self, **line):
        with open(self.path, "a") as results:
            results.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(nodeid=report.nodeid, when="collect", outcome="failed", detail=str(report.longrepr))

    def pytest_runtest_logreport(self, report):
        context = getattr(report, "context", None)
        subtest = None
        if context is not None:
            subtest = " ".join(filter(None, [context.msg, *(f"{k}={v}" for k, v in context.kwargs.items())])) or "?"
        if report.passed and (subtest is not None or report.when != "call"):
            return
        detail = ""
        if report.skipped:
            detail = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            detail = crash.message if crash is not None else str(report.longrepr)
        self.write(
            nodeid=report.nodeid,
            when=report.when,
            outcome=report.outcome,
            subtest=subtest,
            seconds=round(report.duration, 3),
            detail=detail,
            trace=str(report.longrepr) if report.failed else "",
        )


def pytest_sessionstart(session):
    path = os.environ.get("SUITE_RESULTS")
    if path and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Results(path), "suite-results")
