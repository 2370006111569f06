"""Where the time of a step goes, as kernels and gaps between them, and what of the driver's readings is told."""

from __future__ import annotations

import pkgutil
import time
from pathlib import Path

import pytest
from benchmarks.gpu.device import Readings, Span, spread, used_bytes
from benchmarks.gpu.profile import BETWEEN, GROUPS, OTHER, group_of, kernel_groups, shares

import quire_kernels.triton

NO_KERNELS = {"attention_cuts", "bytes", "coded", "launch", "tanh", "timing"}
"""Files whose functions are parts of other kernels, if they are for the device at all."""


def test_every_file_of_kernels_has_a_group() -> None:
    files = {file.name for file in pkgutil.iter_modules(quire_kernels.triton.__path__)}
    assert files == GROUPS.keys() | NO_KERNELS


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("_decode", "attention"),
        ("_few_rows", "products"),
        ("_product", "products"),
        ("_grouped", "products"),
        ("_rms_norm", "norms, gate, rotary"),
        ("_survey", "draw"),
        ("_prepare_items", "addresses"),
        ("nvjet_sm90_tst_128x8_64x12_4x1_v_bz_TNT", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "products"),
        ("Memcpy DtoH (Device -> Pinned)", OTHER),
    ],
)
def test_a_kernel_is_known_by_its_name(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_no_group_knows_what_is_no_kernel() -> None:
    assert "_decode" in kernel_groups()
    assert not {"StepAttention", "Chip", "triton", "tl"} & kernel_groups().keys()


def test_an_instant_belongs_to_the_kernel_that_began_first() -> None:
    spans = [
        Span("_rms_norm", 10, 14),
        Span("_few_rows", 12, 20),
        Span("_decode", 25, 30),
        Span("_few_rows", 26, 28),
    ]
    groups, kernels = shares(spans)
    assert groups == {"norms, gate, rotary": 4, "products": 6, "attention": 5, BETWEEN: 5}
    assert sum(groups.values()) == 30 - 10
    assert kernels == {"_rms_norm": (4, 1), "_few_rows": (6, 2), "_decode": (5, 1)}


def test_a_figure_has_its_median_and_its_ends() -> None:
    assert spread("ms", [3.0, 1.0, 2.04]) == {"ms": 2.0, "ms_min": 1.0, "ms_max": 3.0}


def smi(folder: Path, text: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def test_clocks_are_those_of_the_time_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    smi(tmp_path, 'echo "345, 2619, [N/A], 30"; sleep 0.3; echo "1980, 2619, 640.5, 61"; exec sleep 30')
    before = time.perf_counter()
    readings = Readings()
    try:
        until = time.monotonic() + 20
        while readings.since(before).get("watts") is None and time.monotonic() < until:
            time.sleep(0.01)
        assert readings.since(before) == {"sm_mhz": 1162.5, "memory_mhz": 2619, "watts": 640.5, "celsius": 45.5}
        # nothing was read since: what was read last is told
        assert readings.since(time.perf_counter())["sm_mhz"] == 1980
    finally:
        readings.close()


def test_memory_in_use_is_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    smi(tmp_path, "echo 1234")
    assert used_bytes() == 1234 << 20
    smi(tmp_path, "echo 'No devices were found'; exit 6")
    assert used_bytes() is None
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert used_bytes() is None
    assert Readings().since(0.0) == {}
