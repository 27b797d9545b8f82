"""Drills D37 to D40: checkpoints, archives and configurations that want to run code, and secrets that want out."""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_ddp.config import BasicAugmentConfig, ImageNetConfig, ShardsConfig
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import MicroBatch
from alexnet_ddp.data.sources.imagenet import open_imagenet
from alexnet_ddp.data.sources.shard_index import INDEX
from alexnet_ddp.data.sources.shards import open_shards
from alexnet_ddp.runtime.errors import DataError
from tests.archives import TRAIN, VAL, jpeg, make_archives, tar, write
from tests.drills.harness import PROJECT, SMALL
from tests.packing import pack

pytestmark = pytest.mark.drill


class Evil:
    """What a pickle of it does when it is loaded: touch a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def start(root: str, *arguments: str, cwd: Path, **env: str) -> subprocess.Popen:
    """`python -m alexnet_ddp.ROOT ARGUMENTS`; several of them are started before one is waited for."""
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{cwd}", "WANDB_MODE": "disabled", **env}
    command = [sys.executable, "-m", f"alexnet_ddp.{root}", *arguments]
    out = subprocess.STDOUT
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=out, text=True
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=150)
    return process.returncode, said


def test_d37_nothing_in_a_malicious_checkpoint_or_file_of_weights_is_run(
    images, calm, tmp_path, measured
):
    canary = tmp_path / "canary"
    evil = pickle.dumps({"features.0.weight": Evil(canary)}, protocol=2)
    pickle.loads(evil)
    assert canary.exists()  # the pickle works where one is loaded
    canary.unlink()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:  # as torch.save writes it
        out.writestr("evil/data.pkl", evil)
        out.writestr("evil/version", "3\n")
        out.writestr("evil/byteorder", "little")
    torch.save({"w": torch.zeros(3), "x": Evil(canary)}, tmp_path / "saved.pt")
    (tmp_path / "raw.pt").write_bytes(evil)
    (tmp_path / "zip.pt").write_bytes(archive.getvalue())
    (tmp_path / "named.safetensors").write_bytes(evil)
    common = [*SMALL, f"data.root={images}"]
    refused = [
        start(
            "evaluate",
            *common,
            "model=alexnet_small",
            f"model.weights={tmp_path / name}",
            cwd=tmp_path,
        )
        for name in ("saved.pt", "raw.pt", "zip.pt", "named.safetensors")
    ]
    for process in refused:
        code, said = ended(process)
        assert code == 64, said
        assert "Traceback" not in said
        assert f"model.weights ({tmp_path}/" in said

    unusable = []
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        run_dir = shutil.copytree(calm.run_dir, tmp_path / "runs" / name)
        for directory in (run_dir / "checkpoints").glob("step-*"):
            (directory / name).write_bytes(archive.getvalue() if name.startswith("opt") else evil)
            forge(directory)
        own = [f"run.root={tmp_path}/runs", f"run.name={name}", *calm.plugins]
        unusable.append(start("train", *calm.overrides, *own, "trainer.epochs=3", cwd=tmp_path))
        if name == "model.safetensors":
            unusable.append(start("evaluate", *own, cwd=tmp_path))
            unusable.append(start("predict", *own, f"images={images}/val", cwd=tmp_path))
    for process in unusable:
        code, said = ended(process)
        assert code == 66, said
        assert "is usable; restore one, or choose another run.name to start afresh" in said
    assert not canary.exists()
    measured |= {
        "files of weights refused": len(refused),
        "starts on forged checkpoints refused": len(unusable),
    }


def forge(directory: Path) -> None:
    """A manifest that fits whatever lies in the checkpoint."""
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    for name in manifest["files"]:
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "MANIFEST.json").write_text(json.dumps(manifest))


def evil_members(outside: Path) -> dict[str, bytes]:
    """Name -> a tar with one member that leads out of it, or is no file, among good ones."""

    def with_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for k, member_name in enumerate(["a.JPEG", name, "z.JPEG"]):
                member, data = tarfile.TarInfo(member_name), jpeg(1, k)
                if member_name == name:
                    member.type, member.linkname = kind, link
                member.size = len(data) if member.type == tarfile.REGTYPE else 0
                archive.addfile(member, io.BytesIO(data))
        return out.getvalue()

    giant = tarfile.TarInfo("giant.JPEG")
    giant.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(giant.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % (1 << 32)  # its real size, of which the archive holds nothing
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return {
        "dots": with_member("../../outside/evil.JPEG"),
        "absolute": with_member(f"{outside}/evil.JPEG"),
        "symlink": with_member("link.JPEG", tarfile.SYMTYPE, str(outside)),
        "through a link": with_member("evil.JPEG", tarfile.LNKTYPE, "../../outside/evil.JPEG"),
        "device": with_member("null.JPEG", tarfile.CHRTYPE),
        "pipe": with_member("pipe.JPEG", tarfile.FIFOTYPE),
        "sparse": bytes(block) + bytes(1024),
    }


def test_d38_malicious_archives_are_refused_and_nothing_is_extracted(tmp_path, measured):
    outside = tmp_path / "outside"
    outside.mkdir()
    root = make_archives(tmp_path / "data/archives", classes=3, per_class=5, num_val=6)
    good = {name: (root / name).read_bytes() for name in (TRAIN, VAL)}
    wnids = open_imagenet(root)[0].classes
    evil = evil_members(outside)
    refused = 0
    for name, content in evil.items():
        for archive, data in {
            TRAIN: tar({f"{wnid}.tar": content for wnid in wnids}),
            VAL: content,
        }.items():
            write(root / archive, data)
            with pytest.raises(DataError, match=r"holds a (link|sparse)") as error:
                open_imagenet(root)
            assert error.value.exit_code == 65, name
            write(root / archive, good[archive])
            refused += 1
        (tmp_path / "packed" / name).mkdir(parents=True)
        (tmp_path / "packed" / name / "train-0.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"holds a (link|sparse)"):
            pack(tmp_path / "packed" / name, tmp_path / "out" / name, split="train")
        refused += 1

    member = tarfile.TarInfo(
        "a.JPEG"
    )  # a regular member of a terabyte, in an archive that is one hole
    member.size = 1 << 40
    header = member.tobuf(tarfile.GNU_FORMAT)
    inner = tarfile.TarInfo(f"{wnids[0]}.tar")
    inner.size = len(header) + member.size + 1024
    with (root / TRAIN).open("wb") as file:
        file.write(inner.tobuf(tarfile.GNU_FORMAT) + header)
        for wnid in wnids[1:]:
            file.seek(512 + inner.size if wnid == wnids[1] else file.tell())
            one = tarfile.TarInfo(f"{wnid}.tar")
            one.size = len(content := tar({"b.JPEG": jpeg(1, 1)}))
            file.write(one.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
        file.truncate(file.tell() + 1024)
    began = peak_mb()
    index = open_imagenet(root)[0]
    with pytest.raises(
        DataError, match=r"cannot be read \(1,099,511,627,776 bytes, an image has at most"
    ):
        read_all(ImageNetConfig(root=str(root), image_size=16), index)
    assert peak_mb() - began < 50

    write(root / TRAIN, tar({f"{wnid}.tar": evil["dots"] for wnid in wnids}))
    run = start(
        "train", "data=imagenet", f"data.root={root}", *SMALL[1:], "run.name=a", cwd=tmp_path
    )
    shards = hostile_shards(tmp_path)
    code, said = ended(run)
    assert code == 65, said
    assert "holds a link, a device or a path out of it ('../../outside/evil.JPEG')" in said
    assert not list(outside.iterdir())
    assert not list(tmp_path.rglob("*evil*"))
    measured |= {"archives refused": refused + 1, "shards refused": shards, "files outside": 0}


def hostile_shards(tmp_path: Path) -> int:
    """Shards whose index leads elsewhere, or claims a giant. How many were refused."""
    from tests.conftest import make_folder

    root = pack(make_folder(tmp_path / "images", 12, 6), tmp_path / "shards")
    index = json.loads((root / INDEX).read_text())
    for key, value in (
        ("name", "../secret.tar"),
        ("name", "/etc/passwd"),
        ("sha256", "../../outside/evil"),
    ):
        forged = json.loads(json.dumps(index))
        forged["splits"]["train"]["shards"][0][key] = value
        (root / INDEX).write_text(json.dumps(forged))
        with pytest.raises(DataError, match=r"index.json is damaged \("):
            open_shards(ShardsConfig(root=str(root)))
    (root / INDEX).write_text(json.dumps(index))
    samples = np.load(root / "train.samples.npy")
    samples["size"] = 4_000_000_000
    np.save(root / "train.samples.npy", samples)
    np.save(root / "pickled.npy", np.array([{}], dtype=object))
    with pytest.raises(
        DataError, match=r"train.samples.npy is not the one that index.json was written for"
    ):
        open_shards(ShardsConfig(root=str(root)))
    sha256 = hashlib.sha256((root / "train.samples.npy").read_bytes()).hexdigest()
    index["splits"]["train"]["files"]["train.samples.npy"] = sha256
    (root / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        DataError, match=r"cannot be read: 4,000,000,000 bytes, an image has at most"
    ):
        open_shards(ShardsConfig(root=str(root)))
    shutil.copy(root / "pickled.npy", root / "train.samples.npy")
    with pytest.raises(DataError, match="Python objects in dtype"):
        open_shards(ShardsConfig(root=str(root)))
    return 6


def read_all(cfg, index) -> list:
    """The images that a loader had to skip."""
    loader = build_loader(
        cfg, index, build_augment(BasicAugmentConfig(), 0, 16, 18), 1, torch.device("cpu")
    )
    try:
        (batch,) = loader.batches([MicroBatch(0, 0, np.arange(len(index)), True)])
        return batch.bad
    finally:
        loader.close()


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def test_d39_a_configuration_cannot_call_what_it_names(images, calm, tmp_path, measured):
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(
        f"def run(*a, **k):\n    open({str(canary)!r}, 'w').close()\n"
    )
    experiments = tmp_path / "conf" / "experiment"
    experiments.mkdir(parents=True)
    top = "# @package _global_\n"
    (experiments / "key.yaml").write_text(f"{top}optimizer: {{_target_: evil.run, lr: 0.1}}\n")
    (experiments / "new.yaml").write_text(f"{top}plugin: {{_target_: evil.run}}\n")
    (experiments / "back.yaml").write_text(
        f"{top}hydra: {{callbacks: {{x: {{_target_: evil.run}}}}}}\n"
    )
    (experiments / "pack.yaml").write_text("# @package hydra.callbacks.x\n_target_: evil.run\n")
    logging = "version: 1\nformatters: {f: {(): evil.run}}\nroot: {handlers: []}"
    (experiments / "log.yaml").write_text(
        f"{top}hydra:\n  job_logging:\n    {logging.replace(chr(10), chr(10) + '    ')}\n"
    )
    (tmp_path / "run.pickle").write_bytes(pickle.dumps(Evil(canary), protocol=2))
    folder = ["--config-dir", str(tmp_path / "conf")]
    by_name = {
        ("+optimizer._target_=os.system",): "optimizer._target_ is not a key",
        ("optimizer._target_=evil.run",): "optimizer._target_ is not a key",
        ("++model={_target_:evil.run}",): "model._target_ is not a key",
        ("+hydra.callbacks.x._target_=evil.run",): "hydra.callbacks.x._target_ is refused",
        ("hydra/launcher=evil",): "hydra/launcher is refused",
        (
            "hydra.job_logging={version:1,formatters:{f:{():evil.run}}}",
        ): "hydra.job_logging is refused",
        ("--experimental-rerun", "run.pickle"): "--experimental-rerun is not supported",
        ("--exp", "run.pickle"): "--exp is not supported",
        (*folder, "experiment=key"): "experiment/key.yaml: optimizer._target_ is not a key",
        (*folder, "experiment=new"): "experiment/new.yaml: plugin is not a key",
        (*folder, "experiment=back"): "hydra.callbacks (x) are refused",
        (*folder, "experiment=pack"): "hydra.callbacks (x) are refused",
    }
    code = "import sys; from alexnet_ddp import cli; cli.run('train', lambda cfg, overrides: print('a run'))"
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{tmp_path}"}

    def door(*arguments):  # what alexnet_ddp.train does before it imports torch
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    for arguments, reason in by_name.items():
        done = door(*arguments)
        assert (done.returncode, done.stdout) == (64, ""), (arguments, done.stdout + done.stderr)
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
    assert door(*folder, "experiment=log").stdout == "a run\n"  # Hydra's logging is never set up

    records = {
        "target": (["+optimizer._target_=evil.run"], 64, "optimizer._target_ is not a key"),
        "callback": (
            ["+hydra.callbacks.x._target_=evil.run"],
            64,
            "hydra.callbacks.x._target_ is refused",
        ),
        "nonsense": ("text", 64, "is no"),
        "elsewhere": (
            [*calm.overrides, f"run.root={tmp_path}/elsewhere", "run.name=x"],
            0,
            "top-1",
        ),
    }
    processes = {}
    for name, (overrides, _, _) in records.items():
        run_dir = shutil.copytree(calm.run_dir, tmp_path / "runs" / name)
        (run_dir / "run.json").write_text(json.dumps({"overrides": overrides}))
        processes[name] = start("evaluate", f"run.name={name}", *calm.plugins, cwd=tmp_path)
    for name, process in processes.items():
        code, said = ended(process)
        assert code == records[name][1], said
        assert records[name][2] in said or name == "nonsense"
        assert "Traceback" not in said
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "runs/elsewhere/evaluation.json").exists()
    assert not canary.exists()
    measured |= {"refused by name": len(by_name) + 3, "calls": 0}


def test_d40_secrets_are_neither_written_nor_printed(new_job, images, tmp_path, measured):
    canaries = {f"CANARY{k}" for k in range(7)}
    shards = pack(images, tmp_path / "shards")
    url = "https://me:CANARY0@host.test/x?sig=CANARY1&token=CANARY2"
    env = {
        "WANDB_API_KEY": "CANARY3" * 6,
        "AWS_SECRET_ACCESS_KEY": "CANARY4",
        "WANDB_MODE": "offline",
    }
    data = ("data=shards", f"data.root={shards}", f"data.cache_dir='{url}'")
    common = (
        "logger.wandb=offline",
        "logger.tensorboard=true",
        "trainer.max_steps=3",
        "data.limit_val=8",
    )
    job = new_job("secret", *data, *common, env=env)
    assert job.run() == 0, job.said()
    for wanted in (
        "config.yaml",
        "run.json",
        "status.json",
        "tensorboard/events*",
        "wandb/offline*/*.wandb",
    ):
        assert list(job.run_dir.glob(wanted)), wanted
    assert "https://***@host.test/x" in (job.run_dir / "config.yaml").read_text()
    jobs = [job]

    # Refused, and failed: messages quote what was given.
    far = ("data=shards", "data.root='s3://me:CANARY0@host.test/x'", "data.cache_dir=cache")
    for name, code, overrides in (
        ("far", None, far),
        ("unknown", 64, ("+logger.api_key=CANARY5",)),
        ("wrong", 64, ("+data.aws_secret_key='CANARY5,CANARY6'",)),
        ("nested", 64, ("+logger={password:CANARY5,x:1}",)),
        (
            "address",
            64,
            ("data=shards", "data.root='zzz://me:CANARY0@host.test/x'", "data.cache_dir=cache"),
        ),
    ):
        jobs.append(new_job(name, *overrides, "trainer.max_steps=3", ranks=1, env=env))
        got = jobs[-1].start()
        got.expected = code
    for failed in jobs[1:]:
        code = failed.wait()
        assert code == failed.expected if failed.expected else code in (64, 65), failed.said()
        assert "alexnet_ddp: " in failed.said()

    leaks = []
    files = [path for job in jobs for path in (job.log, *job.run_dir.rglob("*")) if path.is_file()]
    for path in files:
        content = path.read_bytes()
        leaks += [f"{canary} in {path}" for canary in canaries if canary.encode() in content]
    assert not leaks
    evaluation = start("evaluate", "run.name=secret", "run.root=runs", *job.plugins, cwd=tmp_path)
    code, said = ended(evaluation)
    assert code == 64, said
    assert (
        "data.cache_dir of secret holds a secret, which is not recorded; give data.cache_dir=... again"
        in said
    )
    measured |= {"canaries": len(canaries), "files searched": len(files), "leaks": 0}
