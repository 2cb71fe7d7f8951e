"""What goes wrong on real machines: no wrong number reaches a page, and nothing has to be deleted by hand.

Which fault is tested where (`test_the_overview_names_tests_that_exist` reads this table):

the build is killed              here: test_a_build_killed_at_any_moment_is_right_the_next_time
                                 test_unchanged: test_the_note_is_gone_before_the_first_page_is
  its cache is damaged           test_build: test_a_cache_that_was_altered_is_dropped
  while it writes its cache      test_build: test_a_cache_left_in_the_middle_of_a_write_is_dropped
                                 here: test_a_cache_killed_before_it_has_tables_is_made_anew
  a chapter changes meanwhile    test_unchanged: test_a_chapter_changed_while_the_book_is_built_is_built_again
  a cell fails, a page is wrong  test_build: test_failing_cells_and_wrong_signs_fail_every_time
                                 test_build: test_faults_of_a_page_fail_every_time
  the system kills a kernel      here: test_a_kernel_that_is_killed_names_its_cell
two builds at once               here: test_two_builds_at_once_both_end_right
                                 here: test_a_second_build_waits_and_says_so
a sweep is killed                here: test_a_sweep_that_is_killed_loses_no_result_and_repeats_none
                                 test_sweep: test_what_is_finished_is_kept_and_not_done_again
  a worker is lost               test_sweep: test_lost_workers_are_replaced_and_given_up_in_the_end
                                 test_sweep: test_a_dask_cluster_that_loses_a_worker_completes
  a kept result is damaged       here: test_a_kept_run_that_is_not_as_it_was_written_is_done_again
a sequence of tasks is stopped   test_methods: test_a_sequence_resumed_from_files_has_the_same_bits
a data file is damaged           here: test_a_damaged_file_of_the_own_cache_is_fetched_again
                                 here: test_a_damaged_file_without_a_network_is_not_read_and_is_mended_later
                                 test_data: test_a_file_that_is_not_what_was_published
                                 test_data: test_processed_files_of_an_old_torchvision_are_not_read_instead
                                 test_data: test_a_damaged_sample
  half-downloaded                here: test_a_download_that_is_killed_leaves_nothing_that_piles_up_or_is_read
                                 here: test_two_processes_fetch_the_data_once
                                 test_data: test_interrupted_download_leaves_nothing
no network                       test_data: test_no_network_means_the_sample_with_a_warning
                                 test_data: test_torchvision_itself_without_a_network
  the server sends another file  test_data: test_a_server_that_sends_something_else
a full disk                      here: test_a_disk_that_fills_up_while_data_is_fetched
                                 here: test_a_disk_that_fills_up_during_a_sweep
                                 here: test_a_disk_that_fills_up_under_a_belief
                                 here: test_a_build_killed_at_any_moment_is_right_the_next_time
                                 test_data: test_disk_that_fills_up_while_files_are_moved
a read-only folder               here: test_whole_data_in_a_read_only_folder_needs_no_write
                                 test_data: test_full_disk_and_unwritable_folder
                                 test_data: test_a_root_below_what_cannot_be_written
memory runs out, in curvature    test_sequences: test_batches_that_do_not_fit_are_halved_and_that_is_said
                 in training     test_sequences: test_memory_in_training_names_the_batch_and_keeps_the_last_state
                 in a sweep      test_sweep: test_memory_that_ends_halves_the_stack_and_names_the_run
a loss turns NaN                 test_training: test_diverging_training_stops_and_puts_the_model_back
                                 test_training: test_buffers_are_put_back_too
                                 test_training: test_parameters_spoiled_by_the_very_last_step_are_seen
                                 test_sweep: test_a_run_that_diverges_is_a_result_and_leaves_the_others_alone
a belief file of another model   here: test_a_belief_of_another_model_is_refused_by_name_whatever_its_kind
                                 test_methods: test_a_belief_of_another_model_is_refused_by_the_first_name_that_differs
  truncated or altered           here: test_a_belief_truncated_anywhere_is_refused
                                 here: test_a_belief_altered_anywhere_is_refused
  of another version, a pickle   here: test_other_files_are_no_beliefs_and_no_pickle_is_ever_run
"""

