"""How the suite runs: where Triton runs, on how many threads, with which seeds and backends."""

from __future__ import annotations

import collections
import gc
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import hypothesis
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads this once, when a kernel is decorated: without a GPU its kernels can only run
    # under its interpreter, on CPU tensors, so it has to be set before anything imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Inductor's cache knows an op by its name, not by what stands behind it today.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import fusedattn  # noqa: E402
import interpreter  # noqa: E402
from fusedattn import _native  # noqa: E402

interpreter.make_faster()

# Two threads are the fewest that show a race or a wrong split of the work; the tests' shapes are
# too small to gain from more.
torch.set_num_threads(min(2, torch.get_num_threads()))

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deterministic",
        action="store_true",
        help="fresh tensors of tests that launch kernels, and the CPU kernels' scratch memory, are "
        "full of NaN, which shows what nobody wrote; with torch's deterministic algorithms, but "
        "for which it does not fill",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--deterministic") and _native.cpu is not None:
        _native.cpu.fill_workspace(True)
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist's own order of files


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that call compilers for minutes begin, so that no process ends alone with one. They have
    # few tests; the others come by their number, most first.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    tests = collections.Counter(item.path for item in items)
    items.sort(
        key=lambda item: (0, tests[item.path]) if item.path in slow else (1, -tests[item.path])
    )
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish() -> None:
    # Else each collection of garbage, of which a measurement makes some, goes through all of torch.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


# --- backends ------------------------------------------------------------------------------------

BACKENDS = ("cpu", "reference", "triton", "cuda_emulated", "cuda")
FAST = [*(["cpu"] if _native.cpu else []), "reference", *(["triton"] if HAS_GPU else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` is each that runs here at full speed, or those that @pytest.mark.backends names.

    "fast" stands for the former: what an emulated GPU does not take of their tests is skipped.
    """
    if "backend" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("backends")
    asked = mark.args if mark else ["fast"]
    names = [x for name in asked for x in (FAST if name == "fast" else [name])]
    params = [_parameter(name) for name in dict.fromkeys(names)]
    metafunc.parametrize("backend", params, indirect=True, scope="session")


def _parameter(name: str) -> object:
    assert name in BACKENDS
    on_gpu = name == "cuda" or (name == "triton" and HAS_GPU)
    return pytest.param(name, marks=pytest.mark.gpu if on_gpu else ())


def _backend(request: pytest.FixtureRequest) -> str:
    """`compare.device_for` says on which device."""
    there = {"cpu": _native.cpu, "cuda_emulated": _native.cuda_emulated()}
    if there.get(request.param, True) is None:
        pytest.skip(f"{request.param} is not built")
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


# By pytest_generate_tests.
backend = pytest.fixture(scope="session", name="backend")(_backend)
# The one that a CPU tensor gets by default: native where built, else the reference.
fast_backend = pytest.fixture(params=FAST[:1], scope="session", name="fast_backend")(_backend)
# Each that runs anywhere, Triton interpreted where there is no GPU: for a few small cases.
any_backend = pytest.fixture(params=BACKENDS[:3], name="any_backend")(_backend)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """The emulated GPU runs the threads of each test in another order, the same each time."""
    emulated = _native.cuda_emulated()
    if emulated is None:
        return (yield)
    emulated.seed(zlib.crc32(item.nodeid.encode()))
    try:
        return (yield)
    except fusedattn.UnsupportedError as refused:
        mark = item.get_closest_marker("backends")
        if mark is None or not {"fast", "cuda_emulated"} <= set(mark.args):
            raise
        reasons = [line for line in str(refused).splitlines() if "cuda_emulated:" in line]
        if not reasons:
            raise
        pytest.skip(reasons[0])
    finally:
        emulated.device()


def pytest_make_parametrize_id(val: object) -> str | None:
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fp64_on_one_thread() -> Iterator[None]:
    """For small modules, where two paths to one result agree to 1e-7 and threads only cost."""
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def launches_kernels(item: pytest.Item) -> bool:
    """It has one of the fixtures below, or its file is about the kernels of one backend.

    Other tests are about messages, builds, modules, or torch at work around an op: with the
    algorithms that users have, and nothing unwritten is to be seen there that is not seen here.
    """
    fixtures = {"backend", "fast_backend", "any_backend", "instruction_set"}
    own_file = item.path.name.startswith(("test_triton_", "test_cuda_"))
    return own_file or not fixtures.isdisjoint(item.fixturenames)


@pytest.fixture(autouse=True)
def fresh_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Full of NaN, with --deterministic and where kernels are launched."""
    if not (request.config.getoption("--deterministic") and launches_kernels(request.node)):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def _instruction_sets() -> list:
    if _native.cpu is None:
        return [pytest.param("", marks=pytest.mark.skip(reason="fusedattn._cpu is not built"))]
    return list(_native.cpu.instruction_sets())


@pytest.fixture(params=_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the native CPU kernels in each instruction set that this machine has."""
    _native.cpu.select_instruction_set(request.param)
    yield request.param
    _native.cpu.select_instruction_set("auto")


@pytest.fixture
def small_caches() -> Callable[..., AbstractContextManager[None]]:
    """Within it, the native CPU kernels reckon that the caches hold so many bytes."""

    @contextmanager
    def reckoned(size: int = 1) -> Iterator[None]:
        _native.cpu.assume_cache_bytes(size)
        try:
            yield
        finally:
            _native.cpu.assume_cache_bytes(0)

    return reckoned
