"""Published weights by name, from a local HTTP server in place of torchvision's."""

import functools
import hashlib
import http.server
import threading
from pathlib import Path

import pytest
import torch
import torchvision

from alexnet_ddp.config import AlexNetConfig, ConfigError, ModelConfig, TorchvisionConfig
from alexnet_ddp.config.compose import compose
from alexnet_ddp.config.data import IMAGENET_MEAN, IMAGENET_STD
from alexnet_ddp.config.recipe import AlexNetBNConfig
from alexnet_ddp.model import build_model
from alexnet_ddp.model.published import input_options_of, published_weights

ENUM = torchvision.models.SqueezeNet1_1_Weights
CATEGORIES = ENUM.DEFAULT.meta["categories"]
SQUEEZENET = TorchvisionConfig(name="squeezenet1_1", weights="DEFAULT")


class Server(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # paths

    def log_message(self, text: str, *args: object) -> None:
        Server.asked.append(self.path)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The weights of a SqueezeNet at the URL of torchvision's enum; torch.hub's cache is empty."""
    torch.manual_seed(1)
    folder = tmp_path / "server"
    folder.mkdir()
    state = torchvision.models.squeezenet1_1().state_dict()
    torch.save(state, folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()[:8]
    (folder / "x.pth").rename(folder / f"squeezenet-{digest}.pth")
    Server.asked = []
    handler = functools.partial(Server, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        url = f"http://127.0.0.1:{server.server_address[1]}/squeezenet-{digest}.pth"
        at(monkeypatch, url)
        yield url, state, folder
        server.shutdown()
        thread.join()


def at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    known = ENUM.DEFAULT.value
    moved = type(known)(url=url, transforms=known.transforms, meta=known.meta)
    monkeypatch.setattr(ENUM.DEFAULT, "_value_", moved)


def test_a_name_is_downloaded_once_and_gives_the_file_and_its_classes(served, tmp_path):
    url, state, _ = served
    for _ in range(2):
        path, rows = published_weights(SQUEEZENET, ["cat", "dog"])
        assert path == str(tmp_path / "torch/hub/checkpoints" / Path(url).name)
        assert rows == CATEGORIES
    assert Server.asked == [f"/{Path(url).name}"]
    cfg = TorchvisionConfig(name="squeezenet1_1", weights=path)
    classes = ["tench", "cat", "goldfish"]
    model = build_model(cfg, 3, 64, 0, classes, rows)
    found = model.state_dict()
    head = found["classifier.1.weight"]
    assert torch.equal(found["features.0.weight"], state["features.0.weight"])
    for row, name in ((0, "tench"), (2, "goldfish")):
        there = state["classifier.1.weight"][CATEGORIES.index(name)]
        assert torch.equal(head[row], there)
    assert not (head[1] == state["classifier.1.weight"]).flatten(1).all(1).any()


def test_rows_of_imagenets_folders_are_in_the_order_of_their_wordnet_ids(served):
    folders = [f"n{10**7 + 7 * k:08d}" for k in range(1000)]
    mixed = folders[500:] + folders[:500]
    assert published_weights(SQUEEZENET, mixed)[1] == folders
    assert published_weights(SQUEEZENET, folders[:20])[1] == CATEGORIES


def test_without_the_server_one_line_names_the_address_and_the_folder(
    served, tmp_path, monkeypatch
):
    folder = tmp_path / "torch/hub/checkpoints"
    at(monkeypatch, "http://127.0.0.1:9/squeezenet-00000000.pth")
    with pytest.raises(ConfigError) as error:
        published_weights(SQUEEZENET, ["cat"])
    text = str(error.value)
    assert text.startswith(
        "model.weights (DEFAULT): http://127.0.0.1:9/squeezenet-00000000.pth cannot be downloaded ("
    )
    assert f"; download it on another machine and put it into {folder}, or give a file" in text
    (folder / "squeezenet-00000000.pth").write_bytes(b"put there by hand")
    path, _ = published_weights(SQUEEZENET, ["cat"])
    assert path == str(folder / "squeezenet-00000000.pth")


def test_a_download_with_other_content_is_refused_and_leaves_no_file(served, tmp_path):
    url, _, folder = served
    (folder / Path(url).name).write_bytes(b"other")
    with pytest.raises(ConfigError, match="invalid hash value"):
        published_weights(SQUEEZENET, ["cat"])
    assert list((tmp_path / "torch/hub/checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            TorchvisionConfig(name="resnet50", weights="IMAGENET1K_V9"),
            "model.weights (IMAGENET1K_V9): torchvision has for resnet50: IMAGENET1K_V1, "
            "IMAGENET1K_V2, DEFAULT",
        ),
        (
            AlexNetBNConfig(weights="DEFAULT"),
            "model.weights (DEFAULT) is a name of torchvision's weights, and this network is not "
            "torchvision's; give a file, or a run such as run:NAME",
        ),
    ],
)
def test_an_unknown_name_is_one_line(cfg: ModelConfig, message):
    with pytest.raises(ConfigError) as error:
        published_weights(cfg, ["cat"])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("cfg", "size", "interpolation", "resize"),
    [
        (TorchvisionConfig(name="efficientnet_b0", weights="DEFAULT"), 112, "bicubic", 128),
        (TorchvisionConfig(name="resnet50", weights="DEFAULT"), 224, "bilinear", 232),
        (TorchvisionConfig(name="resnet50", weights="IMAGENET1K_V1"), 224, "bilinear", 256),
        (AlexNetConfig(weights="DEFAULT"), 64, "bilinear", 73),
    ],
)
def test_weights_bring_the_inputs_that_they_were_evaluated_with(cfg, size, interpolation, resize):
    assert input_options_of(cfg, size) == {
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "eval_interpolation": interpolation,
        "eval_resize": resize,
    }


def test_options_of_the_user_come_before_those_of_the_weights():
    model = ["model=torchvision", "model.name=efficientnet_b2", "model.weights=DEFAULT"]
    given = ["data.std=[1,1,1]", "data.eval_interpolation=bilinear"]
    found = compose("evaluate", ["data=synthetic", *model, *given]).data
    assert (found.mean, found.std) == (list(IMAGENET_MEAN), [1, 1, 1])
    assert found.eval_interpolation.value == "bilinear"
    assert found.eval_resize == 224  # torchvision's, 288 of 288
    found = compose("train", ["data=shards", "data.root=x", *model, "data.mean=auto"]).data
    assert (found.mean, found.std) == ("auto", None)  # both are those of the shards
    assert found.eval_interpolation.value == "bicubic"


def test_files_and_runs_are_no_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("DEFAULT").touch()
    for weights in ("DEFAULT", "w.pth", "run:A", "runs/A", "./X", None):
        assert published_weights(AlexNetConfig(weights=weights), ["cat"]) is None
