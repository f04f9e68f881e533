"""What hardware this is: names, classes, and what this computer says about itself."""

import os
import platform
import re
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from shared.errors import BadInput
from shared.wire import Name
from worker.machine import apple_chip, cuda_class, detect, short_slug, slug

without_gpu = pytest.mark.skipif(
    platform.system() != "Linux" or Path("/dev/nvidiactl").exists(), reason="needs Linux without an NVIDIA driver"
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m4max", "m4max"),
        ("Anna's MacBook Pro", "anna-s-macbook-pro"),
        ("gpu_node.12", "gpu-node-12"),
        ("--dashes--", "dashes"),
        ("Zoë", "zo"),
        ("a..b~c^d:e", "a-b-c-d-e"),
        ("", "machine"),
        ("☃", "machine"),
    ],
)
def test_a_machines_name_becomes_lower_case_letters_digits_and_dashes(name: str, expected: str) -> None:
    assert slug(name) == expected


@given(st.text())
@settings(deadline=None)
def test_any_name_becomes_one_that_fits_a_branch_and_stays_so(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug(name))
    assert slug(slug(name)) == slug(name)


@given(st.text(max_size=200), st.sampled_from(["", "-7", "-12"]))
@settings(deadline=None)
def test_any_hosts_name_becomes_one_that_a_coordinator_takes(name: str, end: str) -> None:
    short = short_slug(name, end)
    assert TypeAdapter(Name).validate_python(short) == short
    assert short.endswith(end)
    assert slug(name).startswith(short.removesuffix(end))


def test_a_name_that_a_person_chose_is_refused_rather_than_cut() -> None:
    assert detect("m" * 63).name == "m" * 63
    with pytest.raises(BadInput, match="has 64 characters, 63 are the most"):
        detect("M" * 64)


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX A6000", "rtxa6000"),
        ("Tesla T4", "teslat4"),
        ("Tesla V100-SXM2-16GB", "teslav100"),
        ("NVIDIA GeForce GTX 1080 Ti", "gtx1080ti"),
    ],
)
def test_a_gpus_class_is_its_model(gpu: str, expected: str) -> None:
    assert cuda_class(gpu) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("NVIDIA GeForce GTX 1080", "NVIDIA GeForce GTX 1080 Ti"),
        ("NVIDIA GeForce RTX 4080", "NVIDIA GeForce RTX 4080 SUPER"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090 Laptop GPU"),
        ("NVIDIA RTX A6000", "NVIDIA RTX 6000 Ada Generation"),
        ("Quadro RTX 6000", "Quadro P400"),
        ("NVIDIA TITAN V", "NVIDIA TITAN RTX"),
    ],
)
def test_models_whose_scores_do_not_compare_are_of_different_classes(one: str, other: str) -> None:
    assert cuda_class(one) != cuda_class(other)


@given(st.text(alphabet=st.characters(codec="ascii")))
@settings(deadline=None)
def test_a_gpu_of_any_name_has_a_class_that_is_a_plain_word(gpu: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", cuda_class(gpu))


@pytest.mark.parametrize(
    ("chip", "expected"),
    [
        ("Apple M1", "m1"),
        ("Apple M1 Pro", "m1pro"),
        ("Apple M2 Ultra", "m2ultra"),
        ("Apple M3 Max", "m3max"),
        ("Apple M4", "m4"),
        ("Apple M10 Max", "m10max"),
        ("Intel(R) Core(TM) i9-9880H CPU @ 2.30GHz", None),
        ("AMD EPYC 9654 96-Core Processor", None),
        ("", None),
    ],
)
def test_apples_chips_are_told_apart_and_others_are_none(chip: str, expected: str | None) -> None:
    assert apple_chip(chip) == expected


def test_this_computer_is_described_with_sensible_numbers() -> None:
    machine = detect("This Box")
    assert machine.name == "this-box"
    assert machine.os.startswith(platform.system())
    assert machine.chip
    assert machine.cores == os.cpu_count()
    assert machine.memory_gb == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.1)
    assert machine.backend in ("torch", "mlx")


def test_without_a_name_the_hosts_is_taken() -> None:
    assert detect().name == short_slug(platform.node().partition(".")[0])


def test_a_computer_is_of_class_cpu_unless_it_has_an_accelerator() -> None:
    machine = detect()
    if machine.accelerator is None:
        assert (machine.machine_class, machine.accelerator_memory_gb) == ("cpu", None)
    else:
        assert re.fullmatch(r"(cuda|mps|mlx)-[a-z0-9-]+", machine.machine_class)


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program of that name, the only one on PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@without_gpu
def test_where_nvml_is_missing_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA H100 80GB HBM3, 81559'; echo 'NVIDIA H100 80GB HBM3, 81559'")
    machine = detect()
    assert (machine.accelerator, machine.machine_class) == ("NVIDIA H100 80GB HBM3", "cuda-h100")
    assert machine.accelerator_memory_gb == pytest.approx(79.6, abs=0.1)


@without_gpu
@pytest.mark.parametrize("script", ["exit 9", "echo 'NVIDIA-SMI has failed'; exit 9", "exit 0"])
def test_an_nvidia_smi_that_knows_no_gpu_leaves_class_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    nvidia_smi(tmp_path, monkeypatch, script)
    assert detect().machine_class == "cpu"


@without_gpu
@pytest.mark.parametrize("script", ["echo 'NVIDIA GB10, [N/A]'", "echo 'NVIDIA GB10, [Not Supported]'"])
def test_a_gpu_that_shares_the_hosts_memory_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    """A DGX Spark has no memory of the GPU's own, and says so in words."""
    nvidia_smi(tmp_path, monkeypatch, script)
    machine = detect()
    assert (machine.machine_class, machine.accelerator_memory_gb) == ("cuda-gb10", None)
