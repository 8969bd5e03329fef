"""Every shipped Triton kernel compiles for each architecture and uses it well; the checks can fail."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.cram_kernels.aot import Compiled, _leaves, compiled, table, violations
from tests.cram_kernels.aot_code import read_ptx

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (Linux)")

ARCHITECTURES = (80, 86, 90, 100, 120)
KERNELS = {
    "_shrink",
    "_routed_shrink",
    "_fold",
    "_expand",
    "_stream",
    "_join",
    "_gram",
    "_reduce_planes",
    "_segment_sums",
    "_expert_sums",
    "_gates",
    "_centroid_gradient",
    "_query_gradient",
}


def check(arch: int, *, full: bool) -> None:
    kernels = compiled("tests.cram_kernels.aot_cases:shipped", arch, full=full)
    # Few architectures compile the cases with dropout.
    assert {kernel.kernel for kernel in kernels} - {"_dropout_bits"} == KERNELS
    assert arch != 90 or "_dropout_bits" in {kernel.kernel for kernel in kernels}
    # Decode runs SHRINK in front of a dependent EXPAND where the hardware can.
    pairs = [
        {kernel.kernel for kernel in kernels if getattr(kernel, side)} for side in ("front", "dependent")
    ]
    dependent = [{"_shrink", "_routed_shrink", "_stream"}, {"_expand", "_join"}]
    assert pairs == (dependent if arch >= 90 else [set(), set()])
    wrong = [kernel for kernel in kernels if violations(kernel)]
    assert not wrong, "\n" + table(wrong)


# One architecture takes about a minute; the H200's is always compiled.
DEFAULT = 90


@pytest.mark.parametrize(
    "arch",
    [arch if arch == DEFAULT else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES],
)
def test_shipped_kernels_compile(arch: int) -> None:
    check(arch, full=False)


def test_calls_that_differ_by_the_request_share_kernels() -> None:
    kernels = compiled("tests.cram_kernels.aot_cases:alike", 90)
    assert not [kernel.error for kernel in kernels if kernel.error]
    seen: dict[str, list[str]] = {}
    for kernel in kernels:
        tensors = [kind for kind in _leaves(kernel.signature) if kind.startswith("*")]
        seen.setdefault(f"{kernel.kernel} {kernel.constants} {len(tensors)}", []).append(kernel.label)
    assert all(len(labels) == 1 for labels in seen.values()), seen


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_sizes_compile(arch: int) -> None:
    check(arch, full=True)


@pytest.fixture(scope="module")
def sound() -> dict[str, Compiled]:
    """Sound toys for sm_90 by label; of the pair, the dependent one."""
    kernels = compiled("tests.cram_kernels.aot_toys:sound", 90)
    assert not any(map(violations, kernels)), table(kernels)
    return {kernel.label: kernel for kernel in kernels}


def test_signature_is_the_one_of_the_jit(sound: dict[str, Compiled]) -> None:
    assert sound["half"].signature == {
        "x": "*bf16:16",
        "w": "*bf16:16",
        "y": "*bf16:16",
        "tokens": "i32",  # 512, but do_not_specialize
        "width": "i32:16",
        "stride": "i32:16",
        "offsets": ["i32:16", "i32"],  # (0, 7)
    }
    assert sound["odd"].signature == {
        "x": "*bf16",  # one element into its storage
        "w": "*bf16:16",
        "y": "*bf16:16",
        "tokens": "i32",  # 1, but do_not_specialize
        "width": "i32:16",
        "stride": "i32",  # 100
        "offsets": ["constexpr", "i32:16"],  # (1, 16)
    }
    assert sound["half"].half and not sound["scalar"].half


def test_equal_kernels_compile_once_and_empty_launches_not_at_all(sound: dict[str, Compiled]) -> None:
    assert sound.keys() == {"half", "scalar", "odd", "pair"}


def test_dependent_launch_compiles_as_one(sound: dict[str, Compiled]) -> None:
    assert sound["pair"].dependent and sound["pair"].waits and not sound["pair"].signals


@pytest.mark.parametrize("arch", [80, 90])
def test_checks_can_fail(arch: int) -> None:
    kernels = compiled("tests.cram_kernels.aot_toys:unsound", arch)
    caught = [k for k in kernels if any(k.label.split(",")[0] in what for what in violations(k))]
    # One of the two launches of the pair is sound.
    silent = [kernel.label for kernel in kernels if kernel not in caught]
    assert silent == ["must release iff"] * (arch == 90), table(kernels)
    assert len(caught) == {80: 2, 90: 17}[arch]


PTX = """
	.local .align 8 .b8 	__local_depot0[16];
	// begin inline asm
	@%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@%p1 ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
	ld.global.v2.b64 { %rd3, %rd4 }, [ %rd5 + 0 ];
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10, %r6;
	cp.async.ca.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x4, %r6;
	cp.async.wait_group 0x2;
	cp.async.wait_group 0x0;
	mul.lo.s32 %r9, %r8, 2146121005;
	griddepcontrol.launch_dependents; // dummy %r7
"""


def test_ptx_is_read() -> None:
    assert read_ptx(PTX) == {
        "mma": [],
        "loads": {"2": 1, "4": 1, "16": 3},
        "local": True,
        "loops_ahead": 1,
        "hashes": True,
        "waits": False,
        "signals": True,
    }


def test_local_memory_and_registers_are_violations() -> None:
    kernel = Compiled(
        "", "", 90, 4, 1, {}, False, False, False, [], False, local=True, registers=255, stack=8
    )
    assert violations(kernel) == [
        "registers must not spill, got 255 and a stack of 8 bytes",
        "local memory must not be used",
    ]
