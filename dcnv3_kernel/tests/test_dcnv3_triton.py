"""Tests of the Triton variant without a GPU: the interpreter's results, compilation for GPUs, the choice of launch shapes.

Triton decides at import whether it interprets, so tests of the interpreter start another process.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_dcnv3_kernel import BAD_INPUT, _slow_ones_are_for_us, bad_call, built, load_variant  # noqa: F401 (a fixture)


pytestmark = pytest.mark.kernels_ci
triton = pytest.importorskip("triton", reason="Triton is not installed")

TESTS = Path(__file__).parent
INTERPRETER = {
    **os.environ,
    "TRITON_INTERPRET": "1",
    "PYTHONWARNINGS": "ignore",
}  # NumPy warns about numbers that are not finite


# The interpreter of Triton 3.6 fails with NumPy 2.4, which no longer converts arrays with one element to Python numbers.
interpreted = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7), reason="the interpreter of this Triton is too old"
)


@pytest.fixture(scope="module")
def folder():
    if (folder := built("torch-cuda")) is None:
        pytest.skip("no triton variant was built: run dcnv3_kernel/build.py --backend triton")
    return folder


@pytest.fixture(scope="module")
def kernels(folder):
    """The module that plans and launches the kernels."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the kernels are interpreted in this process")
    return sys.modules[load_variant(folder).__name__ + ".triton_launch"]


# ------------------------------------------------------------------------------------------------------ interpreted


def run_tests_of_all_backends(selection: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"triton and ({selection})"]
    result = subprocess.run(
        [*command, str(TESTS / "test_dcnv3_kernel.py")], capture_output=True, text=True, env=INTERPRETER
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip().splitlines()[-1]


@interpreted
def test_the_tests_of_all_backends_that_take_seconds_pass(folder):
    summary = run_tests_of_all_backends(
        "(official and dtype1) or (16_bit_tensors and 16-dtype0) or (infinite and 16) or not_finite or tiny or bad_input"
        " or double_backward or autocast"
    )
    assert int(summary.split()[0]) >= 22 and "passed" in summary and "skipped" not in summary, summary


@interpreted
@pytest.mark.slow
def test_the_tests_of_all_backends_pass(folder):
    """Takes more than half an hour."""
    summary = run_tests_of_all_backends("not cuda and not test_random_shapes")
    assert re.match(r"\d{2} passed", summary), summary


@interpreted
def test_tiles_steps_and_64_bit_numbers_equal_the_definition(folder):
    """Tiles that do not divide the image, several steps in each tile, and the general kernels, as on a GPU."""
    program = f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        from test_dcnv3_kernel import *
        kernel = load_variant(Path({str(folder)!r}))
        launch = sys.modules[kernel.__name__ + ".triton_launch"]
        torch.manual_seed(0)
        cases = [
            # tile's largest log2, units, 64-bit from, groups, group channels, options
            (1, 8, 2**31, 3, 4, {{}}),
            (2, 32, 0, 2, 80, {{"remove_center": True, "offset_scale": 1.3}}),
            (1, 4, 2**31, 3, 3, {{"kernel_size": (1, 2), "padding": 0}}),
            (2, 32, 0, 1, 128, {{"kernel_size": (1, 2), "padding": 0}}),
        ]
        for case, (tile, units, wide, groups, channels, options) in enumerate(cases):
            launch._LARGEST_TILE_LOG2, launch._INTERPRETED_UNITS = tile, units
            launch._WIDE_FROM = wide
            launch._plan.cache_clear()
            launch._tiles.cache_clear()
            kernel_size = options.get("kernel_size", (3, 3))
            points = groups * (kernel_size[0] * kernel_size[1] - options.get("remove_center", False))
            width = 4 - (kernel_size[1] - 1 if "padding" in options else 0)
            tensors = [
                torch.randn(1, 3, 4, groups * channels, dtype=torch.float64),
                torch.randn(1, 3, width, 2 * points, dtype=torch.float64),
                torch.randn(1, 3, width, points, dtype=torch.float64),
            ]
            options["groups"] = groups
            for softmax in (True, False)[: 1 if case == 1 else 2]:
                expected = run_and_differentiate(definition, tensors, {{**options, "softmax": softmax}})
                function = kernel.dcnv3_softmax if softmax else kernel.dcnv3
                torch.use_deterministic_algorithms(softmax)
                actual = run_and_differentiate(function, tensors, options)
                errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
                assert max(errors) < 1e-11, (options, softmax, errors)
                if softmax and not case:
                    again = run_and_differentiate(function, tensors, options)
                    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
        print("right")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=INTERPRETER
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "right\n"


# --------------------------------------------------------------------------------------------------------- compiled

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}


