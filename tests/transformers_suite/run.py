"""transformers' own common model tests on this package's classes, with ConvNextV2 and Deformable DETR as the controls.

    python tests/transformers_suite/run.py [--quick] [-k EXPRESSION] [--record-control]

In comes the sdist of the installed transformers, which carries its tests; out goes a table of what ConvNextV2 passes and
InternImage does not, and what Deformable DETR passes and DINO does not. Status 0 only if every variant passes what its control
passes, and fails nothing.

The sdist lacks `tests/models`, `tests/pipelines` and some helpers: `overlay/` has what takes their place, and modules that are
imported for a name alone become stubs. The control's results are kept in `control/VERSION.json`; `--record-control` runs it
anew. `--quick` leaves out export, compile and one slow dtype test, two thirds of the time.
"""

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

import transformers


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VARIANTS = ("PreNorm", "PostNorm", "ResPostNorm", "DCNv4")
MODULES = {
    "control": (
        "tests/models/convnextv2/test_modeling_convnextv2.py",
        "tests/models/deformable_detr/test_modeling_deformable_detr.py",
    ),
    "ours": (
        "tests/models/internimage/test_modeling_internimage.py",
        "tests/models/internimage_dino/test_modeling_internimage_dino.py",
        "tests/models/internimage_rcnn/test_modeling_internimage_rcnn.py",
    ),
}
# The test classes of each control's counterparts.
COUNTERPARTS = {
    "ConvNextV2ModelTest": [f"InternImage{variant}ModelTest" for variant in VARIANTS],
    "ConvNextV2BackboneTest": [f"InternImage{variant}BackboneTest" for variant in VARIANTS],
    "DeformableDetrTest": ["InternImageDinoTest"],
    "": ["InternImageRcnnTest"],  # without a control: whatever is run must pass
}
# Of names that transformers gave parameters of Deformable DETR in later versions.
NOT_APPLICABLE = {"DeformableDetrTest": {"test_can_load_from_already_mapped_keys", "test_reverse_loading_mapping"}}
SLOW = "torch_export or torch_compile or bc_torch_dtype"


class NoSdist(Exception):
    """The tests of the installed transformers cannot be had here."""


def sdist(folder: Path) -> Path:
    """The sdist of the installed transformers, from the package index; `TRANSFORMERS_SDIST` names a file instead.

    Raises:
        NoSdist: if pip cannot download it; the message has pip's last line.
    """
    if file := os.environ.get("TRANSFORMERS_SDIST"):
        return Path(file)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"transformers-{transformers.__version__}.tar.gz"
    if not file.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            done = subprocess.run(
                [
                    sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers",
                    f"transformers=={transformers.__version__}", "-d", partial,
                ],
                capture_output=True,
                text=True,
                check=False,
            )  # fmt: skip
            if not (Path(partial) / file.name).is_file():
                raise NoSdist(
                    f"pip has no sdist of transformers {transformers.__version__}: {done.stderr.strip()[-200:]}"
                )
            os.replace(Path(partial) / file.name, file)
    return file


