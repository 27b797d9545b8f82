"""Published weights of timm by name, from a prepared cache or server in place of Hugging Face's."""

import functools
import http.server
import threading
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.compose import compose
from alexnet_ddp.config.plugins import TimmConfig
from alexnet_ddp.model import build_model
from alexnet_ddp.model.published import published_weights
from tests.test_train import SMALL, run

timm = pytest.importorskip("timm")

TAG = "r160_in1k"
REPOSITORY = f"timm/test_resnet.{TAG}"
COMMIT = "0" * 40
CATEGORIES = torchvision.models.AlexNet_Weights.DEFAULT.meta["categories"]


def weights_at(path: Path, name: str = "test_resnet") -> dict[str, torch.Tensor]:
    """Weights of `name` in a new file of the form that timm publishes."""
    torch.manual_seed(1)
    state = timm.create_model(name).state_dict()
    path.parent.mkdir(parents=True)
    save_file(state, path)
    return state


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """The folder of Hugging Face's cache, which is empty. Nothing is downloaded."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "hub"


def put_into(cache: Path, repository: str, name: str) -> dict[str, torch.Tensor]:
    """As if timm had downloaded weights of the network `name`."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    return weights_at(folder / "snapshots" / COMMIT / "model.safetensors", name)


@pytest.mark.parametrize("weights", ["DEFAULT", TAG])
def test_weights_are_loaded_by_timm_and_rows_follow_their_classes(offline, weights):
    state = put_into(offline, REPOSITORY, "test_resnet")
    before = torch.get_rng_state()
    cfg = TimmConfig(name="test_resnet", weights=weights)
    path, rows = published_weights(cfg, ["cat", "dog"])
    assert torch.equal(before, torch.get_rng_state())
    assert rows == CATEGORIES
    classes = ["tench", "cat", "goldfish"]
    model = build_model(TimmConfig(name="test_resnet", weights=path), 3, 64, 0, classes, rows)
    found = model.state_dict()
    assert torch.equal(found["conv1.0.weight"], state["conv1.0.weight"])
    for row, name in ((0, "tench"), (2, "goldfish")):
        assert torch.equal(found["fc.weight"][row], state["fc.weight"][CATEGORIES.index(name)])
    for file in offline.rglob("*.safetensors"):
        file.unlink()
    assert published_weights(cfg, ["cat", "dog"]) == (path, rows)  # timm is not asked again


def test_weights_for_other_arguments_are_other_weights(offline):
    put_into(offline, "timm/test_vit.r160_in1k", "test_vit")
    shapes = []
    for args in ({}, {"img_size": 64}):
        cfg = TimmConfig(name="test_vit", weights=TAG, args=args)
        path, _ = published_weights(cfg, ["cat"])
        shapes.append(tuple(load_file(path)["pos_embed"].shape))
    assert shapes == [(1, 101, 64), (1, 17, 64)]  # timm interpolates the positions


def test_a_file_with_positions_of_another_size_gives_what_the_tag_gives(offline):
    """The remedy without internet: the same file as model.weights."""
    name = "test_vit"
    put_into(offline, f"timm/{name}.{TAG}", name)
    (file,) = offline.rglob("*.safetensors")
    args = {"img_size": 64}
    path, _ = published_weights(TimmConfig(name=name, weights=TAG, args=args), ["cat"])
    found, expected = (
        build_model(TimmConfig(name=name, weights=str(one), args=args), 1000, 64, 0).state_dict()
        for one in (file, path)
    )
    assert load_file(file)["pos_embed"].shape != expected["pos_embed"].shape
    assert all(torch.equal(found[of], tensor) for of, tensor in expected.items())


