"""The code examples in the README.md of an export: an image file to its most probable class."""

from typing import Any

from alexnet_ddp.config.export import ExportFormat

_READ = """\
import json

import numpy as np
{imports}
from PIL import Image

with open("preprocessing.json") as file:
    how = json.load(file)
with open("classes.json") as file:
    classes = json.load(file)

image = Image.open("photo.jpg").convert("RGB")
short, long = how["resize"], int(how["resize"] * max(image.size) / min(image.size))
shape = (short, long) if image.width <= image.height else (long, short)
image = image.resize(shape, Image.Resampling[how["interpolation"].upper()])
size = how["size"]
left, top = round((image.width - size) / 2), round((image.height - size) / 2)
image = image.crop((left, top, left + size, top + size))
"""
_UINT8 = """\
images = np.asarray(image).transpose(2, 0, 1)[None].copy()
"""
_FLOAT = """\
pixels = np.asarray(image, np.float32) / how["divide_by"]
pixels = (pixels - np.float32(how["mean"])) / np.float32(how["std"])
images = pixels.transpose(2, 0, 1)[None].copy()
"""
_RUN = {
    ExportFormat.onnx: """\
session = onnxruntime.InferenceSession("model.onnx")
(output,) = session.run(None, {"images": images})
""",
    ExportFormat.torch_export: """\
model = torch.export.load("model.pt2").module()
with torch.inference_mode():
    output = model(torch.from_numpy(images)).numpy()
""",
}
_SOFTMAX = """\
probabilities = np.exp(output[0] - output[0].max())
probabilities /= probabilities.sum()
"""
_SHOW = """\
best = int(probabilities.argmax())
print(classes[best], float(probabilities[best]))
"""
_SAFETENSORS = """\
import torch
from PIL import Image

import alexnet_ddp

trained = alexnet_ddp.load_run(".")
image = trained.transform(Image.open("photo.jpg"))
with torch.inference_mode():
    probabilities = trained.model(image[None]).softmax(1)[0]
best = int(probabilities.argmax())
print(trained.classes[best], float(probabilities[best]))
"""
_HUGGINGFACE = """\
import json

import timm
import torch
from PIL import Image

with open("classes.json") as file:
    classes = json.load(file)
model = timm.create_model("local-dir:.", pretrained=True).eval()
settings = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**settings, is_training=False)
image = transform(Image.open("photo.jpg").convert("RGB"))
with torch.inference_mode():
    probabilities = model(image[None]).softmax(1)[0]
best = int(probabilities.argmax())
print(classes[best], float(probabilities[best]))
"""


def code(form: ExportFormat, how: dict[str, Any]) -> str:
    """The example for a format. how: the content of preprocessing.json."""
    if form is ExportFormat.safetensors:
        return _SAFETENSORS
    if form is ExportFormat.huggingface:
        return _HUGGINGFACE
    imports = "onnxruntime" if form is ExportFormat.onnx else "torch"
    read = _READ.replace("{imports}", f"import {imports}")
    if how["normalised_by"] == "model":
        return read + _UINT8 + _RUN[form] + "probabilities = output[0]\n" + _SHOW
    return read + _FLOAT + _RUN[form] + _SOFTMAX + _SHOW