import errno
import hashlib
import importlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_data import LOCK, NAMES, downloads, publish, raising, tree
from test_methods import METHODS, SETTINGS, small, three_tasks

from ewc_code import consolidation, data, storage, sweep
from ewc_code.gaussian import Belief, Diagonal
from ewc_code.models import mlp, snapshot
from ewc_code.training import learn
from sources import ROOT


def test_the_overview_names_tests_that_exist() -> None:
    """A table of contents that nobody checks is wrong within a month."""
    module, named = "here", 0
    for where, test in re.findall(r"(?:(here|test_\w+): )(test_\w+)", __doc__ or ""):
        module = "test_faults" if where == "here" else where
        assert f"def {test}(" in (ROOT / "tests" / f"{module}.py").read_text(), (module, test)
        named += 1
    assert named == (__doc__ or "").count(": test_") > 30


@contextmanager
def disk_with(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: the system's own refusal, in the middle of a write."""
    resource = pytest.importorskip("resource", reason="this system cannot limit the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Data. The user's cache folder is one in `tmp_path`, and the server another.


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tiny data sets, whose checksums are taken for the published ones."""
    folder = tmp_path / "server"
    for name in NAMES:
        publish(folder, name)
    files = {name: sorted((folder / name / "raw").iterdir()) for name in NAMES}
    sums = {name: {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files[name]} for name in NAMES}
    monkeypatch.setattr(data, "CHECKSUMS", sums)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The book's own cache folder, before anything is in it."""
    monkeypatch.delenv("EWC_DATA", raising=False)
    monkeypatch.setattr(data.platformdirs, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    data._source.cache_clear()
    yield tmp_path / "cache" / "data"
    data._source.cache_clear()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda whole: whole[:-5],
    "altered": lambda whole: whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
    "empty": lambda _: b"",
    "longer": lambda whole: whole + b"x",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_of_the_own_cache_is_fetched_again(
    server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    shutil.copytree(server, cache)
    path = cache / "MNIST/raw/train-labels-idx1-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    asked = downloads(monkeypatch, server)
    with pytest.warns(UserWarning, match=r"train-labels-idx1-ubyte must have.*got .*bytes.*fetched again"):
        images = data.load("MNIST")
    assert (len(images.train), asked) == (50, ["MNIST"])
    assert tree(cache) == tree(server)
    assert path.read_bytes() == (server / "MNIST/raw/train-labels-idx1-ubyte").read_bytes()
    data._source.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.source() == "full"


@pytest.mark.parametrize("reply", [raising(ConnectionResetError(errno.ECONNRESET, "gone")), "another file"])
def test_a_damaged_file_without_a_network_is_not_read_and_is_mended_later(
    server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, reply: object
) -> None:
    shutil.copytree(server, cache)
    path = cache / "FashionMNIST/raw/t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])

    def tamper(folder: Path) -> None:
        (folder / path.name).write_bytes(b"a page that asks to log in")

    with monkeypatch.context() as patch:
        downloads(patch, server, tamper if reply == "another file" else reply)
        with pytest.warns(UserWarning, match=r"FashionMNIST are not in .*, or not whole.*embedded sample"):
            assert len(data.load("FashionMNIST").train) == 4167
        assert len(data.load("MNIST").train) == 4167  # one source for all of a run
    data._source.cache_clear()
    downloads(monkeypatch, server)
    with pytest.warns(UserWarning, match="fetched again"):
        assert len(data.load("FashionMNIST").train) == 50
    assert tree(cache) == tree(server)


def test_a_file_that_cannot_be_read_is_fetched_again(
    server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector: the name is there, its content is not."""
    shutil.copytree(server, cache)
    asked, real = downloads(monkeypatch, server), Path.read_bytes
    bad = [cache / "MNIST/raw/t10k-labels-idx1-ubyte"]

    def read(path: Path) -> bytes:
        if path in bad and asked == []:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    asked_before = list(asked)
    with pytest.warns(UserWarning, match=r"got Input/output error.*fetched again"):
        assert data.source() == "full"
    assert (asked_before, asked) == ([], ["MNIST"])


def test_what_is_missing_is_added_to_a_folder_of_the_readers_own_but_nothing_is_replaced(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "shared"
    shutil.copytree(server / "MNIST", root / "MNIST")
    (root / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"")
    monkeypatch.setenv("EWC_DATA", str(root))
    asked = downloads(monkeypatch, server)
    data._source.cache_clear()
    with pytest.raises(ValueError, match=r"must have the published.*left as it is.*unset EWC_DATA"):
        data.load("FashionMNIST")
    assert asked == [] and (root / "MNIST/raw/train-images-idx3-ubyte").read_bytes() == b""
    shutil.rmtree(root / "MNIST")
    assert data.source() == "full"
    assert (asked, tree(root)) == (list(NAMES), tree(server))
    data._source.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_download_that_is_killed_leaves_nothing_that_piles_up_or_is_read(
    server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really killed, twice, in the middle: no handler runs. What it wrote lies where nothing reads it, once."""

    def hang(folder: Path) -> None:
        (folder / "train-labels-idx1-ubyte").write_bytes(b"half")
        (folder / "train-images-idx3-ubyte.gz").write_bytes(bytes(1000))
        time.sleep(60)

    half = cache / ".ewc_code-download/MNIST/raw/train-images-idx3-ubyte.gz"
    for _ in range(2):
        with monkeypatch.context() as patch:
            downloads(patch, server, hang)
            child = os.fork()
            if child == 0:
                half.unlink(missing_ok=True)
                data.source()
                os._exit(1)
            deadline = time.monotonic() + 20
            while not half.exists() or half.stat().st_size == 0:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert not (cache / "MNIST").exists()
        assert {path.name for path in cache.iterdir()} == {LOCK, ".ewc_code-download"}
    downloads(monkeypatch, server)
    assert data.source() == "full"  # at once: the system freed the lock
    assert tree(cache) == tree(server) and not half.parents[2].exists()


def test_two_processes_fetch_the_data_once(server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builds of a first day, or all workers of a cluster: one fetches, the others wait and find it there."""
    together = threading.Barrier(2, timeout=10)
    asked = downloads(monkeypatch, server, lambda _: time.sleep(0.2))

    def fetch(_: int) -> None:
        together.wait()
        data._download(cache, "MNIST")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fetch, range(2)))
    assert asked == ["MNIST"]
    assert tree(cache / "MNIST") == tree(server / "MNIST")


def test_a_disk_that_fills_up_while_data_is_fetched(server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by the system itself, not by a stand-in: the sample must not be taken for want of space."""

    def more(folder: Path) -> None:
        (folder / "train-images-idx3-ubyte.gz").write_bytes(bytes(100_000))

    downloads(monkeypatch, server, more)
    with disk_with(80_000), pytest.raises(OSError, match=r"must be writable with 200 MB free.*File too large"):
        data.load("MNIST")
    assert [path.name for path in cache.iterdir()] == [LOCK]
    assert data.source() == "full"


def test_whole_data_in_a_read_only_folder_needs_no_write(
    server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(server, cache)
    (cache / LOCK).touch()
    refuse = lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, os.strerror(errno.EROFS)))  # noqa: E731
    with monkeypatch.context() as patch:
        for where, name in ((Path, "mkdir"), (Path, "touch"), (os, "replace"), (os, "mkdir"), (data, "FileLock")):
            patch.setattr(where, name, refuse)
        assert len(data.load("MNIST").train) == 50
        (cache / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"damaged")
        data._source.cache_clear()
        with pytest.raises(OSError, match=r"must be writable.*Read-only file system.*'sample'"):
            data.load("MNIST")


# Sweeps.


def tiny(count: int) -> list[sweep.Run]:
    """Runs of milliseconds."""
    return [sweep.Run(three_tasks, consolidation.ewc(5.0), partial(mlp, (4, 5, 3)), SETTINGS, s) for s in range(count)]


def outcomes(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.glob("*.json")}


SWEEP = """
import sys, time, torch
torch.set_num_threads(1)
from test_faults import sweep, tiny

def progress(line):
    print(line, flush=True)
    time.sleep(0.05)

sweep.sweep(tiny(30), folder=sys.argv[1], stack=1, progress=progress)
"""


def test_a_sweep_that_is_killed_loses_no_result_and_repeats_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    todo, real, again = tiny(30), sweep.learn_stacked, []
    with subprocess.Popen([sys.executable, "-c", SWEEP, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(2):
            assert "runs done" in process.stdout.readline()
        time.sleep(random.Random(7).uniform(0, 0.3))
        process.kill()
    before = outcomes(tmp_path)
    assert 2 <= len(before) < len(todo)
    (tmp_path / f"{todo[-1].key}.123.part").write_text('{"run": ')  # as one killed in the middle of a write leaves it

    def counted(group: list[sweep.Run]) -> list[sweep.Outcome]:
        again.extend(run.key for run in group)
        return real(group)

    monkeypatch.setattr(sweep, "learn_stacked", counted)
    found = sweep.sweep(todo, folder=tmp_path, stack=1)
    assert sorted([*before, *again]) == sorted(run.key for run in todo)
    assert {key: outcomes(tmp_path)[key] for key in before} == before
    monkeypatch.setattr(sweep, "learn_stacked", real)
    assert [one.record for one in found] == [one.record for one in sweep.sweep(todo, stack=1)]


def test_a_kept_run_that_is_not_as_it_was_written_is_done_again(tmp_path: Path) -> None:
    first, other = tiny(2)
    whole = sweep.sweep([first, other], folder=tmp_path)[0]
    path = tmp_path / f"{first.key}.json"
    written = path.read_bytes()
    digit = written.index(b'"accuracy": [[0.') + len(b'"accuracy": [[0.')  # a number that would be read as it is
    altered = written[:digit] + bytes([b"0123456789"[(written[digit] - 47) % 10]]) + written[digit + 1 :]
    assert json.loads(altered) != json.loads(written)
    foreign = (tmp_path / f"{other.key}.json").read_bytes()
    for damaged in (b"", b"{", b"null", b"[]", b"\xff", written[:-1], written[: len(written) // 2], altered, foreign):
        path.write_bytes(damaged)
        said: list[str] = []
        assert sweep.sweep([first], folder=tmp_path, progress=said.append)[0].record == whole.record
        assert f"{path.name} must hold a finished run as it was written" in said[0], damaged
        assert json.loads(path.read_bytes())["outcome"]["record"] == json.loads(written)["outcome"]["record"]
    said.clear()
    sweep.sweep([first], folder=tmp_path, progress=said.append)
    assert said == ["1 of 1 runs were there already"]


def test_a_disk_that_fills_up_during_a_sweep(tmp_path: Path) -> None:
    run = tiny(1)[0]
    with disk_with(300), pytest.raises(OSError, match="File too large"):
        sweep.sweep([run], folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert sweep.sweep([run], folder=tmp_path)[0].error is None


# Beliefs.


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A belief's file, with a number of each of its parts."""
    storage.save(Diagonal.isotropic(snapshot(mlp((3, 2))), 1.5), tmp_path / "belief")
    return tmp_path / "belief"


def test_a_belief_truncated_anywhere_is_refused(kept: Path) -> None:
    whole, model = kept.read_bytes(), mlp((3, 2))
    for length in range(len(whole)):
        kept.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="must be a whole safetensors file"):
            storage.load(kept, model)
    kept.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        storage.load(kept, model)


def test_a_belief_altered_anywhere_is_refused(kept: Path) -> None:
    """A flipped bit in a precision is still a number, and safetensors carries no checksum."""
    whole, model = kept.read_bytes(), mlp((3, 2))
    for place in range(len(whole)):
        for bit in (1, 64):
            kept.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=r"must (be a whole safetensors|be as it was written|hold a belief)"):
                storage.load(kept, model)


class Bomb:
    """What a pickle can do to who reads it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def test_other_files_are_no_beliefs_and_no_pickle_is_ever_run(kept: Path, tmp_path: Path) -> None:
    model, whole = mlp((3, 2)), kept.read_bytes()
    kept.write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        storage.load(kept, model)
    torch.save(Bomb(tmp_path / "bomb"), kept)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        storage.load(kept, model)
    assert not (tmp_path / "bomb").exists()
    kept.write_bytes(whole.replace(storage.FORMAT.encode(), b"ewc_code belief 9"))
    with pytest.raises(ValueError, match=r"must hold a belief \('ewc_code belief \d'\); got 'ewc_code belief 9'"):
        storage.load(kept, model)


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_belief_of_another_model_is_refused_by_name_whatever_its_kind(make: Callable, tmp_path: Path) -> None:
    beliefs: list[Belief] = []
    learn(small(), three_tasks()[:1], make(), SETTINGS, keep=lambda _, belief: beliefs.append(belief))
    storage.save(beliefs[0], tmp_path / "belief")
    with pytest.raises(ValueError, match=r"parameter '0.weight': file \(5, 4\), model \(6, 4\)"):
        storage.load(tmp_path / "belief", mlp((4, 6, 3)))
    with pytest.raises(ValueError, match=r"parameter '2.(weight|bias)': file \(3.*\), model absent"):
        storage.load(tmp_path / "belief", mlp((4, 5))[:1])


def test_a_disk_that_fills_up_under_a_belief(kept: Path) -> None:
    """The belief of the last task is all that there is of it: it must outlive the attempt to replace it."""
    before, larger = kept.read_bytes(), Diagonal.isotropic(snapshot(mlp((300, 20))), 1.0)
    with disk_with(10_000), pytest.raises(OSError, match=r"could not be written.*Free space"):
        storage.save(larger, kept)
    assert kept.read_bytes() == before and list(kept.parent.iterdir()) == [kept]


# Builds. A small book with the project's extensions and Makefile, killed with SIGKILL, which nothing can catch.


CHAPTER = """# Chapter NAME

```{code-cell}
import time
from ewc_checks import claim, glue
time.sleep(0.2)
glue("NAME_number", VALUE.25)
```

The number is {glue:text}`NAME_number:.2f`, said in edition VALUE.

```{code-cell}
:tags: [check]
claim("NAME has its number", True, {"number": VALUE.25})
```
"""
CHAPTERS = ("one", "two")


class Toy:
    """A book that `make html` builds, at edition `value`."""

    def __init__(self, folder: Path):
        from test_build import Book

        self.book, self.folder = Book(folder, {}), folder
        parts = [{"caption": "I", "numbered": True, "chapters": [{"file": f"book/{name}"} for name in CHAPTERS]}]
        toc = {"format": "jb-book", "root": "book/index", "parts": parts}
        (folder / "_toc.yml").write_text(json.dumps(toc))
        for name in ("Makefile", "requirements.txt", "pyproject.toml", "tools/unchanged.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "book/_ext").mkdir()
        shutil.copy(ROOT / "book/_ext/book_finished.py", folder / "book/_ext")
        (folder / ".installed").touch()  # the Makefile would make an environment

    def edit(self, value: int) -> None:
        """Another number in every chapter, in its cells and in its prose."""
        self.value = value
        for name in CHAPTERS:
            self.book.write(name, CHAPTER.replace("VALUE", str(value)))

    def start(self, limit: int | None = None) -> subprocess.Popen:
        """`make html`; with a limit on the size of files, in blocks of 1024 bytes."""
        command = f"exec make html BIN={Path(sys.executable).parent} STAMP=.installed"
        environment = os.environ | {"EWC_DATA": "sample", "EWC_SCALE": "smoke", "PYTHONPATH": str(self.folder)}
        return subprocess.Popen(
            ["bash", "-c", f"ulimit -f {limit}; {command}" if limit else command],
            cwd=self.folder,
            env={key: value for key, value in environment.items() if key != "MAKEFLAGS"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def right(self) -> bool:
        """Whether the site is whole, and of this edition only."""
        html = self.folder / "_build/html"
        texts = {name: (html / f"book/{name}.html").read_text() for name in (*CHAPTERS, "index")}
        ledger = json.loads((html / "book/ledger.json").read_text())
        numbers = [entry["values"]["number"] for entry in ledger["entries"]]
        glued = [ledger["build"]["results"][name][f"{name}_number"] for name in CHAPTERS]
        found = re.findall(r"(\d+)\.25", " ".join(texts.values()))
        editions = re.findall(r"in edition (\d+)", " ".join(texts.values()))
        assert (html / "index.html").exists() and (html / "searchindex.js").exists()
        assert all("site." in text for text in texts.values())  # the last extension went over the page
        assert numbers == glued == [self.value + 0.25] * len(CHAPTERS)
        assert len(found) >= 3 * len(CHAPTERS) and set(found) == {str(self.value)} == set(editions)
        return True


def kill(process: subprocess.Popen) -> str:
    """SIGKILL for make and what it started, kernels too, as when a machine is switched off; returns what was said."""
    psutil = pytest.importorskip("psutil")
    top = psutil.Process(process.pid)
    for one in [top, *top.children(recursive=True)]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    return process.communicate()[0]


def until(process: subprocess.Popen, line: str) -> None:
    """Read what a build says, up to a line that holds some words."""
    if line and not any(line in said for said in process.stdout or ()):
        raise AssertionError(f"the build never said {line!r}")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Edition 1, built by two processes at once."""
    pytest.importorskip("sphinx", reason="the book's own requirements are not installed")
    made = Toy(tmp_path_factory.mktemp("toy"))
    made.edit(1)
    started = time.monotonic()
    processes = [made.start(), made.start()]
    made.said = [process.communicate()[0] for process in processes]
    made.codes = [process.returncode for process in processes]
    made.seconds = time.monotonic() - started
    return made


def test_two_builds_at_once_both_end_right(toy: Toy) -> None:
    """One of them waits; then it finds the site, or builds it from the cells that the other has executed."""
    assert toy.codes == [0, 0], toy.said
    assert "".join(toy.said).count("2 of 2 notebooks executed") == 1, toy.said
    assert any("another build is at work" in said for said in toy.said), toy.said
    assert toy.right()
    assert "nothing changed since the last build" in toy.start().communicate()[0]


def test_a_build_killed_at_any_moment_is_right_the_next_time(toy: Toy) -> None:
    """At random, after the cells have run, when a page is written; then a disk that is full for the style sheet."""
    draw, note, site = random.Random(2026), toy.folder / "_build/finished.json", extension("book_finished").site
    for line in ("", "notebooks executed", "writing output"):
        toy.edit(toy.value + 1)
        process = toy.start()
        until(process, line)
        time.sleep(draw.uniform(0, 0.3 if line else 0.5 * toy.seconds))
        kill(process)
        assert not note.exists() or json.loads(note.read_text())["site"] == site(note.with_name("html"))
    toy.edit(toy.value + 1)
    process = toy.start(limit=100)
    process.communicate()
    assert process.returncode != 0 and not note.exists()
    process = toy.start()
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert toy.right() and note.exists()


def extension(name: str) -> object:
    """One of the book's own extensions, without a build."""
    pytest.importorskip("sphinx", reason="the book's own requirements are not installed")
    sys.path.insert(0, str(ROOT / "book/_ext"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "book/_ext"))


def test_a_kernel_that_is_killed_names_its_cell(tmp_path: Path) -> None:
    """As the system does that has no memory left: there is no traceback, and no output to read."""
    notebooks = extension("book_notebooks")
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [new_code_cell(source) for source in ("1", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "2")]
    with pytest.raises(notebooks.CellFailure, match=r"one.md, cell 2 of 3: the kernel was killed.*memory"):
        notebooks.execute(new_notebook(cells=cells), tmp_path / "one.md", "[1/1] one")


def test_a_second_build_waits_and_says_so(tmp_path: Path) -> None:
    finished, said, held = extension("book_finished"), [], threading.Event()

    def first() -> None:
        with finished.alone(tmp_path, said.append):
            held.set()
            time.sleep(0.3)
            said.append("ended")

    thread = threading.Thread(target=first)
    thread.start()
    assert held.wait(10) and said == []
    finished.alone(tmp_path, said.append).release()
    assert len(said) == 2 and str(tmp_path) in said[0] and said[1] == "ended"
    thread.join()


def test_a_cache_killed_before_it_has_tables_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the file of the data base and its tables, the cache was of the right fingerprint and unusable."""
    executing = extension("book_executing")
    from jupyter_cache.cache import db

    folder = tmp_path / "cache"
    with monkeypatch.context() as patch:
        stop = SimpleNamespace(create_all=lambda engine: (engine.connect(), (folder / "global.db").touch(), 1 / 0))
        patch.setattr(db, "OrmBase", SimpleNamespace(metadata=stop))
        with pytest.raises(ZeroDivisionError):
            executing.open_cache(folder, "key").list_cache_records()
    assert (folder / "global.db").exists()
    assert executing.open_cache(folder, "key").list_cache_records() == []
