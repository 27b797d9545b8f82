"""The rows of a layer, and the files that hold them."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from alexnet_ddp.config import ConfigError, RunConfig
from alexnet_ddp.config.predict import PredictConfig
from alexnet_ddp.predict.embeddings import LayerOutput, build_embedding_sink
from alexnet_ddp.predict.output import Prediction


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)
        self.twins, self.unused, self.head = Twins(), nn.Linear(2, 2), nn.Linear(4, 5)

    def forward(self, x):
        pooled = self.act(self.conv(x)).mean((2, 3))
        return self.head(sum(self.twins(pooled)))


class Twins(nn.Module):
    def forward(self, x):
        return x, x


def test_a_row_is_the_layers_own_output_even_if_the_next_layer_changes_it_in_place():
    model, images = Net().eval(), torch.randn(3, 3, 8, 8)
    layer = LayerOutput(model, "conv")
    assert layer.width(model, 8) == 4 * 6 * 6
    with torch.inference_mode():
        model(images)
        expected = model.conv(images).flatten(1).numpy()
    assert expected.min() < 0
    np.testing.assert_array_equal(layer.rows(), expected)


def test_the_input_of_the_head_is_the_default():
    model, images = Net().eval(), torch.randn(3, 3, 8, 8)
    layer = LayerOutput(model, None)
    assert layer.width(model, 8) == 4
    with torch.inference_mode():
        logits = model(images)
        np.testing.assert_array_equal(model.head(torch.from_numpy(layer.rows())), logits)


def test_a_layer_that_does_not_exist_or_has_no_rows_is_refused():
    model = Net().eval()
    with pytest.raises(ConfigError, match=r"layer \(convo\) is not a layer of Net; nearest: conv,"):
        LayerOutput(model, "convo")
    for name in ("unused", "twins"):
        layer = LayerOutput(model, name)
        with pytest.raises(ConfigError, match=rf"layer \({name}\) does not return one row per"):
            layer.width(model, 8)


def test_an_output_that_is_also_a_file_of_the_embeddings_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for output in ("q.jsonl", f"{tmp_path}/q.jsonl", "./x/../q.jsonl", "link/q.jsonl"):
        with pytest.raises(ConfigError, match=r"is also written by embeddings \(q.npy\)"):
            PredictConfig(run=RunConfig(name="x"), images="x", output=output, embeddings="q.npy")
    PredictConfig(run=RunConfig(name="x"), images="x", output="p.jsonl", embeddings="q.npy")


@pytest.mark.parametrize("num_rows", [0, 12_345])
def test_an_array_is_readable_for_any_number_of_rows(tmp_path, num_rows):
    sink = build_embedding_sink(str(tmp_path / "e.npy"), 2)
    rows = np.arange(2 * num_rows, dtype=np.float32).reshape(-1, 2)
    for k, row in enumerate(rows):
        sink.write(f"{k}\n.jpg", Prediction(k, [], [], embedding=row))
    sink.write("bad.jpg", Prediction(num_rows, [], [], error="not an image"))
    sink.close()
    np.testing.assert_array_equal(np.load(tmp_path / "e.npy"), rows.reshape(num_rows, 2))
    lines = (tmp_path / "e.jsonl").read_text().splitlines()
    assert [json.loads(one)["image"] for one in lines] == [f"{k}\n.jpg" for k in range(num_rows)]
