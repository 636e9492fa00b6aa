"""Sessions: a file or module computes in every runtime what it computes in PyTorch, and refuses what it cannot run."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from comcat import runtimes
from comcat.errors import ComcatError, ModelError
from comcat.runtimes import registry
from comcat.runtimes.sessions import FileSession, Port, Session
from conftest import images, vit

#: How far a runtime's output may be from PyTorch's in float64, of the largest: roundings of some 30 layers.
ROUNDING = {"fp32": 2e-5, "fp16": 2e-2, "bf16": 1e-1}
FILES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def host() -> nn.Module:
    return vit(dtype=torch.float32)


@pytest.fixture(scope="module")
def batch(host: nn.Module) -> np.ndarray:
    return images(host, 3).numpy()


@pytest.fixture(scope="module")
def wanted(host: nn.Module, batch: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return vit()(torch.as_tensor(batch).double()).numpy()


@pytest.fixture(scope="module")
def file(host: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host as ``.onnx``, for batches of any size."""
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        shapes = ({0: torch.export.Dim.AUTO},)
        torch.onnx.export(host, (images(host, 2),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    return path


def needs(runtime: str) -> None:
    if runtime not in runtimes.available():
        pytest.skip(f"{runtime} is not installed")


def opened(runtime: str, host: nn.Module, file: Path, precision: str = "fp32", **options: Any) -> Session:
    needs(runtime)
    return runtimes.session(file if runtime in FILES else host, runtime, precision, **options)


def assert_near(got: list[np.ndarray], wanted: np.ndarray, precision: str) -> None:
    assert len(got) == 1
    assert got[0].shape == wanted.shape
    assert np.abs(got[0] - wanted).max() <= ROUNDING[precision] * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [
        *(("torch", precision) for precision in ("fp32", "bf16", "fp16")),
        ("onnxruntime", "fp32"),
        *(("openvino", precision) for precision in ("fp32", "bf16", "fp16")),
    ],
)
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_every_runtime_computes_what_pytorch_does(
    runtime: str, precision: str, threads: int | None, host: nn.Module, file: Path, batch: np.ndarray,
    wanted: np.ndarray,
) -> None:  # fmt: skip
    before = torch.get_num_threads(), next(host.parameters()).dtype
    session = opened(runtime, host, file, precision, threads=threads)
    assert (session.runtime, session.precision, session.threads) == (runtime, precision, threads)
    assert session.version[0].isdigit()
    assert runtime in repr(session)
    assert_near(session(batch), wanted, precision)
    assert_near(session(batch[:2]), wanted[:2], precision)  # another size of batch, and nothing left of the first
    assert (torch.get_num_threads(), next(host.parameters()).dtype) == before


def test_modules_of_one_class_are_compiled_one_by_one(host: nn.Module) -> None:
    """PyTorch counts compilations by code, and stops at eight."""
    codes = [runtimes.session(host, "torch-compile").function.__code__ for _ in range(9)]
    assert len(set(map(id, codes))) == len(codes)
    assert len({code.co_name for code in codes}) == len(codes)


@pytest.mark.slow
def test_a_compiled_module_computes_what_it_did() -> None:
    module, x = nn.Sequential(nn.Linear(7, 5), nn.ReLU()), np.random.default_rng(0).standard_normal((3, 7), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's compiler
        got = runtimes.session(module, "torch-compile", threads=1)(x)
    assert_near(got, runtimes.session(module, "torch")(x)[0], "fp32")


def test_inputs_go_by_name_too(host: nn.Module, file: Path, batch: np.ndarray, wanted: np.ndarray) -> None:
    for runtime in ("torch", *FILES):
        assert_near(opened(runtime, host, file)(x=batch), wanted, "fp32")


def test_all_outputs_come_back_copied() -> None:
    class Several(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"a": x + 1, "rest": [x.bfloat16(), (2 * x,)]}

    x = np.ones((2, 3), np.float32)
    session = runtimes.session(Several(), "torch")
    first = session(x)
    assert [one.tolist()[0][0] for one in first] == [2, 1, 2]
    session(5 * x)
    assert [one.tolist()[0][0] for one in first] == [2, 1, 2]


@pytest.mark.parametrize("runtime", ["torch", *FILES])
def test_timings_are_as_many_as_asked_for(runtime: str, host: nn.Module, file: Path, batch: np.ndarray) -> None:
    session = opened(runtime, host, file)
    seconds = session.seconds([batch], repeats=3)
    assert len(seconds) == 3
    assert min(seconds) > 0


class Counted(Session):
    """It writes down when it runs."""

    runtime, packages, precisions = "counted", ("torch",), ("fp32",)
    order: list[str] = []  # noqa: RUF012 - of all of them

    def _open(self, source: Any) -> None: ...

    def _prepared(self, arrays: Any, named: Any) -> Any:
        return arrays

    def _run(self, inputs: Any) -> Any:
        self.order.append(f"{self.name}{len(inputs[0])}")

    def _arrays(self, outputs: Any) -> list[np.ndarray]:
        return []


def test_sessions_run_in_turns() -> None:
    Counted.order.clear()
    seen: list[Any] = []
    pair = [Counted("a"), Counted("b")]
    times = runtimes.in_turns(pair, [np.zeros(4)], 2, 2, lambda *args: seen.append(args))
    assert Counted.order == ["a4", "a4", "b4", "b4"] * 3
    assert [len(spent) for spent in times] == [2, 2]
    assert seen == [("timing", i, 3) for i in (1, 2, 3)]
    Counted.order.clear()
    runtimes.in_turns(pair, [[np.zeros(4)], [np.zeros(5)]], 1)
    assert Counted.order == ["a4", "b5"] * 2


def test_available_runtimes_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtimes.available()[:2] == ["torch", "torch-compile"]
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "openvino" else name)
    assert "openvino" not in runtimes.available()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("runtime", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_runtime_names_how_to_install_it(
    runtime: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ComcatError, match=rf"{runtime} is not installed: pip install 'comcat\[{extra}\]'"):
        runtimes.session(tmp_path / "model.onnx", runtime)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorrt"}, "unknown runtime 'tensorrt'; choose from torch, torch-compile, onnxruntime"),
        ({"runtime": "torch", "precision": "int8"}, "torch does not compute in 'int8' here; choose fp32 or bf16 or"),
        ({"runtime": "torch", "threads": 0}, "threads is 0; give a number of 1 or more"),
        ({"runtime": "torch", "source": "model.onnx"}, "torch runs modules, not 'model.onnx'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str, host: nn.Module) -> None:
    with pytest.raises(ComcatError, match=message):
        runtimes.session(**{"source": host, **options})


@pytest.mark.parametrize("runtime", FILES)
def test_files_that_cannot_be_run_are_refused(runtime: str, host: nn.Module, tmp_path: Path) -> None:
    needs(runtime)
    (tmp_path / "text.onnx").write_text("no model at all")
    for source, message in (
        (host, f"{runtime} runs exported files .*, not VisionTransformer; write one with comcat.export"),
        (tmp_path / "model.pt", f"{runtime} reads .*, not '.*model.pt'"),
        (tmp_path / "gone.onnx", "there is no file '.*gone.onnx'"),
        (tmp_path / "text.onnx", f"{runtime} cannot read '.*text.onnx': "),
    ):
        with pytest.raises(ModelError, match=message):
            runtimes.session(source, runtime)


@pytest.mark.parametrize("runtime", FILES)
def test_inputs_of_another_kind_are_refused(runtime: str, host: nn.Module, file: Path, batch: np.ndarray) -> None:
    session = opened(runtime, host, file)
    takes = r"'.*model.onnx' takes 'x' \(any x 3 x 14 x 21\), and got"
    for args, named, message in (
        ((), {}, f"{takes} 0 arrays"),
        ((batch, batch), {}, f"{takes} 2 arrays"),
        ((), {"y": batch}, f"{takes} 0 arrays and 'y'"),
        ((batch,), {"x": batch}, f"{takes} 1 arrays and 'x'"),
        ((batch[:, :2],), {}, f"{takes} 3 x 2 x 14 x 21 for 'x'"),
        ((batch[0],), {}, f"{takes} 3 x 14 x 21 for 'x'"),
    ):
        with pytest.raises(ModelError, match=message):
            session(*args, **named)
    with pytest.raises(ModelError, match="takes float32 for 'x', and got int64"):
        session(batch.astype(np.int64))


def test_a_module_that_does_not_run_says_so(host: nn.Module, batch: np.ndarray) -> None:
    session = runtimes.session(host, "torch")
    with pytest.raises(ModelError, match=r"does not run on images of size \(2, 14, 21\)"):
        session(batch[:, :2])
    with pytest.raises(ModelError, match="got no input"):
        session()


def test_onnx_runtime_does_not_change_the_precision_of_a_file(file: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ComcatError, match=r"computes what a file holds, and .* holds fp32, not bf16; export it in"):
        runtimes.session(file, "onnxruntime", "bf16")


@pytest.mark.parametrize(
    ("said", "there", "cure"),
    [
        ("ImportError: /a/torchinductor_me/fo/x.main.so: file too short", True, "is damaged: remove '/a/.*/x.main.so'"),
        ("FileNotFoundError: g++", False, r"It needs a C\+\+ compiler \(apt-get install g\+\+\)"),
        ("CppCompileError", True, r"Check its C\+\+ compiler"),
    ],
)
def test_what_helps_where_nothing_can_be_compiled(
    host: nn.Module, batch: np.ndarray, monkeypatch: pytest.MonkeyPatch, said: str, there: bool, cure: str
) -> None:
    error = type("BackendCompilerFailed", (RuntimeError,), {"__module__": "torch._dynamo.exc"})

    def compiled(*_: Any, **__: Any) -> Any:
        raise error(said)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    monkeypatch.setattr(shutil, "which", lambda name: name if there else None)
    with pytest.raises(ModelError, match=f"torch.compile cannot compile .*: .*{cure}.*; or choose the runtime 'torch'"):
        runtimes.session(host, "torch-compile")(batch)


def test_ports_know_what_they_take() -> None:
    port = Port("x", (None, 3), np.dtype(np.float32))
    assert port.takes(np.zeros((7, 3)))
    assert not port.takes(np.zeros((7, 2)))
    assert not port.takes(np.zeros((7, 3, 1)))


def test_every_runtime_is_one_class() -> None:
    classes = [registry.session_class(name) for name in runtimes.available()]
    assert [one.runtime for one in classes] == runtimes.available()
    assert all(one.suffixes != () for one in classes if issubclass(one, FileSession))


def test_openvino_reports_to_nobody() -> None:
    """Its package for that is never imported, neither with it nor with the parts that convert."""
    pytest.importorskip("openvino")
    code = (
        "import sys\nfrom comcat.runtimes.openvino_runtime import openvino_module\nopenvino_module()\n"
        "import openvino.tools.ovc.convert_impl\nassert sys.modules['openvino_telemetry'] is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
def test_signals_after_sessions_of_openvino(file: Path) -> None:
    """Sessions go in the order they came in; then a signal is handled in Python."""
    pytest.importorskip("openvino")
    script = (
        "import gc, signal, sys\nfrom comcat import runtimes\n"
        "one, two = (runtimes.session(sys.argv[1], 'openvino') for _ in range(2))\n"
        "del one\ngc.collect()\ndel two\ngc.collect()\n"
        "signal.signal(signal.SIGCHLD, lambda *_: print('handled'))\nsignal.raise_signal(signal.SIGCHLD)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
