"""What is read from a profile, on traces written by hand."""

import ast
import json
from pathlib import Path

import pytest

import dcache.kernels
from dcache.bench.activity import (
    DECODE,
    EXCEPT,
    FIRST_PASS,
    GROUPS,
    OTHER,
    OURS,
    SECOND_PASS,
    gaps,
    group_of,
    our_kernels,
    splits,
    steps_of,
)

KERNELS = sorted(Path(dcache.kernels.__path__[0]).glob("*.py"))


def event(category, name, begin, end):
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin, "pid": 0, "tid": 7, "args": {}}


def kernel(name, begin, end):
    return event("kernel", name, begin, end)


def mark(name, begin, end):
    return event("user_annotation", name, begin, end)


# Two steps of 1,000 and 2,000 us; the second has two passes.
TRACE = [
    {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
    mark(DECODE, 0, 3100),
    mark(FIRST_PASS, 100, 900),
    mark(FIRST_PASS, 1100, 1900),
    mark(SECOND_PASS, 2000, 3000),
    event("gpu_user_annotation", FIRST_PASS, 150, 850),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 200, 210),
    kernel("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", 230, 500),
    kernel("void at::native::reduce_kernel<512, 1>(...)", 500, 600),
    kernel("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", 640, 840),
    event("cuda_runtime", "cudaGraphLaunch", 190, 205),
    event("cuda_runtime", "cudaStreamSynchronize", 210, 890),
    kernel("ampere_sgemm_128x64_tn", 1200, 1800),
    kernel("void flash_fwd_splitkv_kernel<...>", 1700, 1850),  # beside the product, on another stream
    event("cuda_runtime", "cudaEventSynchronize", 1250, 1890),
    kernel("ampere_sgemm_128x64_tn", 2100, 2900),
    event("cuda_runtime", "cudaEventSynchronize", 2150, 2950),
    event("cuda_runtime", "cudaMemcpyAsync", 2950, 2955),
    event("cuda_runtime", "cudaDeviceSynchronize", 3200, 3300),  # after the last step
]


@pytest.fixture
def steps():
    return steps_of(json.loads(json.dumps({"traceEvents": TRACE[::-1]}))["traceEvents"])


def test_a_step_reaches_to_the_begin_of_the_next_one(steps):
    assert [(step.begin, step.end, len(step.passes)) for step in steps] == [(100, 1100, 1), (1100, 3100, 2)]


def test_device_time_is_told_apart_by_kind_of_kernel_and_the_rest_is_the_host(steps):
    one, two = splits(steps)
    assert (one.passes, one.steps, one.wall) == (1, 1, 1.0)
    assert {g: ms for g, ms in one.groups.items() if ms} == {"products": 0.47, "copies": 0.01, "rest": 0.1}
    assert one.host == pytest.approx(1.0 - 0.58)
    assert two.groups["products"] == pytest.approx(1.4)
    assert two.groups["attention"] == pytest.approx(0.15)
    assert two.host == pytest.approx(2.0 - 0.65 - 0.8)  # what overlaps counts once


def test_syncs_and_gaps_are_those_inside_steps_and_passes(steps):
    found = gaps(steps)
    assert (found.steps, found.second_passes, found.syncs, found.most_syncs) == (2, 1, 1.5, 2)
    assert found.largest_gap_us == 40
    idle = (230 - 100) + (1100 - 840) + (1200 - 1100) + (2100 - 1850) + (3100 - 2900)
    assert found.idle_between == pytest.approx(idle / 3000, abs=1e-5)


def test_a_trace_without_marks_has_no_steps():
    found = steps_of([kernel("nvjet", 0, 1)])
    assert found == []
    assert gaps(found) is None
    assert splits(found) == []


def test_work_before_the_upload_and_the_late_start_behind_it_are_no_gap_inside_a_pass():
    work = [
        kernel("void at::native::bitwise_and(...)", 10, 12),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 15, 16),
        kernel("nvjet", 1010, 1500),
        kernel("nvjet", 1505, 1600),
    ]
    (step,) = steps_of([mark(FIRST_PASS, 0, 1700), mark(DECODE, 0, 2000), *work])
    assert gaps([step]).largest_gap_us == 5
    assert gaps([step]).idle_between == pytest.approx((1010 + 400) / 2000)


def test_a_pass_without_device_work_is_idle_throughout():
    (step,) = steps_of([mark(FIRST_PASS, 0, 10), mark(DECODE, 0, 20)])
    assert gaps([step]).idle_between == 1


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64_8x5_tn_align1>(...)", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, ...>(...)", "products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16, ...>(...)", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, ...>>(...)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("fmha_cutlassF_f32_aligned_64x128_rf_sm80(...)", "attention"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)", "copies"),
        ("void at::native::vectorized_gather_kernel<16, long>(...)", "copies"),
        ("Memset (Device)", "copies"),
        ("void at::native::elementwise_kernel_with_index<int, at::native::arange_cuda_out(...)", OTHER),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(...)", OTHER),
    ],
)
def test_kernels_of_libraries_are_recognised(name, group):
    assert group_of(name) == group


def jitted(file):
    """Names of the jitted functions of a source file that are launched, as in ``kernel[grid](...)``."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list)
    }
    launched = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }
    return found & launched


def test_every_kernel_of_our_own_belongs_to_the_group_of_its_file():
    wrong = [
        f"{file.name}: {name} is {group_of(name)}"
        for file in KERNELS
        for name in jitted(file)
        if group_of(name) != EXCEPT.get(name, OURS.get(file.stem))
    ]
    assert wrong == []


def test_exceptions_and_groups_name_what_there_is():
    assert set(OURS.values()) | set(EXCEPT.values()) <= set(GROUPS)
    assert EXCEPT.keys() <= our_kernels().keys()
    assert set(OURS) <= {file.stem for file in KERNELS}