def compile_kernel(kernels, kernel, target, dtype, group_channels, *, size=56, fixed=False, softmax=True, **options):
    """Compiles a kernel as a launch for images of `size` would, without a GPU. Returns Triton's compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"kernel_size": 3, "groups": 4, "points": 9, **options}
    plan = kernels._plan(
        8, size, size, options["groups"] * group_channels, size, size, dtype, options["kernel_size"], options["kernel_size"],
        1, 1, options["kernel_size"] // 2, options["kernel_size"] // 2, 1, 1, options["groups"], 1.0, options["points"] == 8,
        softmax, options["groups"] * options["points"] * 2, options["groups"] * options["points"],
    )  # fmt: skip
    backward = kernel is kernels.backward_kernel
    warps, warp_size = kernels._CONFIGS[0][1], TARGETS[target][2]
    units = max(1, warps * warp_size // kernels._lanes(kernel, plan))
    constants = {**dict(plan.constants), "UNITS": units}
    if backward:
        constants.update(WHOLE=group_channels <= constants["CHANNELS"], FIXED=fixed)
    sums = TYPES[kernels._COMPUTE[dtype]]
    special = {"grad_input": "*i64" if fixed else f"*{sums}", "not_finite": "*i8", "fixed_exponent": "*i64"}
    numbers = dict.fromkeys(sys.modules[kernel.fn.__module__].NUMBERS, "i32")
    if sums == "fp64":
        numbers["offset_scale"] = "i64"
    signature = {
        name: "constexpr" if name in constants else numbers.get(name) or special.get(name) or f"*{TYPES[dtype]}"
        for name in kernel.arg_names
    }
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    launch = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launch)


def spilled(compiled, target, tmp_path) -> int:
    """The bytes of memory that one thread needs for spilled registers.

    AMD's scalar registers hold masks and spill to lanes of vector registers. This takes no memory and is not counted.
    """
    if target.startswith("gfx"):
        (scratch,) = re.findall(r"ScratchSize: (\d+)", compiled.asm["amdgcn"])
        return int(scratch)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton has no cuobjdump")
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True)
    (stack,) = re.findall(r"STACK:(\d+)", usage.stdout)
    return int(stack)


@pytest.fixture
def compiler_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


FULL = [
    (target, dtype, width)
    for target in TARGETS
    for dtype in (torch.bfloat16, torch.float32)
    for width in (16, 32)
    if (target, dtype, width) != ("sm_90", torch.bfloat16, 16)
]


@pytest.mark.parametrize(
    "target, dtype, group_channels",
    [("sm_90", torch.bfloat16, 16), *(pytest.param(*case, marks=pytest.mark.slow) for case in FULL)],
)
def test_compiles_without_a_gpu(kernels, compiler_cache, tmp_path, target, dtype, group_channels):
    """No register spills, one load of 16 bytes for each corner, no exchange between threads in the forward pass."""
    forward = compile_kernel(kernels, kernels.forward_kernel, target, dtype, group_channels)
    assert spilled(forward, target, tmp_path) == 0
    backward = compile_kernel(kernels, kernels.backward_kernel, target, dtype, group_channels)
    assert spilled(backward, target, tmp_path) == 0
    if target.startswith("sm"):
        assert forward.asm["ptx"].count("ld.global.v4") == 4 * 9 and "bar.sync" not in forward.asm["ptx"]
    if target == "sm_90":  # it has vectorised atomics
        assert len(re.findall(r"(?:red|atom)\.global\.gpu\.relaxed\.add\.v4\.f32", backward.asm["ptx"])) == 4 * 9


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "dtype, group_channels, options",
    [
        (torch.float16, 16, {"points": 8, "fixed": True}),
        (torch.float64, 16, {"softmax": False}),
        (torch.float32, 5, {"groups": 3}),
        (torch.float32, 80, {"kernel_size": 5, "points": 25, "fixed": True}),
        (torch.bfloat16, 2048, {"groups": 1, "size": 1100}),  # 64-bit element indices
    ],
)
def test_the_other_kernels_compile_too(kernels, compiler_cache, target, dtype, group_channels, options):
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        chosen = options if kernel is kernels.backward_kernel else {k: v for k, v in options.items() if k != "fixed"}
        assert compile_kernel(kernels, kernel, target, dtype, group_channels, **chosen).asm


# --------------------------------------------------------------------------------------------- choice of launch shapes


def plan_of(kernels, size=(2, 56, 56, 64), dtype=torch.bfloat16, groups=4):
    options = (3, 3, 1, 1, 1, 1, 1, 1, groups, 1.0, False, True, 18 * groups, 9 * groups)
    return kernels._plan(*size, *size[1:3], dtype, *options)


def test_the_fastest_configuration_is_measured_once(kernels, monkeypatch):
    """Once for each dtype and group width, not for each batch or image size. A config that the device cannot run is skipped."""
    launched, milliseconds = [], {(1, 2): 3.0, (1, 4): 2.0, (2, 4): 5.0}

    def launch(kernel, plan, device, config, tensors, **constants):
        if config == (1, 8):
            raise triton.runtime.errors.OutOfResources(300, 256, "registers")
        launched.append((kernel, config))

    def do_bench(run, **_):
        run()
        return milliseconds[launched[-1][1]]

    monkeypatch.setattr(kernels, "_launch", launch)
    monkeypatch.setattr(kernels, "do_bench", do_bench)
    monkeypatch.setattr(kernels, "_tuned", {})
    before = torch.get_rng_state()
    for size in ((2, 56, 56, 64), (9, 14, 20, 64), (1, 7, 7, 16 * 32)):
        for kernel in (kernels.forward_kernel, kernels.backward_kernel):
            plan = plan_of(kernels, size, groups=size[3] // 16)
            assert kernels._config(kernel, plan, torch.empty(0, dtype=torch.bfloat16)) == (1, 4)
    assert len(kernels._tuned) == 2
    assert torch.equal(before, torch.get_rng_state()), "the user's random numbers"

    del launched[:]
    for width, groups in ((5, 2), (48, 2), (3, 1)):  # unusual widths are not measured
        plan = plan_of(kernels, (1, 8, 8, width * groups), groups=groups)
        assert kernels._config(kernels.forward_kernel, plan, torch.empty(0, dtype=torch.bfloat16)) == (1, 2)
    assert not launched
    monkeypatch.setitem(milliseconds, (1, 4), 4.0)
    plan = plan_of(kernels, (1, 8, 8, 64), groups=2)
    assert kernels._config(kernels.forward_kernel, plan, torch.empty(0, dtype=torch.bfloat16)) == (1, 2)


def test_nothing_is_measured_where_nothing_can_run(kernels, monkeypatch):
    def launch(*_, **__):
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(kernels, "_launch", launch)
    monkeypatch.setattr(kernels, "do_bench", lambda run, **_: run())
    monkeypatch.setattr(kernels, "_tuned", {})
    config = kernels._config(kernels.backward_kernel, plan_of(kernels), torch.empty(0, dtype=torch.bfloat16))
    assert config == kernels._CONFIGS[0]


def test_nothing_is_measured_while_a_graph_is_captured(kernels, monkeypatch):
    monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: True, raising=False)
    monkeypatch.setattr(kernels, "_measured_config", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(kernels, "_tuned", {})
    config = kernels._config(kernels.forward_kernel, plan_of(kernels), torch.empty(0, dtype=torch.bfloat16))
    assert config == kernels._CONFIGS[0] and not kernels._tuned


@pytest.mark.parametrize("batch, height, width", [(1, 1, 1), (1, 7, 7), (3, 56, 57), (64, 28, 28), (1, 1, 999)])
@pytest.mark.parametrize("groups, units", [(1, 64), (4, 64), (40, 8), (7, 1)])
def test_tiles_cover_the_image(kernels, batch, height, width, groups, units):
    for multiprocessors in (1, 132):
        tiles, tiles_x, tiles_y, width_log2, height_log2 = kernels._tiles(
            batch, height, width, groups, units, multiprocessors
        )
        assert tiles == batch * tiles_x * tiles_y
        assert 0 <= (tiles_x << width_log2) - width < 1 << width_log2
        assert 0 <= (tiles_y << height_log2) - height < 1 << height_log2
        assert groups << (width_log2 + height_log2) <= max(4 * units, groups)


def test_more_than_2_31_elements_have_64_bit_numbers(kernels):
    for size, wide in (((1, 1100, 1024, 2048), True), ((5000, 32, 32, 2048), False), ((1, 11000, 11000, 16), True)):
        assert dict(plan_of(kernels, size, groups=1).constants)["WIDE"] == wide


@pytest.mark.parametrize("group_channels", [1, 2, 3, 12, 16, 24, 48, 64, 65, 80, 96, 128, 192, 2048])
def test_channels_of_a_group_are_all_there(kernels, group_channels):
    plan = plan_of(kernels, (1, 4, 4, 2 * group_channels), groups=2)
    constants = dict(plan.constants)
    # if equal, the kernels take it for the number of channels, otherwise for a divisor of it
    if constants["MULTIPLE"] == constants["CHANNELS"]:
        assert constants["CHANNELS"] == group_channels
    else:
        assert plan.numbers[0] * constants["MULTIPLE"] == group_channels


def test_sizes_that_no_kernel_has_numbers_for(kernels):
    with pytest.raises(RuntimeError, match=r"above 2\^29"):
        plan_of(kernels, (1, 1, 2**30, 1), groups=1)


# ----------------------------------------------------------------------------------------------------------- interface


def test_the_checks_are_those_of_the_compiled_kernels(kernels):
    """The messages are equal."""
    if (cpu := built("torch-stable-abi*-cpu-*")) is None:
        pytest.skip("no cpu variant was built: run dcnv3_kernel/build.py")
    compiled, ours = load_variant(cpu), load_variant(built("torch-cuda"))
    words = re.compile(r"dcnv3: [^\n]*")
    for change, _ in BAD_INPUT:
        said = []
        for kernel, device in ((compiled, "cpu"), (ours, "meta")):
            with pytest.raises(RuntimeError) as error:
                bad_call(kernel.dcnv3, change, device)
            said.append(words.search(str(error.value))[0])
        assert said[0] == said[1], change
    for name in ("dcnv3_forward", "dcnv3_backward"):
        schemas = [str(getattr(module.ops, name).default._schema).split("::")[1] for module in (ours, compiled)]
        assert schemas[0] == schemas[1]


def test_compiled_variants_have_nothing_of_triton():
    if (cpu := built("torch-stable-abi*-cpu-*")) is None:
        pytest.skip("no cpu variant was built: run dcnv3_kernel/build.py")
    assert not any("triton" in file.name or b"triton" in file.read_bytes() for file in cpu.glob("*.py"))
    program = f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        from test_dcnv3_kernel import *
        kernel = load_variant(Path({str(cpu)!r}))
        run_and_differentiate(kernel.dcnv3_softmax, [torch.randn(1, 4, 4, c) for c in (16, 18, 9)], {{"groups": 1}})
        print([name for name in sys.modules if name.endswith(("triton_kernels", "triton_launch"))])
    """
    assert subprocess.check_output([sys.executable, "-c", textwrap.dedent(program)], text=True) == "[]\n"
