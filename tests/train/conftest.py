"""Training tests share one cache of corpora and one of compiled programs."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import pytest

import train.data
from configs import tiny
from train.config import Config, MeshConfig
from train.loop import train as run_training


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Folders outside the checkout for token files and compiled programs; subprocesses and pytest's workers share the
    latter."""
    folder, base = tmp_path_factory.mktemp("caches"), tmp_path_factory.getbasetemp()
    programs = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    settings = {"jax_compilation_cache_dir": str(programs), "jax_persistent_cache_min_compile_time_secs": 0.0}
    old = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data, "_CACHE", folder / "corpora")
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        yield
    for name, value in old.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax multiplies int32 counts into float32, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def config() -> Config:
    """The tiny preset on one device."""
    return dataclasses.replace(tiny.config, mesh=MeshConfig(data=1))


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every update in a run's metrics, exactly as written."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, caches) -> Path:
    """Folder of the tiny preset's run, trained to its end without a break."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with jax.numpy_dtype_promotion("standard"):
        assert run_training(dataclasses.replace(tiny.config, mesh=MeshConfig(data=1), profile=3), folder, "tiny") == 0
    return folder
