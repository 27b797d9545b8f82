"""LoRA and AdaLoRA: what is trained, sent, saved and loaded, and resumption in the middle of a run."""

import hashlib
import json
import logging
import os
import sys

import pytest
import torch
import torchvision
from torch import Tensor, nn

from alexnet_ddp.checkpoint.format import list_checkpoints, read_tensors, weights_of_run
from alexnet_ddp.config import ConfigError, Device, FinetuneConfig, Method
from alexnet_ddp.model import Adapters
from alexnet_ddp.model.adapters import adaptable_layers
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.training.trained import read_trained
from tests.ranks import run_command, run_ranks
from tests.test_train import ENV
from tests.training.test_finetune import (
    RESNET,
    changed,
    copies,
    go,
    sent_by,
    training,
    weights,
    world,
)

__all__ = ["weights", "world"]  # fixtures
pytestmark = pytest.mark.xdist_group("peft")  # importing it takes seconds

LORA = ["finetune.method=lora", "finetune.rank=2", "trainer.ema_decay=0.5", "optimizer=adamw"]
SMALL = ["model=alexnet_small", "model.dropout=0.5"]
TEN_STEPS = ["data.num_train=40", "trainer.epochs=1"]  # AdaLoRA's allocation follows the epochs
GROUPS = {"model", "optimizer", "adapters", "ema", "ema_adapters"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The weights of a small AlexNet, which has dropout."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("small") / "small.pth"
    from alexnet_ddp.model.alexnet import alexnet_small

    torch.save(alexnet_small(3, 0.5).state_dict(), path)
    return path


@pytest.mark.slow
def test_adapters_and_head_are_trained_and_checkpoints_hold_a_plain_network(
    world, tmp_path, weights
):
    """The evaluation of the run, of its checkpoint and of a run that starts from it are bit-equal."""
    factors = ["finetune.backbone_lr_factor=0.5", "finetune.layer_decay=0.5"]
    parts = training(world, tmp_path, weights, *LORA, *factors)
    head, before = {"fc.weight", "fc.bias"}, copies(parts)
    plain = torchvision.models.resnet18(num_classes=3)
    raw = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    go(parts, 3)
    trained = changed(raw, parts.model.state_dict())
    assert trained >= head
    adapted = {name.partition(".lora_")[0] for name in trained - head}
    assert all(".lora_" in name for name in trained - head)
    assert adapted == {
        name for name, layer in plain.named_modules() if isinstance(layer, nn.Conv2d)
    }
    statistics = {name for name in plain.state_dict() if "bn" in name or "downsample.1" in name}
    assert not changed(before["model"], copies(parts)["model"]) & statistics
    rates = {
        name: group["lr_factor"]
        for name, p in parts.model.named_parameters()
        for group in parts.optimizer.param_groups
        if any(p is one for one in group["params"])
    }
    assert rates["fc.weight"] == 1
    assert rates["layer4.1.conv2.lora_B.default.weight"] == 0.25

    parts.setup.checkpoints.save(parts.setup.state, parts.state_dict(), is_last=True)
    (checkpoint,) = list_checkpoints(tmp_path / "x/checkpoints")
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    with parts.evaluation_model() as model:
        expected = model(images)
    assert torch.equal(parts.model.conv1.base_layer.weight, raw["conv1.base_layer.weight"])
    file, _ = weights_of_run("run:x", str(tmp_path))
    assert file == str(checkpoint / "ema.safetensors")
    for group in ("model", "ema"):
        assert read_tensors(checkpoint, group).keys() == plain.state_dict().keys()
    loaded = read_trained(parts.setup.cfg, checkpoint).model.eval()
    assert torch.equal(loaded.to(memory_format=torch.channels_last)(images), expected)
    parts.setup.checkpoints.close()
    parts.close()
    next_run = training(world, tmp_path, "run:x", "run.name=next", "finetune.method=head")
    with next_run.evaluation_model() as model:
        assert torch.equal(model(images), expected)
    next_run.close()


@pytest.mark.slow
def test_with_other_adapters_a_run_continues_from_the_merged_weights(
    world, tmp_path, weights, caplog
):
    parts = training(world, tmp_path, weights, *LORA)
    go(parts, 2)
    parts.setup.checkpoints.save(parts.setup.state, parts.state_dict(), is_last=True)
    parts.setup.checkpoints.close()
    saved = copies(parts)["model"]
    parts.close()
    with pytest.raises(ConfigError, match=r"finetune.rank=3 \(was 2\)"):
        training(world, tmp_path, weights, *LORA, "finetune.rank=3")
    other = training(
        world, tmp_path, weights, *LORA, "finetune.rank=3", "resume.allow_changes=true"
    )
    assert "training continues from the merged weights" in caplog.text
    assert not changed(saved, copies(other)["model"])
    go(other, 1)
    other.close()


def steps_and_messages(root: str, small: str, alexnet: str) -> dict:
    """In one world: resumption in the middle with both methods, and the values that a step sends."""
    found = {}
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        for method in ("lora", "adalora"):
            found[method] = resumes(world, f"{root}/{method}", small, method)
        network = ["model=alexnet", "data.image_size=64"]
        for method in ("lora", "full"):
            parts = training(
                world, f"{root}/a", alexnet, f"finetune.method={method}", network=network
            )
            found[f"sent with {method}"] = sent_by(parts)
    return found


def resumes(world: World, root: str, path: str, method: str) -> dict:
    """Train ten steps, and again from checkpoints in the middle; what differs, and the end."""
    more = [f"finetune.method={method}", "finetune.rank=4", *TEN_STEPS]
    more += ["trainer.ema_decay=0.9", "optimizer=sgd", "optimizer.lr=0.01"]
    calm = training(world, f"{root}/calm", path, *more, network=SMALL)
    go(calm, 10)
    end, found = copies(calm), {}
    for stop in (4, 8):
        first = training(world, f"{root}/{stop}", path, *more, network=SMALL)
        go(first, stop)
        first.setup.checkpoints.save(first.setup.state, first.state_dict(), is_last=True)
        first.setup.checkpoints.close()
        first.close()
        rest = training(world, f"{root}/{stop}", path, *more, network=SMALL)
        assert rest.setup.state.step == stop
        go(rest, 10 - stop)
        after = copies(rest)
        found[stop] = {f"{stem}/{name}" for stem in end for name in changed(end[stem], after[stem])}
        rest.setup.checkpoints.close()
        rest.close()
    calm.close()
    weights = {name: t.numpy() for name, t in end["model"].items()}
    return {"differ": found, "digest": digest(end), "weights": weights, "groups": set(end)}


def digest(groups: dict[str, dict[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for stem, group in sorted(groups.items()):
        for name, tensor in sorted(group.items()):
            found.update(f"{stem}/{name}".encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
def test_two_ranks_resume_bit_equal_agree_and_send_a_hundredth(world, tmp_path, small):
    """AdaLoRA: while ranks are divided (step 4), and after the last division (step 8)."""
    torch.manual_seed(1)
    path = tmp_path / "alexnet.pth"
    torch.save(torchvision.models.alexnet(num_classes=3).state_dict(), path)
    two = run_ranks(
        steps_and_messages, 2, str(tmp_path / "two"), str(small), str(path), timeout_s=240
    )
    for method, groups in (("lora", set()), ("adalora", {"ranks"})):
        one = resumes(world, str(tmp_path / "one" / method), str(small), method)
        for found in (one, two[0][method], two[1][method]):
            assert found["differ"] == {4: set(), 8: set()}
            assert found["groups"] == GROUPS | groups
        assert two[0][method]["digest"] == two[1][method]["digest"]
        for name, tensor in one["weights"].items():
            theirs = torch.from_numpy(two[0][method]["weights"][name])
            torch.testing.assert_close(torch.from_numpy(tensor), theirs, rtol=0, atol=1e-4)
    model = torchvision.models.alexnet(num_classes=3)
    Adapters(model, FinetuneConfig(method=Method.lora), 0, 64)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for rank in two:
        assert rank["sent with lora"] == (num_trained, 0)
        full, _ = rank["sent with full"]
        print(f"values per step: full {full:,}, lora {num_trained:,}: {full / num_trained:.1f}")
        assert full >= 100 * num_trained


@pytest.mark.slow
def test_batch_norm_keeps_its_statistics_and_sends_none(world, tmp_path, weights):
    parts = training(world, tmp_path, weights, *LORA)
    before = copies(parts)["model"]
    num_sent, num_averaged = sent_by(parts)
    assert num_averaged == 0
    assert num_sent == sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    assert statistics
    assert not changed(before, parts.state_dict()["model"]) & statistics


@pytest.mark.slow
def test_adalora_divides_the_total_rank_and_keeps_it(world, tmp_path, small):
    """Six ranks for each layer at first, four in the end: 20 for the 5 layers."""
    more = [
        "finetune.method=adalora",
        "finetune.rank=4",
        *TEN_STEPS,
        "optimizer.lr=0.1",
    ]
    parts = training(world, tmp_path, small, *more, network=SMALL)

    def ranks() -> list[int]:
        values = [p for name, p in parts.model.named_parameters() if ".lora_E." in name]
        return [int(p.count_nonzero()) for p in values]

    found = []
    for _ in range(10):
        go(parts, 1)
        found.append(sum(ranks()))
    assert found == [30, 30, 25, 22] + [20] * 6  # a cubic fall from step 2 to step 6
    assert not parts.allocation._allocator.exp_avg_ipt  # the last division ends the bookkeeping
    parts.close()


@pytest.mark.slow
def test_the_penalty_counts_once_for_any_division_of_the_batch(world, tmp_path, small):
    """With class weights and micro-batches, the gradient is that of the mean loss plus the penalty."""
    more = ["finetune.method=adalora", "finetune.rank=2", "trainer.class_weights=[1,2,4]"]
    more += [
        "model.dropout=0",
        "optimizer.weight_decay=0",
        "optimizer.momentum=0",
        "optimizer.lr=1e-12",
        "trainer.clip_grad_norm=null",
    ]
    grads = []
    for micro in (4, 1):
        parts = training(
            world, tmp_path, small, *more, f"trainer.micro_batch_size={micro}", network=SMALL
        )
        go(parts, 1)
        grads.append(
            {n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None}
        )
        parts.model.zero_grad(set_to_none=True)
        parts.allocation.penalty().backward()
        # The values of lora_E are 0 at first, so the loss has no gradient with respect to lora_A.
        for name, p in parts.model.named_parameters():
            if ".lora_A." in name:
                torch.testing.assert_close(grads[-1][name], p.grad, rtol=1e-5, atol=1e-7)
        parts.close()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """Layers that get no adapter: with groups, dilated, used without a call; and one that does."""

    def __init__(self, adaptable: bool) -> None:
        super().__init__()
        self.groups = nn.Conv2d(3, 6, 3, groups=3)
        self.dilated = nn.Conv2d(6, 4, 3, dilation=2)
        self.used = nn.Linear(4, 4)
        self.plain = nn.Linear(4, 4) if adaptable else nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.dilated(self.groups(x)).mean((2, 3))
        return self.head(self.plain(nn.functional.linear(x, self.used.weight)))


def test_layers_without_an_adapter_are_logged_or_refused(caplog):
    with caplog.at_level(logging.INFO):
        assert adaptable_layers(Odd(True), 16, "finetune.method=lora") == ["plain"]
    listed = "1 with groups, 1 with dilation or another padding than zeros, 1 that are not called as modules"
    assert caplog.messages == [f"finetune.method=lora: 1 layers get adapters; without: {listed}"]
    with pytest.raises(ConfigError) as error:
        adaptable_layers(Odd(False), 16, "finetune.method=lora")
    assert str(error.value) == (
        "finetune.method=lora finds no linear layer or convolution before the head that it can adapt "
        f"(layers {listed}); use finetune.method=head or full"
    )


def test_without_peft_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError) as error:
        Adapters(torchvision.models.resnet18(), FinetuneConfig(method=Method.lora), 0, 32)
    assert str(error.value) == "finetune.method=lora needs peft; pip install 'alexnet-ddp[peft]'"


@pytest.mark.slow
def test_the_command_trains_evaluates_and_exports(image_folder, tmp_path, weights):
    """The counts of the run, of evaluate and of an export agree: adapters are merged everywhere."""
    options = [*RESNET, "data=folder", f"data.root={image_folder}", f"model.weights={weights}"]
    options += ["data.image_size=32", "trainer.global_batch_size=17", "trainer.epochs=2"]
    options += ["finetune.method=lora", "logger.tensorboard=false", "run.name=x"]
    env = {**ENV, "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    done = run_command("alexnet_ddp.train", options, 0, tmp_path, env)
    assert done.returncode == 0, done.stdout
    assert "parameters are trained" in done.stdout
    done = run_command("alexnet_ddp.evaluate", ["run.name=x"], 0, tmp_path, env)
    assert done.returncode == 0, done.stdout
    best = json.loads((tmp_path / "runs/x/best.json").read_text())["val/top1"]
    assert json.loads((tmp_path / "runs/x/evaluation.json").read_text())["val/top1"] == best
    export = ["run.name=x", "format=safetensors", "output=exported"]
    done = run_command("alexnet_ddp.export", export, 0, tmp_path, env)
    assert done.returncode == 0, done.stdout
