"""Who serves an operation, and how that is overruled."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from blipfast import backends
from blipfast.kernels import table

ROOT = Path(__file__).parents[1]
HERE = torch.zeros(2, 8)


@pytest.fixture(autouse=True)
def operations(monkeypatch):
    """A registry with two operations of its own, and no environment."""
    monkeypatch.setattr(backends, "_registry", {})
    monkeypatch.setattr(backends, "_kinds", {})
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends.register("norm", triton=backends.triton_serves("norm"), torch=backends.always)
    backends.register(
        "look", flash_attn=lambda x: x.is_cuda, sdpa=lambda x: x.ndim > 1, torch=backends.always
    )


def test_the_first_that_serves_the_tensor_is_chosen():
    assert backends.choose("norm", HERE) == "torch"
    assert backends.choose("look", HERE) == "sdpa"
    assert backends.choose("look", HERE[0]) == "torch"


def test_use_overrules_for_a_block_and_inner_blocks_win():
    with backends.use("torch"):
        assert backends.choose("look", HERE) == "torch"
        with backends.use(look="sdpa"):
            assert backends.choose("look", HERE) == "sdpa"
        with pytest.raises(RuntimeError), backends.use("sdpa"):
            raise RuntimeError
        assert backends.choose("look", HERE) == "torch"
    assert backends.choose("look", HERE) == "sdpa"


def test_a_default_passes_over_operations_that_do_not_have_it():
    with backends.use("sdpa"):
        assert backends.choose("norm", HERE) == "torch"
        assert backends.choose("look", HERE[0]) == "sdpa"


def test_other_threads_do_not_see_an_override():
    seen = []
    with backends.use(look="torch"):
        thread = threading.Thread(target=lambda: seen.append(backends.choose("look", HERE)))
        thread.start()
        thread.join()
    assert seen == ["sdpa"]


def test_the_environment_overrules_and_use_overrules_it(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "torch")
    assert backends.choose("look", HERE) == "torch"
    monkeypatch.setenv(backends.VARIABLE, "norm=torch, look=torch")
    assert backends.choose("look", HERE) == "torch"
    with backends.use(look="sdpa"):
        assert backends.choose("look", HERE) == "sdpa"


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(look="triton"), r"look has no backend 'triton'; here it has \['sdpa', 'torch'\]"),
        (
            dict(look="flash_attn"),
            r"'flash_attn' is not installed \(pip install flash_attn\).*'sdpa', 'torch'",
        ),
        (dict(default="cuda"), "look has no backend 'cuda'"),
    ],
)
def test_a_backend_that_is_not_there_is_refused_by_name(asked, message, monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda package: package == "triton")
    with backends.use(**asked), pytest.raises(ValueError, match=message):
        backends.choose("look", HERE)


def test_a_misspelt_operation_is_refused(monkeypatch):
    with (
        pytest.raises(ValueError, match="'atention' is no operation.*'attention'"),
        backends.use(atention="torch"),
    ):
        pass
    monkeypatch.setenv(backends.VARIABLE, "lok=torch")
    with pytest.raises(ValueError, match="'lok' is no operation"):
        backends.choose("look", HERE)


def test_an_unknown_backend_cannot_be_registered():
    with pytest.raises(ValueError, match="not backends"):
        backends.register("norm", cuda=backends.always)


def test_triton_on_a_cpu_needs_the_interpreter_and_refuses_bfloat16(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda package: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with backends.use(norm="triton"):
        with pytest.raises(ValueError, match="needs a CUDA tensor"):
            backends.choose("norm", HERE)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert backends.choose("norm", HERE) == "triton"
        with pytest.raises(ValueError, match="bfloat16 wrongly"):
            backends.choose("norm", HERE.bfloat16())


def test_nobody_serving_is_an_error():
    backends.register("norm", sdpa=lambda x: False)
    with pytest.raises(ValueError, match="no backend serves"):
        backends.choose("norm", HERE)


def test_describe_says_who_and_why(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda package: package == "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (op, device, backend, why), norm = backends.describe()
    assert (op, device, backend) == ("look", "cpu", "sdpa")
    assert why == "first choice of sdpa, torch; not installed: flash_attn"
    assert norm[3] == "first choice of torch; not for this device or not faster: triton"
    with backends.use(norm="torch"):
        assert "asked for" in backends.describe()[1][3]


def test_describe_tells_kinds_apart_that_others_serve():
    kinds = {"of rows": (2, 8), "of one": (8,)}
    backends.register("look", kinds, sdpa=lambda x: x.ndim > 1, torch=backends.always)
    found = {op: backend for op, device, backend, _ in backends.describe() if device == "cpu"}
    assert found == {"look of rows": "sdpa", "look of one": "torch", "norm": "torch"}


def test_the_choice_does_not_break_a_compiled_graph():
    def f(x):
        return x + 1 if backends.choose("look", x) == "sdpa" else x

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(HERE), HERE + 1)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    table.clear()
    (tmp_path / "norm.json").write_text(
        json.dumps(
            {"80": {"default": {"warps": 4}}, "90": {"default": {"warps": 8}, "D=64": {"wins": False}}}
        )
    )
    yield
    table.clear()


def test_the_table_falls_back_to_older_chips_and_the_default_bucket(tables):
    assert table.lookup("norm", 86, "D=64") == {"warps": 4}
    assert table.lookup("norm", 100) == table.lookup("norm", 90, "D=32") == {"warps": 8}
    assert table.lookup("norm", 90, "D=64") == {}
    with pytest.raises(ValueError, match="sm_75"):
        table.lookup("norm", 75)


def test_the_table_decides_whether_a_kernel_is_the_default(tables):
    assert table.wins("norm", 90)
    assert not table.wins("norm", 90, "D=64")
    assert not table.wins("norm", 75)
    assert not table.wins("unknown", 90)


def test_kernels_are_found_in_a_checkout_and_import_nothing_heavy():
    code = """
import sys, blipfast.kernels.table
assert not {"triton", "torch", "kernels"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_importing_a_model_imports_no_optional_package_and_no_compiler():
    code = """
import sys, blipfast.models.blip, blipfast.models.blip_pretrain
print(sorted({"triton", "torch._dynamo", "transformers", "deepspeed", "matplotlib"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def test_what_is_recomputed_on_another_thread_is_served_as_at_first():
    with backends.use("torch"):
        first, again = backends.recompute_contexts()
    served = []

    def recompute():
        with again:
            served.append(backends._forced("look"))
        served.append(backends._forced("look"))

    thread = threading.Thread(target=recompute)
    thread.start()
    thread.join()
    assert served == ["torch", None]


@pytest.mark.gpu
def test_gpu_choices_are_said_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    with caplog.at_level("INFO"):
        for _ in range(3):
            backends.choose("look", HERE.cuda())
    assert [record.message for record in caplog.records] == ["look is served by flash_attn"]