def test_weights_without_a_classifier_bring_none(offline, monkeypatch):
    put_into(offline, REPOSITORY, "test_resnet")
    known = timm.get_pretrained_cfg("test_resnet")
    monkeypatch.setattr(known, "num_classes", 0)
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda *args, **kwargs: known)
    path, rows = published_weights(TimmConfig(name="test_resnet", weights=TAG), ["cat"])
    assert rows is None
    assert load_file(path)["fc.weight"].shape[0] == 1
    new = [build_model(TimmConfig(name="test_resnet", weights=w), 3, 64, 0) for w in (path, None)]
    heads = [model.state_dict()["fc.weight"] for model in new]
    assert torch.equal(*heads)  # its initialisation


def test_without_internet_one_line_names_the_address(offline, tmp_path):
    with pytest.raises(ConfigError) as error:
        published_weights(TimmConfig(name="test_resnet", weights="DEFAULT"), ["cat"])
    text = str(error.value)
    rule = f"timm's weights test_resnet.{TAG} cannot be downloaded and loaded ("
    assert text.startswith(f"model.weights (DEFAULT): {rule}")
    assert text.endswith(
        f"; download model.safetensors from https://huggingface.co/{REPOSITORY} on another "
        "machine, and give that file as model.weights"
    )
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        (
            "test_resnet",
            "IMAGENET1K_V1",
            f"model.weights (IMAGENET1K_V1): timm has for test_resnet: {TAG}, DEFAULT",
        ),
        ("resnet51q", "x", "model.weights (x): timm has for resnet51q: ra2_in1k, DEFAULT"),
        ("resnetv2_50d", "DEFAULT", "model.weights (DEFAULT): timm has for resnetv2_50d: none"),
        (
            "resnet50.a2_in1k",
            "a1_in1k",
            "model.name (resnet50.a2_in1k) and model.weights (a1_in1k) name different weights; "
            "leave the tag out of model.name",
        ),
    ],
)
def test_an_unknown_name_is_one_line(name, weights, message):
    with pytest.raises(ConfigError) as error:
        published_weights(TimmConfig(name=name, weights=weights), ["cat"])
    assert str(error.value) == message


def test_a_tag_brings_its_own_inputs(tmp_path, monkeypatch):
    options = ["data=synthetic", "model=timm", "model.name=vit_base_patch16_224"]
    found = [compose("train", [*options, f"model.weights={tag}"]).data for tag in ("dino", "mae")]
    theirs = [timm.get_pretrained_cfg(f"vit_base_patch16_224.{tag}") for tag in ("dino", "mae")]
    assert [data.normalisation for data in found] == [(cfg.mean, cfg.std) for cfg in theirs]
    monkeypatch.chdir(tmp_path)
    Path("dino").touch()
    cfg = TimmConfig(name="vit_base_patch16_224", weights="dino")
    assert published_weights(cfg, ["cat"]) is None  # a file


class Hub(http.server.SimpleHTTPRequestHandler):
    """The part of Hugging Face's interface that a download of a file needs."""

    asked: list[str] = []  # files that were downloaded

    def log_message(self, text: str, *args: object) -> None:
        if self.command == "GET":
            Hub.asked.append(self.path)

    def end_headers(self) -> None:
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", COMMIT)
        super().end_headers()


@pytest.mark.slow
def test_one_rank_of_a_node_downloads_the_weights(image_folder, tmp_path):
    file = f"{REPOSITORY}/resolve/main/model.safetensors"
    state = weights_at(tmp_path / "server" / file)
    handler = functools.partial(Hub, directory=str(tmp_path / "server"))
    Hub.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        env = {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}
        options = [f"data.root={image_folder}", *SMALL, "model=timm", "model.name=test_resnet"]
        options += ["model.weights=DEFAULT", "finetune.method=head", "trainer.max_steps=1"]
        options += ["trainer.global_batch_size=8", "run.name=a", "device=cpu"]
        done = run("train", *options, cwd=tmp_path, env=env, ranks=2)
        server.shutdown()
    assert done.returncode == 0, done.stdout
    assert [path for path in Hub.asked if not path.startswith("/api/")] == [f"/{file}"]
    saved = load_file(next((tmp_path / "runs/a").rglob("model.safetensors")))
    assert torch.equal(saved["conv1.0.weight"], state["conv1.0.weight"])