def lay_out(archive: Path, root: Path) -> None:
    """A folder that looks like a checkout of transformers: the sdist's tests, and ours beside them."""
    prefix = f"transformers-{transformers.__version__}/tests/"
    with tarfile.open(archive) as files:
        for member in files:
            if member.isfile() and member.name.startswith(prefix):
                target = root / "tests" / member.name.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(files.extractfile(member).read())
    shutil.copytree(HERE / "overlay", root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    _stub_missing_modules(root / "tests")
    for folder in [root / "tests", *(path for path in (root / "tests").rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()
    for folder in ("src", "tmp", "tiny/reports"):
        (root / folder).mkdir(parents=True)
    (root / "src" / "transformers").symlink_to(transformers.__path__[0], target_is_directory=True)
    (root / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    # PipelineTesterMixin reads here which tiny models there are; the tests make their folders.
    tiny = {
        f"{model}{head}": {"tokenizer_classes": [], "processor_classes": ["CLIPImageProcessor"], "model_classes": []}
        for model in ("ConvNextV2", "InternImage")
        for head in ("Model", "ForImageClassification", "Backbone")
    }
    (root / "tiny" / "reports" / "tiny_model_summary.json").write_text(json.dumps(tiny))


def _stub_missing_modules(tests: Path) -> None:
    """Gives each module that the tests import and the sdist lacks a stub with the names that are imported."""
    stubs, seen = defaultdict(set), set()
    todo = ["test_modeling_common", "test_backbone_common", "test_configuration_common", "test_pipeline_mixin"]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((tests / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                if (tests / f"{node.module.replace('.', '/')}.py").exists():
                    todo.append(node.module)
                else:
                    stubs[node.module].update(alias.name for alias in node.names)
    for module, names in stubs.items():
        file = tests / f"{module.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n\n".join(f'class {name}:\n    """A stub: not in the sdist."""' for name in sorted(names)))


def run(root: Path, which: str, expression: str, workers: int) -> dict[str, dict[str, tuple[str, str]]]:
    """Runs one test module; returns status and detail by test class and test.

    Raises:
        RuntimeError: if pytest could not collect or run the tests.
    """
    results = root / f"{which}.jsonl"
    command = [sys.executable, "-m", "pytest", *MODULES[which], "-q", "-rN", "--tb=short"]
    command += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else ["-p", "no:xdist"]
    command += ["-k", expression] if expression else []
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("TRANSFORMERS_VERBOSITY", "PYTEST_ADDOPTS")},
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(root / "hf"), "TMPDIR": str(root / "tmp"),
        "TRANSFORMERS_TINY_MODEL_PATH": str(root / "tiny"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(ROOT), "SUITE_RESULTS": str(results),
    }  # fmt: skip
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not results.is_file():
        raise RuntimeError(f"pytest ended with status {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    reports = defaultdict(list)
    for line in map(json.loads, results.read_text().splitlines()):
        if line["when"] == "collect":
            raise RuntimeError(f"{line['nodeid']} cannot be collected:\n{line['detail'][-4000:]}")
        _, test_class, name = line["nodeid"].split("::")
        reports[test_class, name].append(line)
    table: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for (test_class, name), lines in reports.items():
        # the worst of a test and its subtests counts
        worst = min(lines, key=lambda line: ("failed", "skipped", "passed").index(line["outcome"]))
        table[test_class][name] = (worst["outcome"], " ".join(filter(None, [worst["subtest"], worst["detail"]])))
    return table


def compare(
    control: dict[str, dict[str, str]], ours: dict[str, dict[str, tuple[str, str]]], partly: bool
) -> list[str]:
    """What the control passes and a variant does not, what a variant fails, and what was not run; a line each.

    Args:
        partly: only some of the tests were chosen: those of the control that were not are passed over.
    """
    problems = []
    for control_class, counterparts in COUNTERPARTS.items():
        passed = {n for n, status in control.get(control_class, {}).items() if status == "passed"}
        passed -= NOT_APPLICABLE.get(control_class, set())
        for counterpart in counterparts:
            found = ours.get(counterpart, {})
            for name in sorted(passed | found.keys()):
                status, detail = found.get(name, ("not run", ""))
                if partly and status == "not run":
                    continue
                expected = name in passed or name.startswith("test_ours_")
                if status == "failed" or (expected and status != "passed"):
                    problems.append(f"{counterpart}::{name}: {status}: {' '.join(detail.split())[:300]}")
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without export, compile and one slow dtype test")
    parser.add_argument("-k", default="", help="pytest's -k")
    parser.add_argument("-n", type=int, default=2, help="pytest-xdist's workers")
    parser.add_argument("--record-control", action="store_true", help="run the control and keep its results")
    arguments = parser.parse_args(argv)
    expression = " and ".join(f"({e})" for e in (arguments.k, f"not ({SLOW})" if arguments.quick else "") if e)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "internimage-hf"
    try:
        archive = sdist(cache)
    except NoSdist as error:
        print(error)
        return 77  # what Automake calls a skipped test
    recorded = HERE / "control" / f"{transformers.__version__}.json"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        lay_out(archive, root)
        if arguments.record_control or not recorded.is_file():
            results = run(root, "control", "", arguments.n)
            control = {
                c: {name: status for name, (status, _) in sorted(t.items())} for c, t in sorted(results.items())
            }
            if arguments.record_control:
                recorded.parent.mkdir(exist_ok=True)
                recorded.write_text(json.dumps(control, indent=1) + "\n")
        else:
            control = json.loads(recorded.read_text())
        ours = run(root, "ours", expression, arguments.n)
    problems = compare(control, ours, partly=bool(expression))
    print("\n".join(problems))
    for name, tests in ours.items():
        statuses = [status for status, _ in tests.values()]
        print(f"{name}: " + ", ".join(f"{statuses.count(s)} {s}" for s in ("passed", "skipped", "failed")))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
